"""How much memory a forward and a backward pass hold at once, by walking through their operators on paper.

An operator reads values and makes one; it keeps some for its backward pass and gives gradients there. A value lives
while an operator to come reads it or a recorded one keeps it, a gradient from where it is made to where it is used.
What is counted is what Paddle's allocator counts: the bytes of tensors. Knows nothing of models (activations.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Value:
    """A tensor of a forward pass. `learns` says whether a gradient flows into it."""

    num_bytes: int
    learns: bool = False


@dataclass
class Operator:
    """One step of a forward pass; sizes in bytes.

    `trains` are the parameters that get a gradient here, by name; `forward` and `backward` what it needs, while it runs
    there, beside what it reads and makes. `passes` says that its product's gradient is handed on as its first input's.
    `inner` is what it recomputes in its backward pass.
    """

    reads: Sequence[Value]
    makes: Value
    keeps: Sequence[Value]
    trains: Mapping[str, int]
    forward: int = 0
    backward: int = 0
    passes: bool = False
    inner: Tape | None = None

    @property
    def beside(self) -> int:
        """What it makes beside its product to keep it; unrecorded, it is there while it runs."""
        return sum(value.num_bytes for value in self.keeps if value is not self.makes and value not in self.reads)


@dataclass
class Peak:
    """The most that is held at once, and what of it are values, gradients of parameters, and the rest."""

    total: int = 0
    values: int = 0
    gradients: int = 0

    def see(self, values: int, *, gradients: Mapping[str, int], more: int = 0) -> None:
        """Take note of a moment."""
        held = sum(gradients.values())
        if values + held + more > self.total:
            self.total, self.values, self.gradients = values + held + more, values, held


@dataclass
class Tape:
    """Operators in the order of the forward pass; `held` are bytes that live to the end of the step."""

    operators: list[Operator] = field(default_factory=list)
    held: int = 0

    def add(
        self, *reads: Value, makes: int, keeps: Sequence[Value] = (), product: bool = False, beside: int = 0,
        trains: Mapping[str, int] | None = None, forward: int = 0, backward: int = 0, passes: bool = False,
    ) -> Value:  # fmt: skip
        """Write down an operator and return its product, which it keeps if `product` says so; `beside` are bytes that
        it keeps of its own."""
        made = Value(makes, learns=bool(trains) or any(value.learns for value in reads))
        kept = [*keeps, *([made] if product else []), *([Value(beside)] if beside else [])]
        self.operators.append(Operator(reads, made, kept, trains or {}, forward, backward, passes))
        return made

    def add_recomputed(self, *reads: Value, inner: Tape) -> Value:
        """Write down an operator that keeps what it reads, and runs `inner` again in its backward pass."""
        product = inner.operators[-1].makes
        made = Value(product.num_bytes, product.learns)
        self.held += inner.held
        self.operators.append(Operator(reads, made, reads, {}, inner=inner))
        return made

    def kept(self) -> int:
        """Bytes that the recorded operators keep between the passes, each value once."""
        values = {id(value): value.num_bytes for op in self.operators if op.makes.learns for value in op.keeps}
        return sum(values.values())

    def trained(self) -> dict[str, int]:
        """All parameters that get a gradient."""
        found: dict[str, int] = {}
        for op in self.operators:
            found |= op.inner.trained() if op.inner else op.trains
        return found

    def walk(self, *, again: bool = False) -> Peak:
        """Both passes of a micro-batch; `again`: one that is not the step's first, so that all gradients are there."""
        peak = Peak()
        self._pass(peak, self.held, gradients=self.trained() if again else {})
        return peak

    def _pass(self, peak: Peak, live: int, *, gradients: dict[str, int]) -> None:
        keepers: Counter[int] = Counter()
        live = self._forward(peak, live, gradients=gradients, keepers=keepers)
        self._backward(peak, live, gradients=gradients, keepers=keepers)

    def _forward(
        self, peak: Peak, live: int, *, gradients: dict[str, int], keepers: Counter[int], record: bool = True
    ) -> int:
        """Bytes that live after the pass. `keepers` counts who keeps a value; nobody does if nothing is recorded."""
        readers = Counter(id(value) for op in self.operators for value in op.reads)
        own = {id(op.makes) for op in self.operators}  # what comes from outside lives there
        for op in self.operators:
            live += op.makes.num_bytes
            if op.inner:
                op.inner._forward(peak, live, gradients=gradients, keepers=Counter(), record=False)
            recorded = record and op.makes.learns
            for value in op.keeps if recorded else ():
                known = readers[id(value)] or keepers[id(value)] or value is op.makes
                live += 0 if known else value.num_bytes
                keepers[id(value)] += 1
            inside = 0 if recorded else op.beside
            peak.see(live, gradients=gradients, more=op.forward + inside)
            for value in op.reads:
                readers[id(value)] -= 1
                needed = readers[id(value)] or keepers[id(value)] or id(value) not in own
                live -= 0 if needed else value.num_bytes
        return live

    def _backward(self, peak: Peak, live: int, *, gradients: dict[str, int], keepers: Counter[int]) -> None:
        own = {id(op.makes) for op in self.operators}
        waiting: set[int] = set()  # values whose gradient is there
        for op in reversed([op for op in self.operators if op.makes.learns]):
            asked = [value for value in op.reads if value.learns]
            if op.inner:
                op.inner._pass(peak, live, gradients=gradients)
            new = sum(value.num_bytes for value in (asked[1:] if op.passes else asked))
            peak.see(live + new, gradients=gradients, more=sum(op.trains.values()) + op.backward)
            live += sum(value.num_bytes for value in asked if id(value) not in waiting)
            live -= op.makes.num_bytes if id(op.makes) in waiting else 0
            waiting |= {id(value) for value in asked}
            gradients.update(op.trains)
            for value in op.keeps:
                keepers[id(value)] -= 1
                outside = id(value) not in own and value in op.reads
                live -= 0 if keepers[id(value)] or outside else value.num_bytes
        peak.see(live, gradients=gradients)
