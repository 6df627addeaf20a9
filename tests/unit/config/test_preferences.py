"""What holds between the keys of preference training."""

import pytest

from erniekit.base.errors import ConfigError
from erniekit.config.align import REFERENCE_FREE
from erniekit.config.load import load_config
from erniekit.config.run import KEYS

LOSSES = KEYS["loss_type"].choices


def problem(**keys):
    with pytest.raises(ConfigError) as caught:
        load_config({"stage": "DPO", **keys})
    (text,) = caught.value.problems
    return text


def align(**keys):
    return load_config({"stage": "DPO", **keys}).align


def test_an_unknown_loss_is_told_with_the_nearest():
    assert "Did you mean 'sigmoid'?" in problem(loss_type="sigmoidal")
    assert "Did you mean 'dpop'?" in problem(loss_type="dpopp")
    assert align(loss_type="exo_pair", label_smoothing=0.1).loss_type == "exo"
    assert align(loss_type="bco_pair").loss_type == "bco"


@pytest.mark.parametrize("beta", [0, -0.1])
def test_beta_is_above_zero(beta):
    assert "beta" in problem(beta=beta)
    assert "must be above 0" in problem(beta=beta)


@pytest.mark.parametrize("loss", LOSSES)
def test_only_losses_without_a_reference_take_none(loss):
    smoothing = 0.1 if loss == "exo" else 0.0
    keys = {"loss_type": loss, "label_smoothing": smoothing, "reference_free": True}
    if loss in REFERENCE_FREE:
        assert not align(**keys).needs_reference
        assert not align(loss_type=loss).needs_reference
    else:
        text = problem(**keys)
        assert f"the loss {loss} (" in text and "needs a reference" in text and "simpo, or, orpo" in text
        assert align(loss_type=loss, label_smoothing=smoothing).needs_reference


def test_kto_needs_a_reference():
    assert "stage KTO needs a reference" in problem(stage="KTO", reference_free=True)


def test_orpo_is_the_odds_ratio_beside_the_likelihood():
    assert align(loss_type="orpo").sft_loss_ratio == 1.0
    assert align(loss_type="orpo", sft_loss_ratio=0.3).sft_loss_ratio == 0.3
    assert align(loss_type="orpo", sft_loss_ratio=0).sft_loss_ratio == 0.0
    assert align(loss_type="or").sft_loss_ratio == 0.0


def test_smoothing_fits_the_loss():
    assert "its paper takes 0.001" in problem(loss_type="exo")
    assert "its paper takes 0.001" in problem(loss_type="exo", label_smoothing=1)
    assert "needs less than 0.5" in problem(loss_type="robust", label_smoothing=0.5)
    assert align(loss_type="robust", label_smoothing=0.4).label_smoothing == 0.4
    assert "the loss hinge (" in problem(loss_type="hinge", label_smoothing=0.1)
    assert align(label_smoothing=0.1).label_smoothing == 0.1


def test_an_offset_needs_a_loss_on_the_margin():
    assert "offset_alpha is 0.5: the loss kto_pair (" in problem(loss_type="kto_pair", offset_alpha=0.5)
    assert align(loss_type="hinge", offset_alpha=0.5).offset_alpha == 0.5


def test_other_stages_have_no_loss_to_choose():
    config = load_config({"stage": "KTO", "loss_type": "exo", "reference_free": False})
    assert any("loss_type" in text and "KTO" in text for text in config.notices)
