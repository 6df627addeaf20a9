"""Memory, quotas and drivers, as the system's own files tell them."""

from __future__ import annotations

import pytest

from erniekit.base import resources
from erniekit.base.resources import GIB

MEMORY = "MemTotal:       16384000 kB\nMemFree:  1000 kB\nMemAvailable:    8192000 kB\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The system's files in a folder of this test's own: files(name=text)."""
    for name, file in (("_MEMORY_INFO", "meminfo"), ("_DRIVER", "driver"), ("_GROUP", "")):
        monkeypatch.setattr(resources, name, tmp_path / file)

    def write(**texts: str) -> None:
        for name, text in texts.items():
            (tmp_path / name.replace("_", ".")).write_text(text)

    return write


def test_memory_and_the_limit_of_a_container(files):
    assert resources.memory()[0] > 0  # without /proc the system is asked
    files(meminfo=MEMORY)
    assert resources.memory() == (16384000 * 1024, 8192000 * 1024)
    files(memory_max=f"{4 * GIB}\n", memory_current=f"{3 * GIB}\n")
    assert resources.memory() == (4 * GIB, GIB)
    files(memory_max="max\n")
    assert resources.memory()[0] == 16384000 * 1024


@pytest.mark.parametrize(("text", "cores"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("strange\n", None)])
def test_the_quota_of_a_container(files, text, cores):
    assert resources.quota() is None
    files(cpu_max=text)
    assert resources.quota() == cores


def test_the_driver(files):
    assert resources.driver() is None
    files(driver="NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12\n")
    assert resources.driver() == (550, 54, 15)
    files(driver="NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert resources.driver() == (580, 65, 6)
    files(driver="something else\n")
    assert resources.driver() is None


def test_gpus_as_the_tool_lists_them(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559'\necho 'Some, other, 1024'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert resources.gpus() == [
        resources.Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20), resources.Gpu("Some, other", 2**30),
    ]  # fmt: skip
    tool.write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    assert resources.gpus() == resources.capabilities() == []
    tool.write_text("#!/bin/sh\ntest \"$1\" = --query-gpu=compute_cap && echo 9.0 && echo 12.0 && echo '[N/A]'\n")
    assert resources.capabilities() == [(9, 0), (12, 0)]
    monkeypatch.setenv("PATH", "")
    assert resources.gpus() == resources.capabilities() == []


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    free, writable = resources.free_disk(tmp_path / "a" / "b")
    assert free > 0 and writable
