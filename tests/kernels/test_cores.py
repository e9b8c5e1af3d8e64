"""How many cores a process may use: those it may run on, and what its control groups give it of their time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cadsurgery.kernels import build

ALL = 64
GROUPS: dict[str, tuple[str, dict[str, str], int]] = {
    "no control groups": ("", {}, ALL),
    "no quota": ("0::/", {"cpu.max": "max 100000"}, ALL),
    "two": ("0::/", {"cpu.max": "200000 100000"}, 2),
    "a part of one": ("0::/", {"cpu.max": "20000 100000"}, 1),
    "one and a half": ("0::/", {"cpu.max": "150000 100000"}, 2),
    "of a group inside": ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "max 100000"}, 3),
    "of a group around": ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}, 4),
    "the least of both": ("0::/a/b", {"a/b/cpu.max": "900000 100000", "a/cpu.max": "500000 100000"}, 5),
    "the host's path in a container": ("0::/docker/1234", {"cpu.max": "200000 100000"}, 2),
    "more than there are": ("0::/", {"cpu.max": "9900000 100000"}, ALL),
    "version 1": (
        "4:memory:/m\n3:cpu,cpuacct:/docker/1",
        {
            "cpu,cpuacct/docker/1/cpu.cfs_quota_us": "200000",
            "cpu,cpuacct/docker/1/cpu.cfs_period_us": "100000",
        },
        2,
    ),
    "version 1 by its short name": (
        "3:cpu,cpuacct:/",
        {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "25000"},
        2,
    ),
    "version 1 without a quota": (
        "3:cpu:/",
        {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
        ALL,
    ),
    "a file that is none": ("0::/", {"cpu.max": "broken"}, ALL),
}


@pytest.mark.parametrize(("groups", "files", "expected"), GROUPS.values(), ids=GROUPS)
def test_a_quota_of_the_control_group_counts(
    groups: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(ALL)), raising=False)
    if groups:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    assert build.cores(tmp_path) == expected


def test_the_cores_it_may_run_on_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7}, raising=False)
    assert build.cores(tmp_path) == 2
