"""Of backends that can do the same work the fastest serves: measured once, kept, pinned by the files that pin costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cadsurgery.elements.backends import choose, costs
from cadsurgery.elements.backends.choose import Backend, Convolution, Mixing, Picking, WindowRead
from cadsurgery.elements.backends.native import Native
from cadsurgery.elements.backends.reference import Torch
from cadsurgery.elements.backends.weights import Activation, FusedConv
from cadsurgery.elements.kernel_map import Reading, Window
from cadsurgery.elements.lattice import Geometry


class Timed(Backend):
    """The reference, some milliseconds later."""

    def __init__(self, name: str, milliseconds: float) -> None:
        self.name, self.milliseconds, self.calls = name, milliseconds, 0

    def applies(self, work: Any) -> bool:
        return True

    def is_measured(self, work: Any) -> bool:
        return True

    def convolve(self, work: Convolution) -> Tensor:
        self.calls += 1
        time.sleep(self.milliseconds / 1e3)
        return Torch().convolve(work)


class Last(Torch):
    """The reference, which takes what no other backend does."""

    def is_measured(self, work: Any) -> bool:
        return False


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """A slow backend before a fast one, the reference behind them, in a process that knows no costs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CADSURGERY_COSTS", raising=False)
    for name, empty in (("_KNOWN", {}), ("_FASTEST", {}), ("_PINNED", None), ("_OF_FILE", {})):
        monkeypatch.setattr(costs, name, empty)
    backends = [Timed("slow", 20.0), Timed("fast", 0.0), Last()]
    monkeypatch.setattr(choose, "BACKENDS", backends)
    return backends


def work(channels: int = 20, groups: int = 1, keeps: bool = True, taps: int = 3) -> Convolution:
    """A convolution on a lattice of two levels; with packed weights it is one of inference in earnest."""
    blocks = (torch.arange(32).view(1, 4, 8) % 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    lattice = Geometry((2,)).lattice(blocks).at(1)
    pad = taps // 2
    window = Window((taps, taps), 1, (1, 1), (pad, pad, pad, pad), spacing=2)
    weight = torch.randn(channels, channels // groups, taps, taps)
    weights = FusedConv(weight, torch.randn(channels), groups, Activation("relu"), {} if keeps else None)
    return Convolution(torch.randn(lattice.count, channels), weights, WindowRead(lattice, lattice, window))


@pytest.mark.parametrize(("groups", "taps"), [(1, 3), (1, 1), (4, 3), (20, 3)])
@torch.no_grad()
@pytest.mark.smoke
def test_the_fastest_backend_serves(table: list[Backend], groups: int, taps: int) -> None:
    assert choose.choose(work(groups=groups, taps=taps)).backend.name == "fast"


@torch.no_grad()
def test_rows_are_mixed_alike_wherever_they_are_read(
    table: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpolated into a halo or read one by one: a choice for one of both alone would round them differently."""
    monkeypatch.setattr(choose, "BACKENDS", [Native(), *table])
    rows = torch.randn(40, 20).bfloat16()
    sources, shares = torch.randint(0, 40, (30, 4), dtype=torch.int32), torch.rand(30, 4)
    places = 41 + torch.arange(30, dtype=torch.int32).view(-1, 1, 1)
    mixed = choose.compute(Mixing(rows, sources, shares))
    picked = choose.compute(Picking(rows, Reading(places, sources, shares, False)))
    assert torch.equal(mixed, picked)
    assert costs._KNOWN == {}


@torch.no_grad()
def test_a_kind_is_measured_once_and_kept_for_other_processes(
    table: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose.choose(work()).backend.name == "fast"
    measured = table[0].calls
    assert measured > 0
    for size in (20, 31):  # of one class
        assert choose.choose(work(size)).backend.name == "fast" and table[0].calls == measured
    monkeypatch.setattr(costs, "_KNOWN", {})
    monkeypatch.setattr(costs, "_FASTEST", {})
    assert choose.choose(work()).backend.name == "fast" and table[0].calls == measured
    assert choose.choose(work(200)).backend.name == "fast" and table[0].calls > measured


@torch.no_grad()
def test_pinned_costs_choose_and_the_first_of_the_table_serves_without_them(table: list[Any]) -> None:
    costs.pin({})
    assert choose.choose(work()).backend.name == "slow" and table[0].calls == table[1].calls == 0
    costs.pin(None)
    assert choose.choose(work()).backend.name == "fast"
    recorded = dict(costs._KNOWN)
    turned = {key: (1.0,) if ", slow, " in key else (2.0,) for key in recorded}
    costs.pin(turned)
    assert choose.choose(work()).backend.name == "slow"
    costs.pin(None)


@torch.no_grad()
def test_what_is_not_faster_than_measurements_differ_is_not_chosen(table: list[Any]) -> None:
    choose.choose(work())
    keys = list(costs._KNOWN)
    for share, name in ((0.99, "slow"), (0.5, "fast")):
        costs.pin({key: (1.0 if ", slow, " in key else share,) for key in keys})
        assert choose.choose(work()).backend.name == name
    costs.pin(None)


@torch.no_grad()
def test_works_that_keep_no_packed_weights_are_not_measured(table: list[Any]) -> None:
    assert choose.choose(work(keeps=False)).backend.name == "slow" and table[0].calls == 0


@torch.no_grad()
def test_a_sample_is_of_the_kind_that_it_stands_for() -> None:
    for one in (work(), work(taps=1), work(groups=4), work(groups=20), work(70)):
        sample = one.sample()
        table = sample.reading.table
        assert sample.weights.groups == 1 or sample.rows.shape[1] % sample.weights.groups == 0
        assert (table.shape[1] if one.kind[2] else 1) == max(1, one.kind[2])  # type: ignore[index,call-overload]
        outputs = sample.weights.weight.shape[0]
        assert choose.size_class(outputs) == choose.size_class(one.weights.weight.shape[0])
        assert Torch().convolve(sample).shape == (len(sample.rows), outputs)


class OfFewChannels(Timed):
    """A backend with a condition on the single work."""

    def is_measured(self, work: Any) -> bool:
        return False

    def condition(self, work: Any) -> Any:
        return lambda one: one.rows.shape[1] < 30


@torch.no_grad()
def test_a_backend_with_a_condition_serves_the_works_that_meet_it(
    table: list[Backend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of them comes first, since both are of one case."""
    monkeypatch.setattr(choose, "BACKENDS", [OfFewChannels("few", 0.0), Last()])
    for channels in (20, 31, 20):
        assert choose.choose(work(channels)).backend.name == ("few" if channels < 30 else "torch")
