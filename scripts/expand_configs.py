"""Writes the configs under examples/configs that are laid out like ERNIEKit's, each readable alone, from a few bases.

In examples/configs/_bases, files.txt says what each is made of and headings.yaml where a key stands. Values keep the
spelling of their base (`True`, `1`, quotes): what users of ERNIEKit bring is spelled in all these ways. A test makes
the files again and compares bytes.

    python scripts/expand_configs.py
"""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "examples" / "configs"
BASES = CONFIGS / "_bases"
VERBS = {"run_eval.yaml": "eval", "run_export.yaml": "export", "run_chat.yaml": "chat"}
EXPECT = {
    "train": "{length} of {batch_size} x {gradient_accumulation_steps} rows of up to {max_seq_len} tokens "
    "for each copy of the model; {result} in {output_dir}.",
    "eval": "loss, perplexity and token accuracy on {eval_dataset_path}.",
    "export": "the adapter merged into its base model, in {output_dir}/export.",
    "chat": "answers of up to {max_new_tokens} tokens in the terminal.",
}
NOTE = "Check:    `erniekit check FILE` lists what this version does not build yet. Not run on this hardware."


def main() -> None:
    """Write every config that files.txt lists."""
    made = configs()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    print(f"{len(made)} configs written below {CONFIGS.relative_to(ROOT)}")


def configs() -> dict[Path, str]:
    """Path and text of every config that files.txt lists."""
    lines = (BASES / "files.txt").read_text(encoding="utf-8").splitlines()
    rows = [[part.strip() for part in line.split("|")] for line in lines if not line.startswith("#")]
    return {CONFIGS / path: _config(path, bases, own, hardware) for path, bases, own, hardware in rows}


def _config(path: str, bases: str, own: str, hardware: str) -> str:
    family = next(part for part in Path(path).parts if part.startswith("ERNIE"))
    values = {"model_name_or_path": f"baidu/{family}-Paddle"}
    for base in bases.split():
        values |= _read((BASES / f"{base}.yaml").read_text(encoding="utf-8"))
    values |= _read(own.replace("=", ": ").replace(" ", "\n").replace(":\n", ": "))
    verb = VERBS.get(Path(path).name, "train")
    facts = {name: text.strip('"') for name, text in values.items()}
    if verb == "train":
        facts["result"] = "the adapter" if facts["fine_tuning"] == "LoRA" else "the trained model"
        facts["length"] = f"{facts['max_steps']} steps" if int(facts["max_steps"]) > 0 else "one epoch in steps"
    head = [
        f"# erniekit {verb} examples/configs/{path}", "#", f"# Hardware: {hardware}.", *_start(hardware, verb),
        f"# Expect:   {EXPECT[verb].format(**facts)}", f"# {NOTE}",
    ]  # fmt: skip
    groups = []
    for heading, names in yaml.safe_load((BASES / "headings.yaml").read_text(encoding="utf-8")).items():
        lines = [f"{name}: {values.pop(name)}".replace(": \n", ":\n") for name in names if name in values]
        groups += ["\n".join([f"# {heading}", *lines])] if lines else []
    if values:
        raise SystemExit(f"{path}: headings.yaml has no place for {', '.join(values)}")
    return "\n\n".join(["\n".join(head), *groups]) + "\n"


def _start(hardware: str, verb: str) -> list[str]:
    """How the ranks of a config for several devices come up; a machine has 8 of them."""
    number = int(hardware.split()[0])
    if number == 1 or verb not in ("train", "eval"):
        return []
    here = f"the command starts {number} ranks, one for each device; on a CPU add --nproc {number}"
    return [f"# Start:    {here if number <= 8 else f'on {-(-number // 8)} machines, see docs/parallel.md'}."]


def _read(text: str) -> dict[str, str]:
    """Every key of a base and its value as it is spelled there."""
    node = yaml.compose(text)
    return {} if node is None else {name.value: _spelled(value) for name, value in node.value}


def _spelled(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return f"{node.style}{node.value}{node.style}" if node.style else node.value
    assert isinstance(node, yaml.SequenceNode)
    items = [_spelled(item) for item in node.value]
    return f"[{','.join(items)}]" if node.flow_style else "".join(f"\n  - {item}" for item in items)


if __name__ == "__main__":
    main()
