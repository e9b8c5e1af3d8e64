"""Maps that are joined must fit in every call, and images joined along the batch keep their own maps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import covering, relative_error, thorough
from networks import strided, unverified
from torch import Tensor, nn

import cadsurgery as cs

MASK = "edges:threshold=0.3,dilation=3"


def encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return strided(3, 8, outputs=8, kernel=3)


def half(batch: int, left: bool) -> Tensor:
    """Images with detail in one half."""
    images = torch.rand(batch, 3, 64, 96)
    images[..., 48 * left : 48 + 48 * left] = 0.5
    return images


class Rounded(nn.Module):
    """A map whose sizes are rounded up, and another whose sizes are rounded down, joined in any way."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU())
        self.up, self.join = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU()), join
        self.head = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, image: Tensor) -> Tensor:
        map = self.stem(image)
        return self.head(self.join(self.up(map), F.max_pool2d(map, 2)))


def _written(up: Tensor, down: Tensor) -> Tensor:
    up = up.clone()
    up[:, :4] = down[:, :4]
    return up


def _weighed(up: Tensor, down: Tensor) -> Tensor:
    weights = torch.bmm(up.flatten(2), down.flatten(2).transpose(1, 2))
    return up * weights.mean(2)[:, :, None, None].sigmoid()


JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda up, down: up + down,
    "concatenated": lambda up, down: torch.cat([up, down], 1)[:, 4:12],
    "chosen": lambda up, down: torch.where(up > down, up, 2 * down),
    "written": _written,
    "summed over positions": _weighed,
    "computed outside the region": lambda up, down: up + down.flip(3),
    "bins of the size of another map": lambda up, down: (
        up + F.interpolate(F.adaptive_avg_pool2d(down, 2), size=down.shape[2:])
    ),
    "filled": lambda up, down: up + down.new_ones(down.shape),
    "filled channels": lambda up, down: torch.cat([up, down.new_zeros(len(down), 2, *down.shape[2:])], 1)[
        :, :8
    ],
}


@pytest.mark.parametrize(("name", "optimised"), covering([*JOINS], [False, True]))
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_every_join_refuses_what_torch_refuses(name: str, optimised: bool) -> None:
    model = Rounded(JOINS[name]).eval()
    options = {"output_stride": (2, 8), "example_input": torch.rand(1, 3, 64, 64), "outputs": "native"}
    net = unverified(model, mask="none", **options)
    net = net.optimize() if optimised else net
    fits, image = torch.rand(2, 3, 56, 88), torch.rand(1, 3, 66, 64)
    with torch.no_grad():
        assert relative_error(net(fits), model(fits)) < 1e-4
        with pytest.raises(RuntimeError, match="size"):
            model(image)
        with pytest.raises(cs.InvalidInput):
            net(image)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["added", thorough("filled"), thorough("bins of the size of another map")])
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_a_file_of_any_size_refuses_what_the_network_refuses(name: str, tmp_path: Path) -> None:
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    net = cs.adaptify(
        Rounded(JOINS[name]).eval(), mask="none", output_stride=(2, 8), example_input=torch.rand(1, 3, 64, 64)
    )
    cs.export(net, torch.rand(1, 3, 32, 32), tmp_path / "net.onnx", dynamic=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    image = torch.rand(1, 3, 56, 88)
    found = session.run(None, {"image": image.numpy()})[0]
    assert relative_error(torch.from_numpy(found), net(image)) < 1e-4
    for size in ((66, 64), (64, 6)):
        with pytest.raises(Fail, match="sides of images are multiples of"):
            session.run(None, {"image": torch.rand(1, 3, *size).numpy()})


class Pair(nn.Module):
    """Features of one image minus those of another: both go through the encoder in one batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.head = encoder(), nn.Conv2d(8, 4, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        of_first, of_second = self.encode(torch.cat([first, second])).chunk(2)
        return self.head(of_first - of_second)


class Doubled(nn.Module):
    """The batch grows where there are no images any more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encode = nn.Conv2d(3, 3, 3, 2, 1), encoder()

    def forward(self, image: Tensor) -> Tensor:
        map = self.first(image)
        return self.encode(torch.cat([map, 2 * map]))


@pytest.mark.parametrize(("batch", "optimised"), covering([1, 2], [False, True]))
def test_each_image_of_a_pair_gets_its_own_map(batch: int, optimised: bool) -> None:
    left, right = half(batch, False), half(batch, True)
    net = unverified(Pair().eval(), mask=MASK, output_stride=(2, 8), example_input=(left, right))
    single = unverified(encoder().eval(), mask=MASK, output_stride=(2, 8), example_input=left)
    net = net.optimize() if optimised else net
    with torch.no_grad():
        there, levels = net(left, right), net.levels
        back, exchanged = net(right, left), net.levels
        own = []
        for images in (left, right):
            single(images)
            own.append(single.levels)
    bias = net.state_dict()["head.bias"].view(1, -1, 1, 1) if not optimised else (there + back) / 2
    assert not torch.equal(*own) and torch.equal(levels, torch.cat(own))
    assert torch.equal(exchanged, torch.cat(own[::-1]))
    assert relative_error(there - bias, bias - back) < 1e-4
    assert optimised or 0 < net.macs(left, right).active_fraction < 1


def test_a_batch_that_is_not_made_of_images_is_refused_with_its_line() -> None:
    with pytest.raises(cs.CannotConvert, match="2 maps enter the region for 1 image") as caught:
        cs.adaptify(
            Doubled().eval(), mask=MASK, output_stride=(4, 16), example_input=torch.rand(1, 3, 64, 96)
        )
    assert "test_joined_images_laws.py" in caught.value.where and "join the images" in caught.value.next
