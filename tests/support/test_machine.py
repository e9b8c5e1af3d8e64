"""What is known of the machine: memory that is free, memory of large results, the processor in reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import cadsurgery as cs
from cadsurgery.kernels import isa
from cadsurgery.support import memory, pages, processor, provenance
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


@pytest.mark.parametrize("free", [1, 2**20, 2**29, 2**30, 2**34, None])
def test_automatic_memory_leaves_a_margin_where_the_system_tells(
    free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: free)
    if free is None:
        with pytest.raises(cs.InvalidInput, match=r"(?s)does not tell.*1\.5GiB"):
            bytes_of("auto")
        return
    amount = bytes_of("auto")
    assert free // 2 <= amount <= max(free * 3 // 4, 1) and amount > 0


@pytest.mark.parametrize("large", [1, 1 << 40, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_is_a_tensor_as_any_also_without_large_pages(
    large: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "LARGE", large or 1)
    if large is None:
        monkeypatch.setattr(pages, "_advise", lambda: None)
    like = torch.zeros(2, 3, dtype=dtype)
    for shape in ((0,), (3, 5), (1025, 1027)):  # none, less than a page, and more than one
        found = pages.new_memory(like, *shape)
        assert found.shape == shape and found.dtype == dtype and found.is_contiguous()
        assert bool((found.fill_(1) == 1).all())
    assert pages.new_memory(like.to("meta"), 4, 4).is_meta


CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is known, and no caps."""
    known = processor.Processor("Abacus 3", "Abacus family 1 model 2", "L1d 48 KiB, L2 1.25 MiB, L3 48 MiB")
    monkeypatch.setattr(processor, "processor", lambda: known)
    for name in processor.CAPS:
        monkeypatch.delenv(name, raising=False)


def test_a_processor_in_a_line_has_model_family_and_outer_caches(told: None) -> None:
    words = processor.processor_in_words()
    assert words.startswith("Abacus 3 (") and "L1" not in words
    assert words.endswith("CPU), Abacus family 1 model 2, L2 1.25 MiB, L3 48 MiB")


def test_instruction_sets_are_ours_torchs_and_the_caps_in_force(
    told: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = processor.instruction_sets()
    assert sets == {
        "kernels": isa.used() or "none (torch operations)",
        "torch": torch.backends.cpu.get_cpu_capability(),
    }
    assert isa.in_words() == processor.sets_in_words(sets) and "capped" not in isa.in_words()
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert processor.instruction_sets() == {
        **sets,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    assert isa.in_words().endswith(", capped by ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2")


def test_a_run_is_described_by_plain_fields_and_in_a_line(told: None) -> None:
    run = provenance.describe_run(CPU)
    assert json.loads(json.dumps(run)) == run
    assert run["processor"].keys() == {"model", "family", "caches"}
    assert run["instruction_sets"] == processor.instruction_sets()
    assert run["device"].startswith(processor.processor_in_words())
    assert run["device"].endswith(f"; {isa.in_words()}; {torch.get_num_threads()} threads")
