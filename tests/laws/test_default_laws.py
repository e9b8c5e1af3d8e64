"""Laws of torch's defaults: types, devices and modes that a script has set change neither conversions nor calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, some
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.images import street_scene


class Net(nn.Module):
    """Maps of two strides that are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.last = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.first(x))
        coarse = F.interpolate(F.relu(self.second(fine)), size=fine.shape[2:], mode="bilinear")
        return F.interpolate(self.last(torch.cat((fine, coarse), 1)), size=x.shape[2:], mode="bilinear")


@contextmanager
def type_by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SET: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: type_by_default(torch.float64),
    "bfloat16": lambda: type_by_default(torch.bfloat16),
    "float16": lambda: type_by_default(torch.float16),
    "another device": lambda: torch.device("meta"),  # whose tensors have no memory that could be read
    "inference mode": torch.inference_mode,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "linear": {},
    "guided": {"fill": "guided"},
    "floors": {"coarsest": 4},
}
MASKS = ("edges", "edges | budget:fraction=0.3", "random:seed=3")


@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
@pytest.mark.parametrize(("name", "mask", "options"), covering(some(SET), MASKS, OPTIONS))
def test_what_a_script_has_set_changes_neither_conversion_nor_call(
    name: str, mask: str, options: str
) -> None:
    torch.manual_seed(0)
    model, image = Net().eval(), torch.cat([street_scene(64, 96, seed)[None] for seed in range(2)])

    def found() -> tuple[Any, ...]:
        net = cs.adaptify(model, mask, **OPTIONS[options])
        with torch.no_grad():
            outputs = net(image), net.levels, net.optimize()(image)
        return *outputs, [check.law for check in net.checks], net.macs(image).mask

    expected = found()
    with SET[name]():
        ours = found()
    for one, other in zip(ours[:3], expected[:3], strict=True):
        assert_same(one, other, 1e-6)
    assert ours[3:] == expected[3:]
