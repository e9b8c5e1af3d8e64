"""NaN in, NaN out: what fused kernels do with what is no number."""

from dataclasses import replace

import pytest
import torch
from conftest import covering, some
from networks import unverified
from torch import Tensor, nn

from cadsurgery.elements.backends import native
from cadsurgery.elements.backends.onednn import convolve, multiply
from cadsurgery.elements.backends.weights import Activation, FusedConv
from cadsurgery.elements.backends.works import Convolution, Pooling, read_own_rows
from cadsurgery.kernels.load import library

ACTIVATIONS = {
    "relu": Activation("relu"),
    "hardtanh": Activation("hardtanh", (0.0, 6.0)),
    "swish": Activation("swish"),
    "hardswish": Activation("hardswish"),
    "gelu": Activation("gelu", (), "none"),
    "gelu tanh": Activation("gelu", (), "tanh"),
    "leaky_relu": Activation("leaky_relu", (0.1,)),
    "sigmoid": Activation("sigmoid"),
    "tanh": Activation("tanh"),
}
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


@pytest.mark.parametrize(
    ("dtype", "groups", "name", "count", "with_residual"),
    covering(
        [torch.float32, torch.float64, torch.bfloat16], [1, 4, 64], [*ACTIVATIONS], [300, 30], [True, False]
    ),
)
def test_kernels_keep_nan(dtype, name, groups, count, with_residual):
    """In rows, maps and tables; elsewhere the values are those of a kernel that knows nothing of NaN.

    By default ReLU, ungrouped, with a residual and on more rows than channels, which has a path of its own.
    """
    if with_residual and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    weight, bias = torch.randn(64, 64 // groups, 3, 3, dtype=dtype), torch.randn(64, dtype=dtype)
    if groups == 1:
        point = weight[:, :, :1, :1].contiguous()
        kernels = [FusedConv(point, bias, 1, ACTIVATIONS[name], {}, True, meets) for meets in (True, False)]
        rows, more = torch.randn(count, 64, dtype=dtype), torch.randn(count, 64, dtype=dtype)
        found = [multiply(kernel, rows, more if with_residual else None) for kernel in kernels]
        torch.testing.assert_close(*found)
        rows[3, 5] = torch.nan
        found[0] = multiply(kernels[0], rows, more if with_residual else None)
        assert found[0][3].isnan().all()
        assert found[0].isnan().sum() == 64
    kernel = FusedConv(weight, bias, groups, ACTIVATIONS[name], {}, True, True)
    if library() is not None:
        rows, more = torch.randn(40, 64, dtype=dtype), torch.randn(count, 64, dtype=dtype)
        table = torch.randint(0, 30, (count, 9), dtype=torch.int32)
        table[3, 5] = 35
        rows[35] = torch.nan
        reading = replace(read_own_rows(len(rows), rows.device), table=table)
        work = Convolution(rows, kernel, reading, 0.0, more if with_residual else None)
        out = native.Native().convolve(work)
        assert out[3].isnan().all()
        assert out.isnan().sum() == 64
    image, more = torch.randn(1, 64, 8, 12, dtype=dtype), torch.randn(1, 64, 8, 12, dtype=dtype)
    image[0, :, 4, 5] = torch.nan
    out = convolve(kernel, image, (1, 1), (1, 1), (1, 1), more if with_residual else None)
    assert out[:, :, 3:6, 4:7].isnan().all()
    assert out.isnan().sum() == 9 * 64


@TYPES
@pytest.mark.parametrize("largest", [False, True])
def test_pools_keep_nan(dtype, largest):
    if library() is None:
        pytest.skip("no compiler")
    rows, table = torch.randn(40, 20, dtype=dtype), torch.randint(0, 30, (9, 4), dtype=torch.int32)
    rows[35] = torch.nan
    table[[0, 1, 2, 3], [0, 1, 2, 3]] = 35
    reading = replace(read_own_rows(40, rows.device), table=table)
    out = native.Native().pool(Pooling(rows, reading, 0.0, largest))
    assert out[:4].isnan().all()
    assert not out[4:].isnan().any()


class Net(nn.Module):
    """Every kind of fused convolution: dense, 3x3, depthwise, 1x1, with and without residual and clamp."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), act(), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), act()
        )
        self.down = nn.Sequential(nn.Conv2d(32, 64, 1), act(), nn.Conv2d(64, 64, 3, 2, 1, groups=64), act())
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3, 1, 1), nn.BatchNorm2d(64), act(), nn.Conv2d(64, 64, 1))
        self.act, self.low = act(), nn.Conv2d(64, 64, 3, 2, 1)
        self.head = nn.Sequential(nn.Conv2d(64, 64, 1), act(), nn.Conv2d(64, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.stem(x))
        return self.head(self.low(self.act(self.body(x) + x)))


def found(model: nn.Module, dtype: torch.dtype, mask: str) -> tuple[Tensor, Tensor]:
    net = unverified(model.eval().to(dtype), mask)
    x = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        return net.optimize()(x).isnan(), net(x).isnan()


@pytest.mark.parametrize(
    ("name", "dtype", "act", "bad"),
    covering(
        some(name for name, _ in Net(nn.ReLU).named_parameters()),
        (torch.float32, torch.float64, torch.bfloat16),
        (nn.ReLU, nn.ReLU6),
        (str(torch.nan), str(torch.inf)),
    ),
)
def test_an_optimised_network_whose_weights_are_no_numbers_gives_nan_where_the_network_does(
    dtype, act, bad, name
):
    torch.manual_seed(0)
    model = Net(act)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = float(bad)
    optimised, plain = found(model, dtype, "random:seed=0")
    assert torch.equal(optimised, plain)
    assert plain.any() or bad == "inf"
