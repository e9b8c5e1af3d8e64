"""Memory that is free: the machine's, or less where a control group has less."""

from __future__ import annotations

from pathlib import Path

import pytest

import cadsurgery as cs
from cadsurgery.support import memory
from cadsurgery.support.memory import bytes_of, free_memory

MACHINE, GIB = 8 * 2**30, 2**30


def system(root: Path, groups: str, **files: dict[str, object]) -> Path:
    """The files of a kernel that says what is free; names of folders have _ for /."""
    stored = {
        "proc": {"meminfo": f"MemTotal: 1 kB\nMemAvailable: {MACHINE // 1024} kB\n", "self/cgroup": groups},
        **files,
    }
    for folder, content in stored.items():
        for name, value in content.items():
            place = root / folder.replace("_", "/") / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(f"{value}\n")
    return root


def group(most: object, taken: int, files: int = 0) -> dict[str, object]:
    return {"memory.max": most, "memory.current": taken, "memory.stat": f"anon 5\ninactive_file {files}"}


def group_of_version_1(most: object, taken: int, files: int = 0) -> dict[str, object]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    stated = f"inactive_file 7\ntotal_inactive_file {files}"
    return dict(zip(names, (most, taken, stated), strict=True))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("path", ["/", "/job/step", "/of/the/host"])
def test_the_least_of_machine_and_groups_is_free(tmp_path: Path, version: int, path: str) -> None:
    """Of a group what its limit leaves, with files that the kernel can drop; groups around it count as well."""
    make, place = (group, "sys_fs_cgroup") if version == 2 else (group_of_version_1, "sys_fs_cgroup_memory")
    line = f"0::{path}" if version == 2 else f"4:cpu,memory:{path}\n0::/"
    unlimited: object = "max" if version == 2 else 2**63 - 4096
    inside = f"{place}{path.replace('/', '_')}" if path == "/job/step" else place
    root = system(
        tmp_path, line, **{place: make(unlimited, GIB)} | {inside: make(3 * GIB, 2 * GIB, GIB // 2)}
    )
    assert free_memory(root) == GIB + GIB // 2
    system(tmp_path, line, **{inside: make(unlimited, 2 * GIB)})
    assert free_memory(root) == MACHINE
    if path == "/job/step":
        system(tmp_path, line, **{place: make(5 * GIB, 4 * GIB)})
        assert free_memory(root) == GIB
    system(tmp_path, line, **{inside: make(GIB, 2 * GIB)})
    assert free_memory(root) == 0


@pytest.mark.parametrize("free", [1, 2**20, 2**29, 2**30, 2**34])
def test_automatic_memory_leaves_a_margin(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    amount = bytes_of("auto")
    assert free // 2 <= amount <= max(free * 3 // 4, 1) and amount > 0


def test_automatic_memory_needs_a_system_that_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    with pytest.raises(cs.InvalidInput, match="does not tell") as refusal:
        bytes_of("auto")
    assert "1.5GiB" in refusal.value.next
