"""Chat over a pipe, evaluation with figures of the answers, and the self-test: through the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from erniekit.checkpoint.create import create
from erniekit.cli.main import main
from erniekit.data.rendering import named_template
from tests.end_to_end.conftest import write_rows

QUESTIONS = {"red or sun?": "red", "up, left or moon?": "blue", "天地": "地天"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config of a run that has learnt its three answers by heart."""
    folder = tmp_path_factory.mktemp("answers")
    rows = [{"src": [question], "tgt": [answer]} for question, answer in QUESTIONS.items()]
    train = write_rows(folder / "train.jsonl", rows * 8)
    write_rows(folder / "one.jsonl", rows[:2])
    write_rows(folder / "two.jsonl", [rows[2], {"src": ["red or sun?"], "tgt": ["red blue"]}])
    create("micro-moe", folder / "model", tokenizer_texts=[train])
    config = folder / "run.yaml"
    config.write_text(
        f"model_name_or_path: {folder / 'model'}\ntrain_dataset_path: {train}\noutput_dir: {folder / 'out'}\n"
        f"eval_dataset_path: {folder / 'one.jsonl'},{folder / 'two.jsonl'}\nstage: SFT\nfine_tuning: Full\n"
        "max_seq_len: 32\npacking: false\nbatch_size: 8\nmax_steps: 80\nlearning_rate: 5e-3\nseed: 3\n"
        "lr_scheduler_type: constant\nsave_strategy: 'no'\ntemperature: 0\nmax_new_tokens: 12\n"
    )
    assert main(["train", str(config)]) == 0
    return config


@pytest.fixture
def talk(run, monkeypatch, trained):
    """Talk to the trained model: talk("line", ...) -> (stdout's lines, stderr)."""

    def talk(*lines, keys=()):
        import io

        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        out, err = run("chat", trained, *keys)
        return out.splitlines(), err

    return talk


def test_chat_over_a_pipe_with_commands(talk, tmp_path):
    file = tmp_path / "talk.jsonl"
    lines = ["red or sun?", "/nonsense", "/reset", "up, left or moon?", "", "/set top_p 7", "/undo", "天地"]
    out, err = talk(*lines, f"/save {file}", "/help")
    assert out == ["red", "blue", "地天"]
    assert "error: unknown command '/nonsense'" in err and "too large" in err and "/retry" in err
    messages = json.loads(file.read_text())["messages"]
    assert messages == [{"role": "user", "content": "天地"}, {"role": "assistant", "content": "地天"}]


def test_chat_is_one_process_whatever_the_degrees(talk, run, trained, monkeypatch):
    out, err = talk("red or sun?", keys=("tensor_parallel_degree=2", "expert_parallel_degree=2"))
    assert out == ["red"]
    assert "tensor_parallel_degree: 2, expert_parallel_degree: 2 without effect" in err
    place = {"PADDLE_TRAINERS_NUM": "2", "PADDLE_TRAINER_ID": "1", "PADDLE_MASTER": "127.0.0.1:1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert "`chat` is one process, and this is one of 2" in run("chat", trained, code=2)[1]


def test_sampled_answers_follow_from_the_seed(talk):
    asked = ["red or sun?", "/reset", "red or sun?", "/retry"]
    keys = ("temperature=1.8", "top_p=1", "seed=11")
    first, again = talk(*asked, keys=keys)[0], talk(*asked, keys=keys)[0]
    other = talk(*asked, keys=("temperature=1.8", "top_p=1", "seed=12"))[0]
    assert first == again != other
    assert first[0] != first[1], "the second answer is another draw"


def test_a_message_with_a_slash_and_a_system_message(talk, tmp_path):
    file = tmp_path / "talk.jsonl"
    talk("//help", f"/save {file}", keys=("system_prompt=Be brief.",))
    said = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in said[:2]] == ["Be brief.", "/help"]


def test_what_is_too_long_is_told_and_forgotten(talk, monkeypatch):
    out, err = talk("x " * 9000, "red or sun?")
    assert out == ["red"]
    assert "error: the conversation has" in err


def test_tools_are_called_and_their_results_asked_for(talk, monkeypatch, tmp_path):
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>\n'
    answers = iter([f"look it up\n</think>\n\nI ask.\n{call}", "\n</think>\n\n<response>\n20!\n</response>\n"])
    seen = []

    def stream(model, tokenizer, messages, *, tools, **options):
        seen.append(([dict(message) for message in messages], tools, options["variables"]))
        yield from next(answers)

    monkeypatch.setattr("erniekit.recipes.chat.stream_answer", stream)
    monkeypatch.setattr("erniekit.recipes.chat.choose_template", lambda *_: named_template("ernie_thinking"))
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    out, err = talk(f"/tools {tmp_path / 'tools.json'}", "how warm?", '{"t": 20}', keys=("enable_thinking=true",))
    assert out == [
        "<think>", "look it up", "</think>", "I ask.", "<tool_call>", '{"name": "f", "arguments": {"x": 1}}',
        "</tool_call>", "20!",
    ]  # fmt: skip
    assert "f was called; the next line is its result" in err
    messages, tools, variables = seen[1]
    assert tools == [{"name": "f"}] and variables == {"enable_thinking": True}
    assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
    assert messages[1:] == [
        {
            "role": "assistant", "content": "I ask.", "reasoning_content": "look it up",
            "tool_calls": [{"name": "f", "arguments": {"x": 1}}],
        },
        {"role": "tool", "content": '{"t": 20}', "name": "f"},
    ]  # fmt: skip


def test_tools_need_a_template_with_a_place_for_them(talk, tmp_path):
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    out, err = talk(f"/tools {tmp_path / 'tools.json'}", "red or sun?")
    assert out == ["red"] and "has no place for tools" in err


def test_an_interrupt_stops_the_answer_and_not_the_chat(trained, tmp_path):
    keys = ["max_new_tokens=4000", "min_tokens=4000", "temperature=0"]
    with subprocess.Popen(
        [sys.executable, "-m", "erniekit", "chat", str(trained), *keys], cwd=os.getcwd(), text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may ignore it
    ) as chat:  # fmt: skip
        chat.stdin.write("red or sun?\n")
        chat.stdin.flush()
        assert chat.stdout.read(3)  # the answer has begun
        time.sleep(0.2)
        chat.send_signal(signal.SIGINT)
        _, err = chat.communicate(f"/save {tmp_path / 'talk.jsonl'}\n", timeout=60)
    assert chat.returncode == 0 and "note: stopped." in err and "Traceback" not in err
    user, answer = json.loads((tmp_path / "talk.jsonl").read_text())["messages"]
    assert user["content"] == "red or sun?" and answer["content"].startswith("red")


def figures(out):
    found = re.findall(r"^([a-z]\S*)\s+([\d.,]+)$", out, re.M)
    return {name: float(value.replace(",", "")) for name, value in found}


def test_eval_measures_its_answers(trained, run):
    folder = trained.parent
    out, err = run("eval", trained, f"model_name_or_path={folder / 'out'}", "eval_generate=-1", "batch_size=3")
    found = figures(out)
    assert "answers to 4 prompts, 3 at a time; greedy" in err
    assert (found["answers"], found["exact_match"]) == (4, 0.75)
    assert found["rouge_l"] == pytest.approx((3 + 2 / 3) / 4, abs=1e-6)
    assert (found["exact_match/one"], found["exact_match/two"], found["answers/two"]) == (1, 0.5, 2)
    assert "prompt:    天地\nreference: 地天\nanswer:    地天\n" in out
    written = json.loads((folder / "out" / "eval" / "metrics.json").read_text())
    assert {name: pytest.approx(value, abs=1e-3) for name, value in written.items()} == found
    rows = [json.loads(line) for line in (folder / "out" / "eval" / "answers.jsonl").open()]
    assert [row["exact_match"] for row in rows] == [1, 1, 1, 0]
    assert rows[3]["name"].endswith("two.jsonl:2") and rows[3]["reference"]["content"] == "red blue"


def test_eval_compares_calls(trained, run, tmp_path, monkeypatch):
    call = {"name": "f", "arguments": {"x": 1}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    rest = [{"role": "tool", "content": "1"}, {"role": "assistant", "content": "one"}]
    row = {"messages": [*messages, *rest], "tools": [{"name": "f"}]}
    file = write_rows(tmp_path / "calls.jsonl", [row, row])
    right = "\n</think>\n\n\n<tool_call>\n" + json.dumps(call) + "\n</tool_call>\n"
    answers = [right, "\n</think>\n\n<response>\none\n</response>\n", right.replace("1", "2"), right]
    monkeypatch.setattr("erniekit.recipes.evaluate.generate_batch", lambda *_, **__: answers)
    keys = (f"eval_dataset_path={file}", "eval_dataset_type=chatml", "chat_template=ernie_thinking", "max_seq_len=400")
    out, _ = run("eval", trained, *keys, f"output_dir={tmp_path / 'out'}", "eval_generate=-1")
    found = figures(out)
    assert (found["tool_rows"], found["tool_name_accuracy"], found["tool_call_accuracy"]) == (2, 1, 0.5)
    assert (found["answers"], found["exact_match"], found["unasked_calls"]) == (4, 0.5, 1)


def test_eval_before_training_leaves_the_output_folder_usable(trained, run, tmp_path):
    out = tmp_path / "out"
    run("eval", trained, f"output_dir={out}")
    assert not (out / "eval" / "answers.jsonl").read_text()
    run("train", trained, f"output_dir={out}", "max_steps=1")
    assert (out / "eval" / "metrics.json").is_file()


def test_selftest(run, tmp_path):
    out, _ = run("selftest", "--keep", tmp_path / "kept")
    rows = out.splitlines()
    assert rows[0].split() == ["check", "seconds", "result"] and len(rows) == 13
    assert all("passed" in row for row in rows[1:])
    assert rows[8].endswith("passed  What color is the sky? The sky is blue.")
    assert rows[11].startswith("DPO: ") and "loss 0.69 ->" in rows[11]
    assert (tmp_path / "kept" / "whole" / "export" / "model.safetensors").is_file()
    assert "not empty" in run("selftest", "--keep", tmp_path / "kept", code=2)[1]
