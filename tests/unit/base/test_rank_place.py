"""Which rank a process is, as launchers say it."""

from __future__ import annotations

import pytest

from erniekit.base.errors import MeshError
from erniekit.base.runtime import Place, rank_place

NAMES = ("PADDLE_TRAINERS_NUM", "PADDLE_TRAINER_ID", "PADDLE_MASTER", "PADDLE_TRAINER_ENDPOINTS")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch):
    for name in (*NAMES, "PADDLE_CURRENT_ENDPOINT", "POD_IP"):
        monkeypatch.delenv(name, raising=False)

    def tell(**variables: str) -> Place:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return rank_place()

    return tell


def test_a_process_by_itself_is_alone(told) -> None:
    assert told() == Place(rank=0, world=1)
    assert told(PADDLE_TRAINERS_NUM="1", PADDLE_TRAINER_ID="0") == Place()


def test_a_launched_process_knows_its_place(told) -> None:
    variables = {"PADDLE_TRAINERS_NUM": "4", "PADDLE_TRAINER_ID": "3", "PADDLE_MASTER": "10.0.0.1:4000"}
    assert told(**variables) == Place(3, 4, "10.0.0.1:4000", "127.0.0.1")
    assert told(PADDLE_CURRENT_ENDPOINT="10.0.0.2:4001").host == "10.0.0.2"


def test_without_a_master_rank_0_is_the_first_endpoint(told) -> None:
    place = told(PADDLE_TRAINERS_NUM="2", PADDLE_TRAINER_ID="1", PADDLE_TRAINER_ENDPOINTS="a:1,b:2")
    assert place.master == "a:1"


@pytest.mark.parametrize(
    "variables",
    [
        {"PADDLE_TRAINER_ID": "2", "PADDLE_MASTER": "a:1"},
        {"PADDLE_TRAINER_ID": "x", "PADDLE_MASTER": "a:1"},
        {"PADDLE_TRAINER_ID": "1"},
        {"PADDLE_TRAINER_ID": "1", "PADDLE_MASTER": "a"},
        {"PADDLE_MASTER": "a:1"},
    ],
)
def test_half_a_place_is_refused(told, variables: dict[str, str]) -> None:
    with pytest.raises(MeshError, match="PADDLE_TRAINERS_NUM=2"):
        told(PADDLE_TRAINERS_NUM="2", **variables)
