"""What ranks note of themselves, and who is found to keep the others waiting."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from erniekit.parallel.pulse import Beat, Pulse, describe, last_sign_of_life, ranks_behind, read_beats


def test_a_rank_notes_where_it_is(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path / "new", rank=3)
    (beat,) = read_beats(tmp_path / "new", [3]).values()
    assert (beat.rank, beat.number, beat.step, beat.inside) == (3, 0, -1, False)
    assert beat.text(beat.at + 7) == "rank 3, before the first step, getting ready: no collective yet, for 7 s"
    with pulse.step(12):
        first = pulse.enter("all_reduce", "shard")
        (beat,) = read_beats(tmp_path / "new", [3]).values()
        assert (beat.number, beat.step, beat.inside, beat.kind, beat.where) == (1, 12, True, "all_reduce", "shard")
        assert beat.text(beat.at + 35) == "rank 3, step 12: waits in all_reduce 'shard' (number 1), for 35 s"
        second = pulse.enter("all_gather", "tensor")
        pulse.leave(first)  # a later one is under way: that is where the rank is
        assert read_beats(tmp_path / "new", [3])[3].inside
        pulse.leave(second)
        after = read_beats(tmp_path / "new", [3])[3]
    assert after.text(after.at) == "rank 3, step 12: is done with all_gather 'tensor' (number 2), for 0 s"
    assert after.at >= beat.at


def test_work_outside_steps_has_a_name(tmp_path: Path) -> None:
    pulse, phases = Pulse(tmp_path), list[str]()

    def note() -> None:
        phases.append(read_beats(tmp_path, [0])[0].phase)

    note()
    with pulse.step(1):
        note()
        with pulse.phase("keeping the step"):
            note()
        note()
    note()
    with pulse.phase("saving"):
        note()
    note()
    assert phases == ["getting ready", "", "keeping the step", "", "between steps", "saving", "between steps"]
    assert read_beats(tmp_path, [0])[0].text(0).startswith("rank 0, step 1, between steps: ")


def test_ranks_that_noted_nothing_are_left_out(tmp_path: Path) -> None:
    Pulse(tmp_path, rank=1)
    (tmp_path / "rank-2.pulse").write_bytes(b"half a record")
    (tmp_path / "rank-3.pulse").write_bytes(bytes((tmp_path / "rank-1.pulse").stat().st_size))
    assert list(read_beats(tmp_path, range(4))) == [1]
    Pulse().enter("all_reduce", "world")  # without a folder nothing is written, and nothing fails


def test_names_longer_than_their_place_are_cut(tmp_path: Path) -> None:
    pulse = Pulse(tmp_path)
    pulse.enter("meet", "ä" * 100)
    assert read_beats(tmp_path, [0])[0].where.startswith("ä" * 30)


@pytest.mark.parametrize(
    ("places", "behind"),
    [
        ({0: (5, True), 1: (4, False), 2: (5, True)}, [1]),  # the usual hang: one never came
        ({0: (5, True), 1: (5, False)}, [0]),  # the others are through already
        ({0: (5, True), 1: (5, True)}, []),  # all are in it: nobody is behind, the network is
        ({0: (5, True), 1: (3, True), 2: (3, True), 3: (2, False)}, [3]),  # 1 and 2 wait for 3, and 0 for them
        ({0: (9, True), 1: (0, False), 2: (0, False)}, [1, 2]),
        ({}, []),
    ],
)
def test_who_is_behind(places: dict[int, tuple[int, bool]], behind: list[int]) -> None:
    beats = {rank: Beat(rank, place[0], 7, 100.0 + rank, place[1], "meet", "x") for rank, place in places.items()}
    assert ranks_behind(beats) == behind
    assert last_sign_of_life(beats) == max((beat.at for beat in beats.values()), default=0)
    lines = describe(beats, now=200)
    assert len(lines) == len(beats)
    assert [line.endswith("the others wait for it") for line in lines] == [i < len(behind) for i in range(len(lines))]
    for rank, line in zip(behind, lines, strict=False):
        assert line.startswith(f"rank {rank}, step 7: ") and f"for {100 - rank} s" in line


def _beat_on(folder: Path) -> None:
    pulse = Pulse(folder)
    for step in range(10**9):
        with pulse.step(step):
            kind, where = ("all_reduce", "shard") if step % 2 else ("broadcast", "expert_copies")
            pulse.leave(pulse.enter(kind, where))


def test_a_note_is_never_read_half_written_and_outlives_its_process(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_beat_on, args=(tmp_path,), daemon=True)
    process.start()
    steps = []
    while len(steps) < 3000 or len(set(steps)) < 3:
        for beat in read_beats(tmp_path, [0]).values():
            assert beat.number in (beat.step, beat.step + 1)
            if beat.number > 1:
                odd = beat.number % 2 == 0  # of the step in which it was noted
                assert (beat.kind, beat.where) == (("all_reduce", "shard") if odd else ("broadcast", "expert_copies"))
            steps.append(beat.step)
    process.kill()
    process.join()
    assert read_beats(tmp_path, [0])[0].step >= steps[-1]


def test_the_reader_needs_no_paddle() -> None:
    code = "import erniekit.parallel.pulse, sys; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
