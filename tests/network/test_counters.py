"""Tools that count work by hooks count a converted network layer by layer: each layer's rows."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch
from conftest import images
from networks import unverified
from ptflops import get_model_complexity_info
from torch import Tensor, nn

import cadsurgery as cs


class Counted(nn.Module):
    """Convolutions without bias, and norms: ptflops counts biases and activations, too. The stem is no part of the
    region."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, 4, 1, bias=False)
        self.body = nn.Sequential(*(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)) * 2)
        self.head = nn.Conv2d(8, 5, 1, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.body(self.stem(pixels)))


def counted(net: nn.Module, call: dict[str, Any]) -> float | None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        macs, _ = get_model_complexity_info(
            net,
            (3, 65, 97),
            as_strings=False,
            print_per_layer_stat=False,
            backend="pytorch",
            input_constructor=lambda size: call,
            ignore_modules=[nn.BatchNorm2d],
        )
    return macs


@torch.no_grad()
@pytest.mark.parametrize("mask", ["all", "none", "mixed"])
def test_ptflops_counts_what_macs_counts(mask: str) -> None:
    net, x = unverified(Counted().eval(), "edges", example_input=images(1, 65, 97)), images(1, 65, 97)
    net(x, mask="all")
    half = torch.zeros(net.levels.shape, dtype=torch.bool)
    half[:, :, : half.shape[2] // 2] = True
    chosen: Any = half if mask == "mixed" else mask
    before = net(x, mask=chosen)
    with net.masked(chosen):
        assert counted(net, {"pixels": x}) == net.macs(x, mask=chosen).mask
    assert torch.equal(net(x, mask=chosen), before)


@torch.no_grad()
def test_after_a_counter_failed_the_network_works_as_before() -> None:
    """Its hooks stay, and calls still give what they gave."""
    net, x = unverified(Counted().eval(), "edges", example_input=images(1, 65, 97)), images(1, 65, 97)
    before = net(x)
    with pytest.raises(cs.InvalidInput):
        net(torch.full_like(x, float("nan")))
    assert counted(net, {"pixels": x[:, :2]}) is None
    assert torch.equal(net(x), before)


@torch.no_grad()
def test_other_hooks_are_refused_as_before() -> None:
    net, x = unverified(Counted().eval(), "edges", example_input=images(1, 65, 97)), images(1, 65, 97)
    handle = net.body[0].register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(cs.InvalidInput, match="cannot call as it is meant"):
        net(x)
    handle.remove()
    net(x)


@torch.no_grad()
def test_torchinfo_and_thop_count_it_too() -> None:
    """They add what norms do; fvcore traces networks by torch.jit, which is refused in words."""
    net, x = unverified(Counted().eval(), "all", example_input=images(1, 65, 97)), images(1, 65, 97)
    expected, norms = net.macs(x).mask, 8 * 2 * (5 * 7 + 9 * 13) * 16  # of both, at most, at the high stride
    torchinfo = pytest.importorskip("torchinfo")
    assert expected <= torchinfo.summary(net, input_data=x, verbose=0).total_mult_adds <= expected + norms
    thop = pytest.importorskip("thop")
    assert expected <= thop.profile(net, (x,), verbose=False)[0] <= expected + norms


@torch.no_grad()
def test_what_traces_is_told_what_counts() -> None:
    net, x = unverified(Counted().eval(), "all", example_input=images(1, 65, 97)), images(1, 65, 97)
    fvcore = pytest.importorskip("fvcore.nn")
    with pytest.raises(cs.CannotConvert, match=r"net.macs\(x\)"):
        fvcore.FlopCountAnalysis(net, x).total()
