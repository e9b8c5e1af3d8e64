"""More networks for real time: pre-activation on joined maps, parallel strips, pyramids in a block, fire modules."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import conv
from torch import Tensor, nn

from benchmarks.zoo.corpus import network


def before(width: int) -> nn.Sequential:
    """Norm and activation in front of a convolution."""
    return nn.Sequential(nn.BatchNorm2d(width), nn.PReLU(width))


class PooledInput(nn.Module):
    """The image itself, pooled so often."""

    def __init__(self, ratio: int) -> None:
        super().__init__()
        self.pool = nn.ModuleList([nn.AvgPool2d(3, stride=2, padding=1) for _ in range(ratio)])

    def forward(self, x: Tensor) -> Tensor:
        for pool in self.pool:
            x = pool(x)
        return x


class TwoStrips(nn.Module):
    """A bottleneck with pre-activation: depthwise strips beside dilated depthwise strips, added."""

    def __init__(self, width: int, d: int) -> None:
        super().__init__()
        n = width // 2
        self.bn_relu_1, self.bn_relu_2, self.conv3x3 = before(width), before(n), nn.Conv2d(width, n, 3, 1, 1)
        self.near = nn.Sequential(
            nn.Conv2d(n, n, (3, 1), padding=(1, 0), groups=n, bias=False), before(n),
            nn.Conv2d(n, n, (1, 3), padding=(0, 1), groups=n, bias=False), before(n),
        )  # fmt: skip
        self.far = nn.Sequential(
            nn.Conv2d(n, n, (3, 1), padding=(d, 0), dilation=(d, 1), groups=n, bias=False), before(n),
            nn.Conv2d(n, n, (1, 3), padding=(0, d), dilation=(1, d), groups=n, bias=False), before(n),
        )  # fmt: skip
        self.conv1x1 = nn.Conv2d(n, width, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        y = self.conv3x3(self.bn_relu_1(input))
        y = self.conv1x1(self.bn_relu_2(self.near(y) + self.far(y)))
        return y + input


class JoinedDown(nn.Module):
    """A strided convolution, beside max pooling where channels are to spare."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.joins = inputs < outputs
        self.conv = nn.Conv2d(inputs, outputs - inputs if self.joins else outputs, 3, 2, 1)
        self.max_pool, self.bn_prelu = nn.MaxPool2d(2, stride=2), before(outputs)

    def forward(self, input: Tensor) -> Tensor:
        y = self.conv(input)
        if self.joins:
            y = torch.cat([y, self.max_pool(input)], 1)
        return self.bn_prelu(y)


@network("dilation", "modules", "norms")
class DABNetLike(nn.Module):
    """Depthwise strips with norms in front of convolutions; blocks, their input and the pooled image are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.init_conv = nn.Sequential(conv(3, 8, 3, 2), conv(8, 8), nn.Conv2d(8, 8, 3, 1, 1, bias=False))
        self.down_1, self.down_2, self.down_3 = PooledInput(1), PooledInput(2), PooledInput(3)
        self.bn_prelu_1, self.downsample_1 = before(11), JoinedDown(11, 16)
        self.block_1 = nn.Sequential(*(TwoStrips(16, 2) for _ in range(2)))
        self.bn_prelu_2, self.downsample_2 = before(35), JoinedDown(35, 32)
        self.block_2 = nn.Sequential(*(TwoStrips(32, d) for d in (4, 8)))
        self.bn_prelu_3, self.classifier = before(67), nn.Conv2d(67, 4, 1)

    def forward(self, input: Tensor) -> Tensor:
        y = self.bn_prelu_1(torch.cat([self.init_conv(input), self.down_1(input)], 1))
        y = self.downsample_1(y)
        y = self.bn_prelu_2(torch.cat([self.block_1(y), y, self.down_2(input)], 1))
        y = self.downsample_2(y)
        y = self.bn_prelu_3(torch.cat([self.block_2(y), y, self.down_3(input)], 1))
        return F.interpolate(self.classifier(y), input.size()[2:], mode="bilinear", align_corners=False)


def strips(width: int, k: int, d: int = 1) -> list[nn.Module]:
    """Two strips of k samples, dilated."""
    pad = d * (k // 2)
    return [
        nn.Conv2d(width, width, (k, 1), padding=(pad, 0), dilation=(d, 1)),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, (1, k), padding=(0, pad), dilation=(1, d)),
        nn.BatchNorm2d(width),
    ]


class LongStrips(nn.Module):
    """Two pairs of strips beside a shortcut."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*strips(width, k), nn.ReLU(), *strips(width, k), nn.Dropout2d(0.03))

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.layers(input) + input, inplace=True)


class ParallelStrips(nn.Module):
    """A pair of strips, and behind it three dilated pairs whose results are added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*strips(width, 3), nn.ReLU())
        self.dilated = nn.ModuleList([nn.Sequential(*strips(width, 3, d)) for d in (2, 5, 9)])

    def forward(self, input: Tensor) -> Tensor:
        y = self.first(input)
        first, second, third = (layer(y) for layer in self.dilated)
        return F.relu(input + first + second + third, inplace=True)


@network("dilation", "transposed")
class ESNetLike(nn.Module):
    """Long strips, then parallel dilated ones; back by transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            JoinedDown(3, 8), LongStrips(8, 3), JoinedDown(8, 16), LongStrips(16, 5),
            JoinedDown(16, 24), ParallelStrips(24), ParallelStrips(24),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(24, 16, 3, 2, 1, 1), nn.BatchNorm2d(16), nn.ReLU(), LongStrips(16, 5),
            nn.ConvTranspose2d(16, 8, 3, 2, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), LongStrips(8, 3),
            nn.ConvTranspose2d(8, 4, 2, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class PyramidInBlock(nn.Module):
    """Channels in four parts, each convolved at a rate of its own together with the result of the part before."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.expand, self.project = conv(inputs, 2 * inputs, 1), conv(2 * inputs, outputs, 1)
        n = inputs // 2
        self.scales = nn.ModuleList(
            nn.Sequential(nn.Conv2d(n, n, 3, stride, d, d, groups=n, bias=False), nn.BatchNorm2d(n))
            for d in (1, 2, 4, 8)
        )
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.chunk(self.expand(x), 4, 1)
        results: list[Tensor] = []
        for i, (part, scale) in enumerate(zip(parts, self.scales)):
            results.append(scale(part if i == 0 or self.stride > 1 else part + results[-1]))
        y = self.project(torch.cat(results, 1))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class MutualEmbedding(nn.Module):
    """The deep map gates the fine one by channels; the fine one gates the deep one by positions."""

    def __init__(self, fine: int, deep: int, outputs: int) -> None:
        super().__init__()
        self.conv_low, self.conv_high = conv(fine, outputs, 1), conv(deep, outputs, 1)
        self.sa_conv, self.ca_conv = nn.Conv2d(1, 1, 1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, fine: Tensor, deep: Tensor) -> Tensor:
        size = fine.shape[2:]
        fine, deep = self.conv_low(fine), self.conv_high(deep)
        by_place = torch.sigmoid(self.sa_conv(fine.mean(1, keepdim=True)))
        by_channel = torch.sigmoid(self.ca_conv(F.adaptive_avg_pool2d(deep, 1)))
        deep = F.interpolate(deep, size=size, mode="bilinear", align_corners=True)
        return by_place * deep + by_channel * fine


@network("shapes", "dilation", "gates", "resizing")
class FPENetLike(nn.Module):
    """Pyramids of rates within blocks, and attention between scales on the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv(3, 8, 3, 2)
        self.layer1 = nn.Sequential(PyramidInBlock(8, 8))
        self.layer2 = nn.Sequential(PyramidInBlock(8, 16, 2), PyramidInBlock(16, 16))
        self.layer3 = nn.Sequential(PyramidInBlock(16, 24, 2), PyramidInBlock(24, 24))
        self.meu1, self.meu2 = MutualEmbedding(16, 24, 16), MutualEmbedding(8, 16, 8)
        self.project_layer = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer1(self.conv1(x))
        second = self.layer2(first)
        y = self.meu2(first, self.meu1(second, self.layer3(second)))
        return F.interpolate(self.project_layer(y), size=x.shape[2:], mode="bilinear", align_corners=True)


class Strip(nn.Module):
    """A narrow residual block of strips, or of one dilated window."""

    def __init__(self, width: int, dilation: int = 0) -> None:
        super().__init__()
        n = width // 4
        middle = [nn.Conv2d(n, n, 3, padding=dilation, dilation=dilation)] if dilation else strips(n, 3)[:3]
        self.layers = nn.Sequential(
            conv(width, n, 1), *middle, nn.BatchNorm2d(n), nn.PReLU(), nn.Conv2d(n, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


@network("indices", "dilation", "transposed")
class FSSNetLike(nn.Module):
    """Pools with places beside strided convolutions; back by unpooling beside transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.initial, self.pool = JoinedDown(3, 8), nn.MaxPool2d(2, 2, return_indices=True)
        self.enc1, self.enc2 = nn.Conv2d(8, 8, 2, 2), nn.Conv2d(16, 16, 2, 2)
        self.wide1, self.wide2 = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 1)
        self.side1, self.side2 = conv(8, 16, 1), conv(16, 24, 1)
        self.block1 = nn.Sequential(Strip(16), Strip(16))
        self.block2 = nn.Sequential(Strip(24, 1), Strip(24, 2), Strip(24, 5), Strip(24, 9))
        self.narrow2, self.narrow1, self.unpool = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 8, 1), nn.MaxUnpool2d(2)
        self.grow2, self.grow1 = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.initial(x)
        pooled, places1 = self.pool(x)
        y = self.block1(F.relu(self.wide1(pooled) + self.side1(self.enc1(x))))
        pooled, places2 = self.pool(y)
        z = self.block2(F.relu(self.wide2(pooled) + self.side2(self.enc2(y))))
        z = F.relu(self.unpool(self.narrow2(z), places2) + self.grow2(z))
        z = F.relu(self.unpool(self.narrow1(z), places1) + self.grow1(z))
        return self.last(z)


class Fire(nn.Module):
    """Squeezed channels, then 1x1 beside 3x3, joined."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, squeeze, 1), nn.BatchNorm2d(squeeze)
        self.conv2, self.conv3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.bn1(self.conv1(x)))
        return F.elu(torch.cat([self.conv2(x), self.conv3(x)], 1))


class ParallelDilated(nn.Module):
    """Windows of growing rates on one map, added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (1, 2, 4, 8)])

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.elu(layer(x)) for layer in self.convs)


@network("transposed", "dilation")
class SQNetLike(nn.Module):
    """Fire modules, parallel rates at the deepest scale, refined skips that are joined with enlarged maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.fire1, self.fire2 = Fire(8, 4, 8), Fire(16, 4, 12)
        self.parallel = ParallelDilated(24)
        self.up2, self.up1 = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.refine2, self.refine1 = nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.ConvTranspose2d(8, 4, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x1 = F.elu(self.conv1(x))
        x2 = self.fire1(F.max_pool2d(x1, 2, 2))
        x3 = self.parallel(self.fire2(F.max_pool2d(x2, 2, 2)))
        y = F.elu(self.refine2(torch.cat([self.up2(x3), x2], 1)))
        y = F.elu(self.refine1(torch.cat([self.up1(y), x1], 1)))
        return self.last(y)


class Separable(nn.Module):
    """Expanded, depthwise, projected; a shortcut where shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        wide = 2 * inputs
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.block = nn.Sequential(conv(inputs, wide, 1), depthwise, nn.BatchNorm2d(wide), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.use_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.block(x))
        return x + y if self.use_shortcut else y


@network("resizing", "sizes")
class ContextNetLike(nn.Module):
    """A shallow branch on the image, a deep one on a quarter of it; added at an eighth."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial_detail = nn.Sequential(conv(3, 8, 3, 2), Separable(8, 12, 2), Separable(12, 16, 2))
        self.context = nn.Sequential(
            conv(3, 8, 3, 2),
            Separable(8, 8),
            Separable(8, 12, 2),
            Separable(12, 12),
            Separable(12, 16, 2),
            conv(16, 16),
        )
        self.dwconv, self.conv_lower = (
            nn.Conv2d(16, 16, 3, padding=4, dilation=4, groups=16),
            nn.Conv2d(16, 16, 1),
        )
        self.conv_higher = nn.Conv2d(16, 16, 1)
        self.classifier = nn.Sequential(Separable(16, 16), nn.Dropout(0.1), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        size = x.size()[2:]
        higher = self.spatial_detail(x)
        low = F.interpolate(x, scale_factor=0.25, mode="bilinear", align_corners=True)
        low = F.interpolate(self.context(low), size=higher.shape[2:], mode="bilinear", align_corners=True)
        y = F.relu(self.conv_lower(F.relu(self.dwconv(low))) + self.conv_higher(higher))
        return F.interpolate(self.classifier(y), size, mode="bilinear", align_corners=True)
