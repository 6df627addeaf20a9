"""The weights of a run: how its model comes from the base folder or a checkpoint, what of it a checkpoint holds, and
what a finished run leaves. Recipes ask here and need not know what is trained of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from erniekit.base.errors import CheckpointError
from erniekit.checkpoint.adapter_folder import AdapterFolder, mark_of
from erniekit.checkpoint.adapter_io import adapter_writer, check_base, load_adapter, save_adapter
from erniekit.checkpoint.folder import Folder
from erniekit.checkpoint.model_io import Ranges, Writer, fill_model, model_writer, save_model
from erniekit.checkpoint.save import GB
from erniekit.config.adapter import AdapterConfig
from erniekit.config.architecture import ErnieConfig
from erniekit.config.cut import Cut
from erniekit.config.run import RunConfig
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.assemble import adapter_of, assemble_model


class Weights(Protocol):
    """What recipes may ask of the weights."""

    def build(self, checkpoint: Path | None) -> ErnieForCausalLM:
        """The model that will be trained, as the base has it (None) or as a checkpoint does."""

    def save(self, model: ErnieForCausalLM, path: Path, *, final: bool, ranges: Ranges) -> None:
        """Write what was trained: exactly, for a checkpoint, or (`final`) as the run's result. All ranks call it. Of
        weights in `ranges` (training/optimizer.py) the rank has only these numbers."""

    def writer(self, model: ErnieForCausalLM, *, ranges: Ranges, copied: bool) -> Writer:
        """What writes it exactly: as it is now (`copied`, for which all ranks call it), or as it is then."""

    def refill(self, model: ErnieForCausalLM, path: Path) -> None:
        """Put what a checkpoint holds in the place of what was trained."""

    @property
    def form(self) -> str:
        """What the result is, for people."""


@dataclass(frozen=True)
class FullWeights:
    """All of a model's weights, as a model folder."""

    cfg: RunConfig
    base: Folder
    arch: ErnieConfig
    mesh: Mesh

    @property
    def layout(self) -> str:
        """The layout of what is written."""
        return self.cfg.train.save_layout or self.base.layout

    @property
    def form(self) -> str:
        """What the result is, for people."""
        return f"{self.layout} layout, {self.base.config.dtype}"

    def build(self, checkpoint: Path | None) -> ErnieForCausalLM:
        """See Weights."""
        weights = Folder.open(checkpoint) if checkpoint else self.base
        return assemble_model(weights, self.arch, self.cfg, mesh=self.mesh)

    def save(self, model: ErnieForCausalLM, path: Path, *, final: bool, ranges: Ranges) -> None:
        """See Weights; a checkpoint is in fp32."""
        if not final:
            self.writer(model, ranges=ranges, copied=False)(path, self.mesh)
            return
        save_model(
            model, path, self.layout, dtype=self.base.config.dtype, base=self.base,
            max_shard_bytes=self.cfg.export.max_shard_size * GB, team=self.mesh, ranges=ranges,
        )  # fmt: skip

    def writer(self, model: ErnieForCausalLM, *, ranges: Ranges, copied: bool) -> Writer:
        """See Weights."""
        return model_writer(
            model, self.layout, dtype="float32", base=self.base, ranges=ranges,
            copied_for=self.mesh if copied else None,
        )  # fmt: skip

    def refill(self, model: ErnieForCausalLM, path: Path) -> None:
        """See Weights."""
        fill_model(model, Folder.open(path), cut=Cut.of(self.mesh.layout, self.mesh.rank))


@dataclass(frozen=True)
class AdapterWeights:
    """Adapters on a frozen base, as an adapter folder: the base is never written."""

    cfg: RunConfig
    base: Folder
    arch: ErnieConfig
    adapter: AdapterConfig
    mesh: Mesh

    @property
    def _form(self) -> Literal["peft", "erniekit"]:
        layout = self.cfg.train.save_layout or self.base.layout
        return "peft" if layout == "pt" or self.adapter.dora else "erniekit"  # which knows no DoRA

    @property
    def form(self) -> str:
        """What the result is, for people."""
        return f"an adapter of rank {self.adapter.rank} in {'PEFT' if self._form == 'peft' else 'ERNIEKit'}'s form"

    def build(self, checkpoint: Path | None) -> ErnieForCausalLM:
        """See Weights; without a checkpoint, adapters start from lora_path if there is one.

        Raises CheckpointError if the checkpoint's adapters were trained beside other weights.
        """
        start = Path(self.cfg.lora.lora_path) if self.cfg.lora.lora_path else None
        if checkpoint:
            self._require_same_base(checkpoint)
        elif start:
            check_base(AdapterFolder.open(start), self.base)
        return assemble_model(
            self.base, self.arch, self.cfg, mesh=self.mesh, adapter=self.adapter, trained=checkpoint or start
        )

    def _require_same_base(self, checkpoint: Path) -> None:
        if AdapterFolder.open(checkpoint).base_mark != mark_of(self.base) and not self.cfg.train.resume_anyway:
            raise CheckpointError(
                f"{checkpoint}: its adapters were trained beside other weights than those of {self.base.path} now. Put "
                "the old ones back, or set resume_anyway=true to go on beside these."
            )

    def save(self, model: ErnieForCausalLM, path: Path, *, final: bool, ranges: Ranges) -> None:
        """See Weights; a checkpoint is in fp32 and in PEFT's form, which fuses nothing and so is exact."""
        if not final:
            self.writer(model, ranges=ranges, copied=False)(path, self.mesh)
            return
        save_adapter(
            model, path, config=self.adapter, form=self._form, base=self.base, dtype=self.base.config.dtype,
            team=self.mesh, ranges=ranges,
        )  # fmt: skip

    def writer(self, model: ErnieForCausalLM, *, ranges: Ranges, copied: bool) -> Writer:
        """See Weights."""
        return adapter_writer(
            model, config=self.adapter, form="peft", base=self.base, dtype="float32", ranges=ranges, copied=copied
        )  # fmt: skip

    def refill(self, model: ErnieForCausalLM, path: Path) -> None:
        """See Weights."""
        load_adapter(model, AdapterFolder.open(path), cut=Cut.of(self.mesh.layout, self.mesh.rank))


def weights_of(cfg: RunConfig, base: Folder, arch: ErnieConfig, mesh: Mesh = Mesh.single()) -> Weights:
    """The weights that the run trains; of several ranks, each has its part of them."""
    adapter = adapter_of(base, arch, cfg)
    return AdapterWeights(cfg, base, arch, adapter, mesh) if adapter else FullWeights(cfg, base, arch, mesh)
