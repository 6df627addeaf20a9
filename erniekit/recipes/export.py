"""`export`: the finished model of a run, in PT (Hugging Face) or -Paddle layout, in `output_dir`/export."""

from __future__ import annotations

from pathlib import Path

from erniekit.base.errors import ConfigError
from erniekit.checkpoint.convert import convert
from erniekit.config.readiness import require_ready
from erniekit.config.run import RunConfig


def export(cfg: RunConfig, *, to: str = "pt", out: str | Path | None = None) -> Path:
    """Write the trained model with tokenizer, config and generation config; returns the new folder."""
    require_ready(cfg, "export")
    assert cfg.train.output_dir  # require_ready saw to it
    run = Path(cfg.train.output_dir)
    if not (run / "config.json").is_file():
        raise ConfigError(_unfinished(run))
    target = Path(out) if out else run / "export"
    convert(run, target, to=to)
    print(f"exported {run} to {target} ({to} layout)", flush=True)
    return target


def _unfinished(run: Path) -> str:
    if not run.is_dir():
        return f"output_dir {run} does not exist: there is nothing to export. Train first."
    saved = sorted((p for p in run.glob("checkpoint-*") if p.is_dir()), key=lambda p: int(p.name.rsplit("-", 1)[1]))
    if not saved:
        return f"output_dir {run} holds no finished model and no checkpoint: there is nothing to export."
    return (
        f"output_dir {run} holds no finished model. Finish the run (the same train command resumes it), or convert its "
        f"newest checkpoint: erniekit convert {saved[-1]} {run / 'export'} --to pt"
    )
