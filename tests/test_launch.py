"""`accelerate launch --cpu` starts one process of several: the others are started, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cadsurgery as cs
from cadsurgery.support import processes

psutil = pytest.importorskip("psutil")
ROOT = Path(__file__).parents[1]
ALONE = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SAY = """
import os, sys
from cadsurgery.launch import start_others, world
start_others()
start_others()
with open(f"{sys.argv[1]}/{world().rank}", "w") as file:
    file.write(f"{world().size} {world().local_rank} {os.environ['MASTER_PORT']} {sys.argv[2:]}")
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)


class Parent:
    """A process that says it was started by these words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def parent(self) -> Parent:
        return self

    def cmdline(self) -> list[str]:
        return list(self.words)


def asked(monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, int | None]:
    pytest.importorskip("accelerate")
    from accelerate.state import PartialState

    monkeypatch.setattr(PartialState, "_shared_state", {})
    monkeypatch.setattr(psutil, "Process", lambda: Parent(*words))
    return processes._asked_for()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("accelerate", "launch", "--num_processes", "2", "--cpu", "a.py"), (2, None)),
        (
            ("/bin/accelerate", "launch", "--cpu", "--num-processes=3", "a.py", "--num_processes", "9"),
            (3, None),
        ),
        (("accelerate-launch", "--num_processes=4", "--main_process_port", "777", "-m", "a"), (4, 777)),
        (("-m", "accelerate.commands.launch", "--num_processes", "2", "a.py", "launch"), (2, None)),
    ],
)
def test_the_launchers_own_words_say_how_many(
    monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], expected: tuple[int, int | None]
) -> None:
    assert asked(monkeypatch, "/bin/python", *words) == expected


def test_or_its_configuration_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 5\nuse_cpu: true\n"
    )
    words = ("python", "accelerate", "launch", "--config_file", str(config), "a.py")
    assert asked(monkeypatch, *words) == (5, None)


@pytest.mark.parametrize(
    "words",
    [
        ("bash",),
        ("python", "accelerate", "launch", "--cpu", "--num_processes", "1", "a.py"),
        ("python", "accelerate", "launch", "--num_processes", "4", "--num_machines", "2", "a.py"),
    ],
    ids=["no launcher", "one", "several machines"],
)
def test_where_it_cannot_be_known_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, alone: None, words: tuple[str, ...]
) -> None:
    with pytest.raises(cs.InvalidInput, match="torchrun"):
        asked(monkeypatch, *words)


def test_a_process_that_has_begun_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = pytest.importorskip("accelerate.state")
    monkeypatch.setattr(
        psutil, "Process", lambda: Parent("accelerate", "launch", "--num_processes", "2", "a")
    )
    monkeypatch.setattr(state.PartialState, "_shared_state", {"num_processes": 1})
    with pytest.raises(cs.InvalidInput, match="begun alone"):
        processes._asked_for()


@pytest.mark.parametrize("given", [{}, {"WORLD_SIZE": "2"}, {"ACCELERATE_USE_CPU": "False"}], ids=str)
def test_nothing_is_started_in_any_other_case(
    monkeypatch: pytest.MonkeyPatch, alone: None, given: dict[str, str]
) -> None:
    if not given:
        monkeypatch.delenv("MASTER_ADDR")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    processes.start_others()
    assert dict(os.environ) == before


def test_the_mean_over_one_process_is_the_value() -> None:
    value = torch.tensor(3.0, requires_grad=True)
    found = processes.mean_everywhere(value)
    assert float(found) == 3.0 and not found.requires_grad


def launched(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("accelerate")
    (folder / "script.py").write_text(script)
    words = ("-m", "accelerate.commands.launch", "--num_processes", "3", "--cpu", str(folder / "script.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words, str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_as_many_run_as_were_asked_for_each_once(tmp_path: Path) -> None:
    done = launched(SAY, tmp_path, "a b", "--c")
    assert done.returncode == 0, done.stderr[-2000:]
    told = [(tmp_path / str(rank)).read_text().split(" ", 3) for rank in range(3)]
    assert [words[:2] for words in told] == [["3", "0"], ["3", "1"], ["3", "2"]]
    assert len({words[2] for words in told}) == 1 and {words[3] for words in told} == {"['a b', '--c']"}
    assert not (tmp_path / "3").exists()


def left(folder: Path) -> list[int]:
    """Processes that still run the script."""
    script, found = str(folder / "script.py"), []
    for process in psutil.process_iter(["cmdline"]):
        if script in (process.info["cmdline"] or ()):
            found.append(process.pid)
    return found


@pytest.mark.parametrize("who", [0, 2], ids=["the first", "another"])
def test_all_end_when_one_fails(tmp_path: Path, who: int) -> None:
    script = f"""
import time, sys
from cadsurgery import launch
processes._GRACE = 0.5
processes.start_others()
if processes.world().rank == {who}:
    sys.exit(3)
time.sleep(600)  # ended before, or the test's time is up
"""
    done = launched(script, tmp_path)
    assert done.returncode != 0 and "exit status 3" in done.stderr
    if who:
        assert f"process {who} failed with exit code 3" in done.stderr
    assert left(tmp_path) == []
