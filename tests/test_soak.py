"""The benchmark of memory over many calls says where it is not flat."""

from __future__ import annotations

import importlib.util

import pytest
from conftest import ROOT

SPEC = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks" / "soak.py")
assert SPEC is not None and SPEC.loader is not None
soak = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(soak)


@pytest.mark.parametrize(
    ("heaps", "grown"),
    [
        ([10, 100, 150, 150, 149, 151, 150, 150], 0.0),  # filled, then flat
        ([10, 20, 30, 40, 50, 60, 70, 80], 40.0),
        ([150, 150, 150, 150, 100, 100, 100, 100], 0.0),
        ([10, 400], 0.0),  # too few to tell
    ],
)
def test_memory_that_grows_after_the_first_quarter_is_seen(heaps: list[float], grown: float) -> None:
    assert soak.growth([{"heap": heap} for heap in heaps]) == grown
