"""The reference of preference losses: log-probabilities of answers under the model as the run began with it.

No second model stands in memory. Where the numbers come from:

    all weights are trained   from a table, made before the first step and kept in a file by content (`Table`)
    adapters on a base        from the model itself with its adapters off
    adapters of `lora_path`   from the model with a copy of these adapters in place of the trained ones
    ref_model_update_steps N  after every N steps, from a copy of what is trained, as it was then

A copy takes as much host memory as what is trained does (all weights, or the adapters), is swapped in for a forward
pass and is part of checkpoints. Every forward here is made without gradients and without dropout. Which of the four a
run needs is said in recipes/preference.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle

from erniekit.adapters.lora import adapters_off
from erniekit.base.console import warn
from erniekit.base.errors import CheckpointError
from erniekit.base.files import atomic_write
from erniekit.data.batch import NO_ANSWER, PreferenceBatch
from erniekit.models.decoder import ErnieForCausalLM
from erniekit.parallel.mesh import Mesh
from erniekit.training.preference import Reference, answer_log_probs
from erniekit.training.ranks import anybody

_VERSION = 1  # of how log-probabilities are computed
_SAVE_SECONDS = 120.0  # a table that takes long is kept piece by piece
_DIGEST = 16  # bytes
_KINDS = 3  # of answers: chosen, rejected, mismatched
_BIAS = "e_score_correction_bias"  # moves without a gradient (training/router.py)


# ---------------------------------------------------------------------- from the model itself
def base_log_probs(model: ErnieForCausalLM, batch: PreferenceBatch) -> paddle.Tensor:
    """Of the base that the model's adapters stand on, [A]."""
    with adapters_off(model):
        return answer_log_probs(model, batch)


class PolicyCopy:
    """A copy of what is trained of a model. Empty until `take` is called."""

    def __init__(self, model: ErnieForCausalLM, *, every: int = 0) -> None:
        """As a hook before steps, it is taken anew after every `every` steps; 0: never."""
        self._every = every
        self._trained = {n: p for n, p in model.named_parameters() if not p.stop_gradient or n.endswith(_BIAS)}
        self._held: dict[str, paddle.Tensor] = {}

    @property
    def taken(self) -> bool:
        """Whether there is a copy."""
        return bool(self._held)

    def take(self) -> None:
        """Copy the weights as they are now."""
        self._held = {name: _on_host(p) for name, p in self._trained.items()}

    def before_step(self, step: int) -> None:
        """The 0-based `step` is about to begin."""
        if self._every > 0 and step and step % self._every == 0:
            self.take()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, the model has the copied weights, and afterwards its own again, bit for bit. Nothing that was
        computed before may be differentiated through afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @paddle.no_grad()
    def _swap(self) -> None:
        for name, held in self._held.items():
            p = self._trained[name]
            self._held[name] = _on_host(p)  # tensor by tensor: never are both held twice
            p.copy_(held, True)

    def state(self) -> dict[str, paddle.Tensor]:
        """The copied weights; see training.state.Memory."""
        return dict(self._held)

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` returned."""
        self._held = {
            name: _on_host(paddle.to_tensor(np.array(state[name], np.float32)).astype(p.dtype))
            for name, p in self._trained.items()
        }  # fmt: skip


def _on_host(p: paddle.Tensor) -> paddle.Tensor:
    return p.detach()._copy_to(paddle.CPUPlace(), True)


@dataclass(frozen=True)
class Follower:
    """A reference that is `start` until a copy of the policy is taken."""

    start: Reference
    copy: PolicyCopy

    def __call__(self, model: ErnieForCausalLM, batch: PreferenceBatch) -> paddle.Tensor:
        """Log-probabilities of the batch's answers, [A]."""
        if not self.copy.taken:
            return self.start(model, batch)
        with self.copy.in_place():
            return answer_log_probs(model, batch)


# ---------------------------------------------------------------------- from a table
class Table:
    """Log-probabilities under one model by the content of a sample: of its chosen, rejected and mismatched answer, NaN
    where it has none. Callable as a Reference for batches that it was filled with."""

    def __init__(self, path: Path | None) -> None:
        """`path` is where earlier runs kept theirs and this one will; None: nothing is kept."""
        self._path, self._saved_at = path, time.monotonic()
        self._values: dict[bytes, np.ndarray] = {}
        if path is not None and path.is_file():
            try:
                with np.load(path) as stored:
                    keys, values = stored["keys"], stored["values"]
                self._values = {key.tobytes(): value for key, value in zip(keys, values, strict=True)}
            except (OSError, ValueError, KeyError, zipfile.BadZipFile):
                warn(f"{path} is damaged: the log-probabilities of the reference are computed anew.")

    def __call__(self, _model: ErnieForCausalLM, batch: PreferenceBatch) -> paddle.Tensor:
        """Log-probabilities of the batch's answers, fp64 [A]."""
        found = np.zeros(batch.num_answers)
        values = np.stack([self._values[key] for key in _digests(batch)])
        for column, answers in enumerate(_kinds(batch)):
            there = answers != NO_ANSWER
            found[answers[there]] = values[there, column]
        return paddle.to_tensor(found)

    def fill(
        self, batches: Iterable[PreferenceBatch], *, model: Callable[[], ErnieForCausalLM], mesh: Mesh = Mesh.single()
    ) -> int:  # fmt: skip
        """Compute what is not known yet with the model that `model` gives, which is asked for only then; returns of how
        many samples that was.

        A batch with one unknown sample is computed whole, so that what comes out does not depend on where an earlier
        life of the run was cut.

        Each data rank has equally many batches, and all compute where one has to, because they may need each other; in
        the end every rank knows what all have computed, and rank 0 keeps it.
        """
        num_computed, worked_on = 0, dict[bytes, None]()
        for batch in batches:
            keys = list(_digests(batch))
            unknown = sum(key not in self._values for key in keys)
            if anybody(mesh, does=unknown > 0):
                values = _by_sample(answer_log_probs(model(), batch).numpy(), batch)
                for key, value in zip(keys, values, strict=True):
                    self._values.setdefault(key, value)
                worked_on |= dict.fromkeys(keys)
                num_computed += unknown if batch.counts else 0
                if mesh.first and time.monotonic() - self._saved_at > _SAVE_SECONDS:
                    self._save()
        num_computed = self._put_together(mesh, num_computed, worked_on=list(worked_on))
        if num_computed and mesh.first:
            self._save()
        return num_computed

    def _put_together(self, mesh: Mesh, num_computed: int, *, worked_on: list[bytes]) -> int:
        """Tell the other data ranks of what was worked on here, and learn of theirs; of how many samples in all."""
        data = mesh.axis("data")
        if data.size == 1:
            return num_computed
        told = data.all_gather(paddle.to_tensor([[len(worked_on), num_computed]], "int64"))
        sizes = told[:, 0].tolist()
        if sum(sizes):
            keys = np.frombuffer(b"".join(worked_on), np.uint8).reshape([-1, _DIGEST])
            values = np.array([self._values[key] for key in worked_on]).reshape([-1, _KINDS])
            all_keys = data.gather_uneven(paddle.to_tensor(keys), sizes).numpy()
            all_values = data.gather_uneven(paddle.to_tensor(values, "float64"), sizes).numpy()
            for key, value in zip(all_keys, all_values, strict=True):
                self._values.setdefault(key.tobytes(), value)
        return int(told[:, 1].sum())

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        if self._path is None:
            return
        keys = np.frombuffer(b"".join(self._values), np.uint8).reshape([len(self._values), -1])
        buffer = io.BytesIO()
        np.savez(buffer, keys=keys, values=np.stack(list(self._values.values())))
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._path, buffer.getvalue())
        except (OSError, CheckpointError) as error:
            warn(f"{self._path} cannot be written ({error}): the reference is not kept for the next run.")


def table_name(*facts: str | Mapping[str, str]) -> str:
    """The name of the file for log-probabilities that depend on `facts` beside the samples."""
    return f"reference-{hashlib.sha256(json.dumps([_VERSION, *facts], sort_keys=True).encode()).hexdigest()[:32]}.npz"


def _kinds(batch: PreferenceBatch) -> Sequence[np.ndarray]:
    return batch.chosen, batch.rejected, batch.mismatched


def _by_sample(logps_A: np.ndarray, batch: PreferenceBatch) -> np.ndarray:
    values = np.full([len(batch.samples), len(_kinds(batch))], np.nan)
    for column, answers in enumerate(_kinds(batch)):
        there = answers != NO_ANSWER
        values[there, column] = logps_A[answers[there]]
    return values


def _digests(batch: PreferenceBatch) -> Iterator[bytes]:
    """A hash of the content of each sample: its tokens, what is asked for where, and which branch is which."""
    places = [
        (row, batch.segment_ids[row] == segment)
        for row in range(len(batch.segment_ids))
        for segment in range(1, int(batch.segment_ids[row].max()) + 1)
    ]
    for number, (row, here) in enumerate(places):
        answers = batch.answer_ids[row, here]
        first = answers[answers != NO_ANSWER].min()
        branches = [kind[number] - first if kind[number] != NO_ANSWER else NO_ANSWER for kind in _kinds(batch)]
        relative = np.where(answers == NO_ANSWER, NO_ANSWER, answers - first)
        content = hashlib.sha256()
        for part in (batch.input_ids[row, here], batch.labels[row, here], relative, branches):
            content.update(np.asarray(part, np.int64).tobytes())
        yield content.digest()[:_DIGEST]
