"""Supervisors of several machines talk to each other: they find together, and one's bad news reaches all.

The supervisor of machine 0 listens at MASTER_ADDR:MASTER_PORT, the others call it: a star. A line of JSON is a message.
Before ranks start, everybody says who he is, and is told where rank 0 will listen. Later a beat a second shows that
a machine is alive, and carries what it sees of its ranks; machine 0 may ask about one. A failure goes to machine 0,
which waits a moment for others, picks the first one, and tells all. Without this a rank that waits for others (who
tokenise, save, evaluate) would wait for ever for a machine that is gone.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from erniekit.base.errors import MeshError
from erniekit.base.ports import hold_port

_COMING = 300.0  # seconds for all machines to start
_NAMES = 30.0  # seconds for the name of machine 0 to be known
_ANY = -1  # a machine that wants to be told its number
_NOTICE = 10.0  # after which the user is told what is waited for
_BEAT, _SILENCE = 1.0, 6.0  # seconds from beat to beat, and without one until a machine counts as lost
_SETTLE = 1.0  # for machine 0 to hear of failures elsewhere that came first
_VERDICT = 4.0  # for the others to hear which one it was
_TICK = 0.05
_HOME = "127.0.0.1"
_LONGEST = 1 << 20  # bytes of a message


class Bad:
    """A failure somewhere, of a rank or (-1) of none: `order` sorts failures, with the first, and so the cause,
    smallest."""

    def __init__(self, text: str, code: int, *, order: tuple[int, float], machine: int, rank: int = -1) -> None:
        self.text, self.code, self.order, self.machine, self.rank = text, code, order, machine, rank

    def message(self) -> dict[str, Any]:
        """As it is sent: clocks of machines differ, so the time is an age."""
        weight, at = self.order
        where = {"from": self.machine, "rank": self.rank}
        return {"text": self.text, "code": self.code, "weight": weight, "age": time.time() - at, **where}

    @classmethod
    def of(cls, message: Mapping[str, Any]) -> Bad:
        """The failure that a message tells of."""
        order = (message["weight"], time.time() - message["age"])
        return cls(message["text"], message["code"], order=order, machine=message["from"], rank=message["rank"])


class Wire:
    """A connection to another supervisor."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._buffer, self._early = connection, b"", list[dict[str, Any]]()
        self.is_open, self.is_done, self.heard = True, False, time.monotonic()
        connection.setblocking(False)

    def send(self, message: Mapping[str, Any]) -> None:
        """Messages are short, so that they fit into the system's buffer at once."""
        try:
            self._connection.setblocking(True)
            self._connection.settimeout(_BEAT)
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_open = False
        finally:
            self._connection.setblocking(False)

    def receive(self) -> list[dict[str, Any]]:
        """What has come since."""
        early, self._early = self._early, []
        if early:
            return early
        while self.is_open:
            try:
                piece = self._connection.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                piece = b""
            self.is_open = bool(piece) and len(self._buffer) < _LONGEST
            self._buffer += piece
        *lines, self._buffer = self._buffer.split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:  # not one of ours
            self.is_open, found = False, []
        if found:
            self.heard = time.monotonic()
        return found

    def next(self, *, deadline: float) -> dict[str, Any] | None:
        """The next message; None if none comes in time."""
        while time.monotonic() < deadline and self.is_open:
            if found := self.receive():
                self._early = found[1:]
                return found[0]
            time.sleep(_TICK)
        return None

    def close(self) -> None:
        """Say goodbye."""
        self._connection.close()


class Machines:
    """The other machines of a job, as machine `number` sees them: all of them for machine 0, machine 0 for the others.

    `hosts` are the names of all; `master` is where rank 0 will listen. `asked` is the signal by which the user of
    another machine asked to stop, `verdict` the failure that the job ends for; machine 0 puts before its text what
    `explain` says of the rank that failed. `held` keeps the port of `master` for rank 0, which takes seconds to come
    up. `news` is what the other machines said last of their ranks, and when; `questions` are the ranks that machine 0
    asks about, `answers` what it was told.
    """

    def __init__(
        self, number: int, wires: Mapping[int, Wire], *, hosts: list[str], master: str,
        held: socket.socket | None = None,
    ) -> None:  # fmt: skip
        self.number, self.hosts, self.master, self.asked, self._held = number, hosts, master, 0, held
        self.verdict: Bad | None = None
        self.explain: Callable[[int], str] = lambda _: ""
        self.news: dict[int, tuple[list[dict[str, Any]], float]] = {}
        self.questions: list[int] = []
        self.answers: dict[int, str] = {}
        self._wires, self._bad, self._beaten = wires, list[Bad](), 0.0

    @classmethod
    def alone(cls, port: int = 0) -> Machines:
        """A job of one machine; `port` is where rank 0 is to listen, 0: anywhere. Raises MeshError if it is taken."""
        if port:
            _listener(port, backlog=1).close()
        held = hold_port(port)
        return cls(0, {}, hosts=[_HOME], master=_address(_HOME, held), held=held)

    def beat(self, news: Sequence[Mapping[str, Any]] = ()) -> None:
        """A sign of life, with what is seen of the ranks here."""
        self._beaten = time.monotonic()
        self._tell({"say": "beat", "news": [] if self.number == 0 else list(news)})

    def ask(self, machine: int, rank: int) -> str:
        """What another machine says of where a rank of its own stands; "" if it does not say."""
        self.beat()  # nobody is to miss us while we wait
        self._wires[machine].send({"say": "where", "rank": rank})
        deadline = time.monotonic() + _VERDICT
        while rank not in self.answers and time.monotonic() < deadline:
            self._hear()
            time.sleep(_TICK)
        return self.answers.get(rank, "")

    def answer(self, rank: int, text: str) -> None:
        """Tell machine 0 where a rank stands."""
        self._tell({"say": "there", "rank": rank, "text": text})

    def poll(self) -> Bad | None:
        """Hear the others. Returns what the job has to end for."""
        if time.monotonic() - self._beaten > _BEAT:
            self.beat()
        self._hear()
        for number, wire in self._wires.items():
            if not wire.is_done and (problem := _lost(wire)):
                wire.is_done = True
                text = f"error: machine {number} {problem}."
                self._bad.append(Bad(text, 1, order=(0, time.time()), machine=number))
        return self.verdict if self.verdict or not self._bad else self.settle()

    def pass_on(self, signal: int, *, besides: int = -1) -> None:
        """Let the others know that the user asked to stop."""
        self._tell({"say": "asked", "signal": signal}, besides=besides)

    def settle(self, own: Bad | None = None) -> Bad:
        """Find the first failure of all machines; `own` is that of this one."""
        if own:
            self._bad.append(own)
            if self.number:
                self._tell({"say": "bad", **own.message()})
        deadline = time.monotonic() + (_VERDICT if self.number else _SETTLE)
        while self._wires and time.monotonic() < deadline and not self.verdict:
            self._hear()
            time.sleep(_TICK)
        self.verdict = self.verdict or min(self._bad, key=lambda bad: bad.order)
        if self.number == 0:
            self.verdict.text = self.explain(self.verdict.rank) + self.verdict.text
            self._tell({"say": "verdict", **self.verdict.message()})
        return self.verdict

    def leave(self) -> None:
        """The ranks of this machine are done."""
        self._tell({"say": "done"})
        for wire in self._wires.values():
            wire.close()
        if self._held:
            self._held.close()

    def _hear(self) -> None:
        for number, wire in self._wires.items():
            for message in wire.receive():
                said = message.get("say")
                if said == "beat" and message["news"]:
                    self.news[number] = (message["news"], time.time())
                elif said == "asked" and not self.asked:
                    self.asked = message["signal"]
                    self.pass_on(self.asked, besides=number)
                elif said == "where":
                    self.questions.append(message["rank"])
                elif said == "there":
                    self.answers[message["rank"]] = message["text"]
                elif said == "bad":
                    self._bad.append(Bad.of(message))
                elif said == "verdict":
                    self.verdict = Bad.of(message)
                elif said == "done":
                    wire.is_done = True

    def _tell(self, message: Mapping[str, Any], *, besides: int = -1) -> None:
        for number, wire in self._wires.items():
            if number != besides and wire.is_open:
                wire.send(message)


def _lost(wire: Wire) -> str:
    if not wire.is_open:
        return "is gone: its launcher has closed the connection"
    silent = time.monotonic() - wire.heard
    return f"has been silent for {silent:.0f} seconds" if silent > _SILENCE else ""


# ---------------------------------------------------------------------- finding together
def find(address: str, port: int, *, node: int | None, nodes: int, nproc: int) -> Machines:
    """All machines of a job. `node` is the number of this one; None: the one that `address` names is 0, the others are
    numbered as they come. Raises MeshError."""
    if node is None:
        node = 0 if _is_here(address) and _is_free(port) else _ANY
    if node == 0:
        return gather(address, port, nodes=nodes, nproc=nproc)
    return join(address, port, node=node, nodes=nodes, nproc=nproc)


def _is_here(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _is_free(port: int) -> bool:
    try:
        _listener(port, backlog=1).close()
    except MeshError:
        return False
    return True


def gather(address: str, port: int, *, nodes: int, nproc: int) -> Machines:
    """Machine 0: wait for the others. Raises MeshError if the port is taken, or not all come, or they disagree."""
    wires: dict[int, Wire] = {}
    hosts = [address] * nodes
    with _listener(port, backlog=nodes) as listener:
        for number, wire, host, said in _callers(listener, wires, nodes):
            if number == _ANY:
                number = next(each for each in range(1, nodes) if each not in wires)
            problem = ""
            if said["nproc"] != nproc:
                problem = f"machine {number} starts {said['nproc']} ranks and machine 0 {nproc}; all start as many."
            elif number in wires or not 0 < number < nodes or said["nodes"] != nodes:
                problem = f"two machines have NODE_RANK={number}, or their NNODES differ (here {nodes})."
            wires[number], hosts[number % nodes] = wire, host
            if problem:
                for each in wires.values():
                    each.send({"refused": problem})
                raise MeshError(problem)
    held = hold_port()
    master = _address(address, held)
    for number, wire in wires.items():
        wire.send({"node": number, "master": master, "hosts": hosts})
    return Machines(0, wires, hosts=hosts, master=master, held=held)


def _address(host: str, held: socket.socket) -> str:
    return f"{host}:{held.getsockname()[1]}"


def _callers(listener: socket.socket, wires: dict[int, Wire], nodes: int) -> Any:
    """(number, wire, host, what it said) of every machine that calls, until all have."""
    began, told = time.monotonic(), False
    listener.settimeout(_TICK)
    while len(wires) < nodes - 1:
        waited = time.monotonic() - began
        missing = ", ".join(str(number) for number in range(1, nodes) if number not in wires)
        if waited > _COMING:
            raise MeshError(
                f"machines {missing} did not come within {_COMING:.0f} seconds. Each of the {nodes} runs the same "
                "command with its own NODE_RANK, and MASTER_ADDR and MASTER_PORT as here."
            )
        if waited > _NOTICE and not told:
            told = True
            print(f"note: waiting for machines {missing}", file=sys.stderr, flush=True)
        try:
            connection, (host, _) = listener.accept()
        except TimeoutError:
            continue
        wire = Wire(connection)
        said = wire.next(deadline=time.monotonic() + _BEAT)
        if said and {"node", "nodes", "nproc"} <= said.keys():
            yield said["node"], wire, host, said
        else:
            wire.close()


def _listener(port: int, *, backlog: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("", port))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise MeshError(
            f"MASTER_PORT={port} cannot be had on this machine ({error.strerror}). Another job may use it; choose "
            "another one, the same on all machines."
        ) from None
    return listener


def join(address: str, port: int, *, node: int, nodes: int, nproc: int) -> Machines:
    """The other machines: call machine 0. Raises MeshError if it does not answer or refuses."""
    began = time.monotonic()
    deadline, notice = began + _COMING, began + _NOTICE
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=_SILENCE)
            break
        except OSError as error:
            if isinstance(error, socket.gaierror):  # no such name: that is known sooner
                deadline = min(deadline, began + _NAMES)
            waited = time.monotonic() - began
            if time.monotonic() > deadline:
                raise MeshError(
                    f"machine 0 does not answer at {address}:{port} ({error}), in {waited:.0f} seconds. See that "
                    f"it runs the same command (NODE_RANK=0 there), that MASTER_ADDR={address} and MASTER_PORT={port} "
                    "name it, and that no firewall stands between."
                ) from None
        if time.monotonic() > notice:
            notice = deadline
            print(f"note: waiting for machine 0 at {address}:{port}", file=sys.stderr, flush=True)
        time.sleep(_TICK)
    wire = Wire(connection)
    wire.send({"node": node, "nodes": nodes, "nproc": nproc})
    answer = wire.next(deadline=time.monotonic() + _COMING)
    if answer is None or "refused" in answer:
        why = answer["refused"] if answer else "it closed the connection, or not all machines came in time."
        raise MeshError(f"machine 0 at {address}:{port}: {why}")
    return Machines(answer["node"], {0: wire}, hosts=answer["hosts"], master=answer["master"])
