"""Where the reference's log-probabilities come from: a table by content, the base under adapters, a copy."""

import numpy as np
import paddle
import pytest

from erniekit.training.preference import answer_log_probs
from erniekit.training.reference import Follower, PolicyCopy, Table, table_name
from tests.unit.training.micro import make_model
from tests.unit.training.pairs import pair_batch


@pytest.fixture
def model():
    return make_model()


def logps(found):
    return found.numpy().tolist()


def moved(model, by=0.05):
    """Every trained weight goes somewhere else."""
    with paddle.no_grad():
        for p in model.parameters():
            if not p.stop_gradient:
                p.set_value(p + by)


def refused():
    raise AssertionError("everything is known: no model is needed")


# ---------------------------------------------------------------------- the table
def test_the_table_answers_for_every_sample_however_it_is_packed(model):
    table = Table(None)
    batches = [pair_batch([0, 1], [2]), pair_batch([3])]
    assert table.fill(batches, model=lambda: model) == 4
    assert logps(table(None, batches[0])) == logps(answer_log_probs(model, batches[0]))
    other = pair_batch([3, 2, 0])
    assert np.allclose(logps(table(None, other)), logps(answer_log_probs(model, other)), rtol=1e-5)
    assert table.fill([other, *batches], model=refused) == 0


def test_judged_answers_stand_in_the_table_with_their_mismatched_ones(model):
    table, kinds = Table(None), ("rejected", "mismatched")
    batch = pair_batch([0, 1], kinds=kinds)
    table.fill([batch], model=lambda: model)
    assert logps(table(None, batch)) == logps(answer_log_probs(model, batch))
    with pytest.raises(KeyError):  # the same tokens, but the answer is a good one now
        table(None, pair_batch([0], kinds=("chosen", "mismatched")))


def test_another_run_finds_the_table_and_computes_only_what_is_new(model, tmp_path):
    path = tmp_path / "deep" / "reference.npz"
    Table(path).fill([pair_batch([0, 1])], model=lambda: model)
    again = Table(path)
    assert again.fill([pair_batch([0, 1])], model=refused) == 0
    before = logps(again(None, pair_batch([0, 1])))
    moved(model)
    assert again.fill([pair_batch([1, 5])], model=lambda: model) == 1
    assert logps(again(None, pair_batch([0, 1]))) == before, "what is known stands"
    assert Table(path).fill([pair_batch([0], [1], [5])], model=refused) == 0
    assert Table(path).fill([pair_batch([0], seed=1)], model=lambda: model) == 1, "another content, the same number"


def test_a_damaged_file_is_told_and_made_anew(model, tmp_path, capsys):
    path = tmp_path / "reference.npz"
    Table(path).fill([pair_batch([0])], model=lambda: model)
    path.write_bytes(path.read_bytes()[:-40])
    assert Table(path).fill([pair_batch([0])], model=lambda: model) == 1
    assert "is damaged" in capsys.readouterr().err
    assert Table(path).fill([pair_batch([0])], model=refused) == 0


def test_a_folder_that_cannot_be_written_costs_nothing(model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    table = Table(tmp_path / "file" / "reference.npz")
    assert table.fill([pair_batch([0])], model=lambda: model) == 1
    assert "cannot be written" in capsys.readouterr().err and table(None, pair_batch([0])).shape == [2]


def test_the_name_of_the_file_says_what_the_numbers_depend_on():
    names = {table_name({"model": "a"}, "bf16"), table_name({"model": "b"}, "bf16"), table_name({"model": "a"}, "fp32")}
    assert len(names) == 3 and table_name({"model": "a"}, "bf16") in names


def test_the_reference_is_computed_without_dropout_and_leaves_the_mode_alone(model):
    batch = pair_batch([0, 1])
    quiet = logps(answer_log_probs(model, batch))
    for layer in model.model.layers:
        layer.dropout, layer.self_attn.core_attn.dropout = 0.5, 0.5
    model.train()
    table = Table(None)
    table.fill([batch], model=lambda: model)
    assert logps(table(None, batch)) == quiet and model.training


# ---------------------------------------------------------------------- the copy
def test_a_copy_stands_in_for_a_forward_and_the_weights_come_back_bit_for_bit(model):
    batch, copy = pair_batch([0, 1]), PolicyCopy(model)
    start = Table(None)
    start.fill([batch], model=lambda: model)
    reference = Follower(start, copy)
    first = logps(reference(model, batch))
    moved(model)
    second = logps(answer_log_probs(model, batch))
    assert logps(reference(model, batch)) == first != second
    copy.take()
    moved(model)
    weights = {name: p.numpy() for name, p in model.named_parameters()}
    assert logps(reference(model, batch)) == second
    assert all(np.array_equal(p.numpy(), weights[name]) for name, p in model.named_parameters())


def test_the_reference_follows_after_every_so_many_steps(model):
    copy = PolicyCopy(model, every=3)
    taken = []
    for step in range(7):
        before = copy.state().get("model.norm.weight")
        copy.before_step(step)
        after = copy.state().get("model.norm.weight")
        taken.append(after is not before)
        moved(model)
    assert taken == [False, False, False, True, False, False, True]
    never = PolicyCopy(model, every=-1)
    never.before_step(3)
    assert not never.taken


def test_a_resumed_run_has_the_same_copy(model):
    batch, copy = pair_batch([0, 1]), PolicyCopy(model)
    copy.take()
    saved = {name: tensor.numpy().copy() for name, tensor in copy.state().items()}
    moved(model)
    resumed = PolicyCopy(model)
    resumed.load_state(saved)
    assert logps(Follower(refused, resumed)(model, batch)) == logps(Follower(refused, copy)(model, batch))


def test_correction_biases_are_part_of_the_copy(model):
    """They move without a gradient, and they decide which experts answer."""
    names = set(PolicyCopy(model)._trained)
    assert any(name.endswith("e_score_correction_bias") for name in names)
    assert names == {name for name, _ in model.named_parameters()}
