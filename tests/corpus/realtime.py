"""Networks for real time: two paths, unpooling, dilated bottlenecks, early downsampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import Residual, conv
from torch import Tensor, nn

from benchmarks.zoo.corpus import network


@network("indices", "sizes")
class SegNet(nn.Module):
    """Pooling remembers where the maxima were, and unpooling puts values back there; sizes are kept for it."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = conv(3, 8), conv(8, 16), conv(16, 32)
        self.dec3, self.dec2, self.dec1 = conv(32, 16), conv(16, 8), conv(8, 8)
        self.out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        x = self.enc1(x)
        size1 = x.size()
        x, id1 = F.max_pool2d(x, kernel_size=2, stride=2, return_indices=True)
        x = self.enc2(x)
        size2 = x.size()
        x, id2 = F.max_pool2d(x, kernel_size=2, stride=2, return_indices=True)
        x = self.enc3(x)
        size3 = x.size()
        x, id3 = F.max_pool2d(x, kernel_size=2, stride=2, return_indices=True)
        x = self.dec3(F.max_unpool2d(x, id3, kernel_size=2, stride=2, output_size=size3))
        x = self.dec2(F.max_unpool2d(x, id2, kernel_size=2, stride=2, output_size=size2))
        x = self.dec1(F.max_unpool2d(x, id1, kernel_size=2, stride=2, output_size=size1))
        return self.out(x)


class Initial(nn.Module):
    """Half of the channels convolved, half pooled."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main = nn.Conv2d(inputs, outputs - inputs, 3, 2, 1, bias=False)
        self.ext = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn, self.act = nn.BatchNorm2d(outputs), nn.PReLU(outputs)

    def forward(self, x):
        return self.act(self.bn(torch.cat((self.main(x), self.ext(x)), 1)))


class Bottleneck(nn.Module):
    """Regular, dilated or in two strips; a dropout of channels."""

    def __init__(self, width: int, dilation: int = 1, strips: bool = False) -> None:
        super().__init__()
        inner = width // 2
        middle: list[nn.Module] = [nn.Conv2d(inner, inner, 3, 1, dilation, dilation, bias=False)]
        if strips:
            middle = [
                nn.Conv2d(inner, inner, (5, 1), padding=(2, 0)),
                nn.Conv2d(inner, inner, (1, 5), padding=(0, 2)),
            ]
        self.branch = nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.PReLU(), *middle,
            nn.BatchNorm2d(inner), nn.PReLU(), nn.Conv2d(inner, width, 1), nn.Dropout2d(0.1)
        )  # fmt: skip
        self.act = nn.PReLU()

    def forward(self, x):
        return self.act(x + self.branch(x))


class Down(nn.Module):
    """Its shortcut is pooled with indices and gets channels of zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2, stride=2, return_indices=True)
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 2, 2, bias=False), nn.BatchNorm2d(outputs), nn.PReLU()
        )
        self.act = nn.PReLU()

    def forward(self, x):
        main, indices = self.pool(x)
        ext = self.branch(x)
        n, ch_ext, h, w = ext.size()
        padding = torch.zeros(n, ch_ext - main.size()[1], h, w, dtype=x.dtype)
        if main.is_cuda:
            padding = padding.cuda()
        return self.act(torch.cat((main, padding), 1) + ext), indices


class Up(nn.Module):
    """Unpooled shortcut, transposed branch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.main, self.unpool = nn.Conv2d(inputs, outputs, 1, bias=False), nn.MaxUnpool2d(2)
        self.branch = nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=False)
        self.act = nn.PReLU()

    def forward(self, x, indices, output_size):
        main = self.unpool(self.main(x), indices, output_size=output_size)
        return self.act(main + self.branch(x, output_size=output_size))


@network("indices", "factories", "transposed", "dilation", "sizes")
class ENetLike(nn.Module):
    """Early downsampling, zeros for new channels, dilated and striped bottlenecks, unpooling."""

    def __init__(self) -> None:
        super().__init__()
        self.initial = Initial(3, 8)
        self.down1, self.stage1 = Down(8, 16), nn.Sequential(Bottleneck(16), Bottleneck(16))
        self.down2 = Down(16, 24)
        self.stage2 = nn.Sequential(
            Bottleneck(24),
            Bottleneck(24, 2),
            Bottleneck(24, strips=True),
            Bottleneck(24, 4),
            Bottleneck(24, 8),
        )
        self.up2, self.stage4 = Up(24, 16), Bottleneck(16)
        self.up1 = Up(16, 8)
        self.full = nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, bias=False)

    def forward(self, x):
        size = x.size()
        x = self.initial(x)
        size1 = x.size()
        x, id1 = self.down1(x)
        x = self.stage1(x)
        size2 = x.size()
        x, id2 = self.down2(x)
        x = self.stage4(self.up2(self.stage2(x), id2, size2))
        x = self.up1(x, id1, size1)
        return self.full(x, output_size=size[2:])


class Strips(nn.Module):
    """Factorised 3x3 convolutions, the second pair dilated."""

    def __init__(self, width: int, dilated: int) -> None:
        super().__init__()
        d = dilated
        self.conv3x1_1 = nn.Conv2d(width, width, (3, 1), stride=1, padding=(1, 0))
        self.conv1x3_1 = nn.Conv2d(width, width, (1, 3), stride=1, padding=(0, 1))
        self.conv3x1_2 = nn.Conv2d(width, width, (3, 1), padding=(d, 0), dilation=(d, 1))
        self.conv1x3_2 = nn.Conv2d(width, width, (1, 3), padding=(0, d), dilation=(1, d))
        self.bn1, self.bn2, self.dropout = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.Dropout2d(0.3)

    def forward(self, x):
        y = F.relu(self.conv3x1_1(x))
        y = F.relu(self.bn1(self.conv1x3_1(y)))
        y = self.bn2(self.conv1x3_2(F.relu(self.conv3x1_2(y))))
        if self.dropout.p != 0:
            y = self.dropout(y)
        return F.relu(y + x)


@network("dilation", "transposed", "arguments", "modules")
class ERFNetLike(nn.Module):
    """Factorised residual layers of dilation 2, 4, 8 twice over; `forward(x, only_encode=False)`."""

    def __init__(self) -> None:
        super().__init__()
        self.initial, self.layers = (
            Initial(3, 8),
            nn.ModuleList([Initial(8, 16), Strips(16, 1), Initial(16, 24)]),
        )
        for _ in range(2):
            self.layers.extend(Strips(24, d) for d in (2, 4, 8))
        self.output_conv = nn.Conv2d(24, 4, 1)
        self.up1 = nn.ConvTranspose2d(24, 16, 3, stride=2, padding=1, output_padding=1, bias=True)
        self.up2 = nn.ConvTranspose2d(16, 8, 3, stride=2, padding=1, output_padding=1, bias=True)
        self.last = nn.ConvTranspose2d(8, 4, 2, stride=2, padding=0, output_padding=0, bias=True)

    def forward(self, input, only_encode=False):
        output = self.initial(input)
        for layer in self.layers:
            output = layer(output)
        if only_encode:
            return self.output_conv(output)
        return self.last(F.relu(self.up2(F.relu(self.up1(output)))))


@network("transposed", "decisions")
class LinkNet(nn.Module):
    """Sums of encoder and decoder; transposed in the middle of a bottleneck; padded by `if`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        self.enc1, self.enc2, self.enc3 = Residual(8, 8), Residual(8, 16, 2), Residual(16, 24, 2)
        self.dec3, self.dec2, self.dec1 = self.decode(24, 16), self.decode(16, 8), self.decode(8, 8)
        self.out = nn.Sequential(
            nn.ConvTranspose2d(8, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
            nn.Conv2d(8, 4, 2, padding=1),
        )  # fmt: skip

    @staticmethod
    def decode(a: int, b: int) -> nn.Sequential:
        """A bottleneck that doubles the size."""
        up = nn.ConvTranspose2d(a // 4, a // 4, 3, stride=2, padding=1, output_padding=1)
        return nn.Sequential(conv(a, a // 4, 1), up, nn.BatchNorm2d(a // 4), nn.ReLU(), conv(a // 4, b, 1))

    def add(self, x, skip):
        if x.size(2) > skip.size(2):
            x = x[:, :, :-1]
        if x.size(3) > skip.size(3):
            x = x[:, :, :, :-1]
        return x + skip

    def forward(self, x):
        x = self.stem(x)
        e1 = self.enc1(x)
        e2 = self.enc2(e1)
        d3 = self.add(self.dec3(self.enc3(e2)), e2)
        d2 = self.add(self.dec2(d3), e1)
        return self.out(self.dec1(d2))


class DenseDilated(nn.Module):
    """Asymmetric and dilated, its result put beside its input."""

    def __init__(self, inputs: int, growth: int, d: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, growth, 1), nn.BatchNorm2d(growth), nn.ReLU(),
            nn.Conv2d(growth, growth, (3, 1), padding=(1, 0)), nn.Conv2d(growth, growth, (1, 3), padding=(0, 1)),
            nn.ReLU(), nn.Conv2d(growth, growth, (3, 1), padding=(d, 0), dilation=(d, 1)),
            nn.Conv2d(growth, growth, (1, 3), padding=(0, d), dilation=(1, d)), nn.BatchNorm2d(growth), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x):
        return torch.cat([self.layers(x), x], 1)


@network("dilation", "decisions")
class EDANetLike(nn.Module):
    """Dense blocks whose dilations grow to 16; a pad by `if` where an odd size was pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = Initial(3, 8), Initial(8, 16), Initial(16, 24)
        self.block1 = nn.Sequential(*[DenseDilated(24 + 8 * i, 8, d) for i, d in enumerate((1, 1, 2))])
        self.block2 = nn.Sequential(*[DenseDilated(48 + 8 * i, 8, d) for i, d in enumerate((2, 4, 8, 16))])
        self.project = nn.Conv2d(80, 4, 1)

    def forward(self, x):
        y = self.down3(self.down2(self.down1(x)))
        y = self.project(self.block2(self.block1(y)))
        y = F.interpolate(y, scale_factor=8, mode="bilinear", align_corners=True)
        if y.size(2) != x.size(2) or y.size(3) != x.size(3):
            y = F.interpolate(y, size=(x.size(2), x.size(3)), mode="bilinear", align_corners=True)
        return y


class Pyramid(nn.Module):
    """Dilations 1, 2, 4, 8 side by side, their sums one after the other put together."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        n = outputs // 4
        self.reduce = nn.Conv2d(inputs, n, 3, stride, 1, bias=False)
        self.d1, self.d2 = nn.Conv2d(n, n, 3, 1, 1, bias=False), nn.Conv2d(n, n, 3, 1, 2, 2, bias=False)
        self.d4, self.d8 = nn.Conv2d(n, n, 3, 1, 4, 4, bias=False), nn.Conv2d(n, n, 3, 1, 8, 8, bias=False)
        self.add, self.bn, self.act = stride == 1, nn.BatchNorm2d(outputs), nn.PReLU(outputs)

    def forward(self, input):
        x = self.reduce(input)
        add1 = self.d1(x)
        add2 = add1 + self.d2(x)
        add3 = add2 + self.d4(x)
        add4 = add3 + self.d8(x)
        combine = torch.cat([add1, add2, add3, add4], 1)
        return self.act(self.bn(input + combine if self.add else combine))


@network("dilation", "transposed", "modules")
class ESPNetLike(nn.Module):
    """Spatial pyramids of dilations; the image itself, pooled, put beside; transposed 2/2."""

    def __init__(self) -> None:
        super().__init__()
        self.level1 = conv(3, 8, 3, 2)
        self.pool1, self.pool2 = nn.AvgPool2d(3, stride=2, padding=1), nn.AvgPool2d(3, stride=2, padding=1)
        self.level2, self.more2 = Pyramid(11, 16, 2), nn.ModuleList([Pyramid(16, 16) for _ in range(2)])
        self.level3, self.more3 = Pyramid(35, 24, 2), nn.ModuleList([Pyramid(24, 24) for _ in range(2)])
        self.classify = nn.Conv2d(24, 4, 1)
        self.up3 = nn.ConvTranspose2d(4, 4, 2, stride=2, padding=0, output_padding=0, bias=False)
        self.up = nn.Sequential(
            conv(20, 8), nn.ConvTranspose2d(8, 4, 2, stride=2), nn.ConvTranspose2d(4, 4, 2, 2)
        )

    def forward(self, input):
        small = self.pool1(input)
        y = torch.cat([self.level1(input), small], 1)
        first = y = self.level2(y)
        for block in self.more2:
            y = block(y)
        z = self.level3(torch.cat([first, y, self.pool2(small)], 1))
        for block in self.more3:
            z = block(z)
        z = self.up3(self.classify(z))[:, :, : y.size(2), : y.size(3)]
        return self.up(torch.cat([z, y], 1))


class Refine(nn.Module):
    """Attention by the mean over the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.atten = conv(inputs, outputs), nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x):
        feat = self.conv(x)
        atten = F.avg_pool2d(feat, feat.size()[2:])
        return torch.mul(feat, torch.sigmoid(self.bn(self.atten(atten))))


@network("pads", "gates", "sizes", "outputs")
class BiSeNetLike(nn.Module):
    """A spatial and a context path; means by `avg_pool2d(x, x.size()[2:])`; three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.spatial = nn.Sequential(conv(3, 8, 7, 2), conv(8, 8, 3, 2), conv(8, 16, 3, 2))
        self.context8 = nn.Sequential(
            conv(3, 8, 3, 2), nn.MaxPool2d(3, 2, 1), Residual(8, 12), Residual(12, 12, 2)
        )
        self.context16, self.context32 = Residual(12, 16, 2), Residual(16, 24, 2)
        self.arm16, self.arm32, self.tail = Refine(16, 12), Refine(24, 12), conv(24, 12, 1)
        self.fuse, self.conv1, self.conv2 = conv(28, 16, 1), nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.heads = nn.ModuleList([nn.Sequential(conv(c, 8), nn.Conv2d(8, 4, 1)) for c in (16, 12, 12)])

    def forward(self, x):
        H, W = x.size()[2:]
        sp = self.spatial(x)
        f8 = self.context8(x)
        f16 = self.context16(f8)
        f32 = self.context32(f16)
        H16, W16 = f16.size()[2:]
        avg = self.tail(F.avg_pool2d(f32, f32.size()[2:]))
        avg_up = F.interpolate(avg, f32.size()[2:], mode="nearest")
        up32 = F.interpolate(self.arm32(f32) + avg_up, (H16, W16), mode="nearest")
        up16 = F.interpolate(self.arm16(f16) + up32, sp.size()[2:], mode="nearest")
        feat = self.fuse(torch.cat([sp, up16], dim=1))
        atten = F.avg_pool2d(feat, feat.size()[2:])
        atten = self.conv2(F.relu(self.conv1(atten), inplace=True)).sigmoid()
        feat = torch.mul(feat, atten) + feat
        maps = [head(m) for head, m in zip(self.heads, (feat, up16, up32))]
        return tuple(F.interpolate(m, (H, W), mode="bilinear", align_corners=True) for m in maps)


@network("bins", "resizing")
class FastSCNNLike(nn.Module):
    """Learning to downsample; depthwise separable; pooling to bins 1, 2, 3, 6 by modules made in `forward`."""

    def __init__(self) -> None:
        super().__init__()

        def ds(a, b, stride=1):
            return nn.Sequential(
                nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False), nn.BatchNorm2d(a), conv(a, b, 1)
            )

        self.down = nn.Sequential(conv(3, 8, 3, 2), ds(8, 12, 2), ds(12, 16, 2))
        self.features = nn.Sequential(ds(16, 16, 2), ds(16, 24, 2), ds(24, 24))
        self.branches = nn.ModuleList([conv(24, 6, 1) for _ in range(4)])
        self.out, self.dw = conv(48, 24, 1), nn.Conv2d(24, 24, 3, 1, 4, 4, groups=24)
        self.lower, self.higher = nn.Conv2d(24, 16, 1), nn.Conv2d(16, 16, 1)
        self.classify = nn.Sequential(ds(16, 16), nn.Dropout(0.1), nn.Conv2d(16, 4, 1))

    def pool(self, x, size):
        return nn.AdaptiveAvgPool2d(size)(x)

    def forward(self, x):
        size = x.size()[2:]
        higher = self.down(x)
        y = self.features(higher)
        inner = y.size()[2:]
        bins = [
            F.interpolate(branch(self.pool(y, n)), inner, mode="bilinear", align_corners=True)
            for branch, n in zip(self.branches, (1, 2, 3, 6))
        ]
        y = self.out(torch.cat([y, *bins], dim=1))
        y = F.interpolate(y, size=higher.size()[2:], mode="bilinear", align_corners=True)
        y = F.relu(self.higher(higher) + self.lower(F.relu(self.dw(y))))
        return F.interpolate(self.classify(y), size, mode="bilinear", align_corners=True)


class ContextGuided(nn.Module):
    """A local and a dilated surrounding convolution, and a gate by the mean."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        n = width // 2
        self.conv1x1, self.loc = conv(width, n, 1), nn.Conv2d(n, n, 3, padding=1, groups=n, bias=False)
        self.sur = nn.Conv2d(n, n, 3, padding=dilation, dilation=dilation, groups=n, bias=False)
        self.bn_prelu, self.pool = (
            nn.Sequential(nn.BatchNorm2d(width), nn.PReLU(width)),
            nn.AdaptiveAvgPool2d(1),
        )
        self.fc = nn.Sequential(nn.Linear(width, 4), nn.ReLU(inplace=True), nn.Linear(4, width), nn.Sigmoid())

    def forward(self, input):
        y = self.conv1x1(input)
        y = self.bn_prelu(torch.cat([self.loc(y), self.sur(y)], 1))
        b, c, _, _ = y.size()
        return input + y * self.fc(self.pool(y).view(b, c)).view(b, c, 1, 1)


@network("dilation", "gates", "modules")
class CGNetLike(nn.Module):
    """Context-guided blocks of dilation 2 and 4; the image itself injected at each scale."""

    def __init__(self) -> None:
        super().__init__()
        self.level1 = nn.Sequential(conv(3, 8, 3, 2), conv(8, 8))
        self.sample1 = nn.ModuleList([nn.AvgPool2d(3, stride=2, padding=1) for _ in range(1)])
        self.sample2 = nn.ModuleList([nn.AvgPool2d(3, stride=2, padding=1) for _ in range(2)])
        self.down2, self.level2 = conv(11, 16, 3, 2), nn.ModuleList([ContextGuided(16, 2) for _ in range(2)])
        self.down3, self.level3 = conv(35, 24, 3, 2), nn.ModuleList([ContextGuided(24, 4) for _ in range(3)])
        self.classifier = nn.Conv2d(48, 4, 1)

    def forward(self, input):
        inp1 = inp2 = input
        for pool in self.sample1:
            inp1 = pool(inp1)
        for pool in self.sample2:
            inp2 = pool(inp2)
        y = torch.cat((self.level1(input), inp1), 1)
        first = z = self.down2(y)
        for i, layer in enumerate(self.level2):
            z = layer(first) if i == 0 else layer(z)
        first = w = self.down3(torch.cat([first, z, inp2], 1))
        for layer in self.level3:
            w = layer(w)
        y = self.classifier(torch.cat([first, w], 1))
        return F.upsample(y, input.size()[2:], mode="bilinear", align_corners=False)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channels of all groups in turn."""
    batchsize, num_channels, height, width = x.data.size()
    x = x.view(batchsize, groups, num_channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batchsize, -1, height, width)


class SplitShuffle(nn.Module):
    """Channels are split, convolved in strips, put together, and shuffled."""

    def __init__(self, width: int, d: int) -> None:
        super().__init__()
        n = width // 2
        self.left = nn.Sequential(
            nn.Conv2d(n, n, (3, 1), padding=(1, 0)), nn.ReLU(), nn.Conv2d(n, n, (1, 3), padding=(0, 1)),
            nn.Conv2d(n, n, (3, 1), padding=(d, 0), dilation=(d, 1)), nn.BatchNorm2d(n),
        )  # fmt: skip
        self.right = nn.Sequential(
            nn.Conv2d(n, n, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Conv2d(n, n, (3, 1), padding=(1, 0)),
            nn.Conv2d(n, n, (1, 3), padding=(0, d), dilation=(1, d)), nn.BatchNorm2d(n),
        )  # fmt: skip

    def forward(self, x):
        c = int(x.size()[1])
        half = round(c * 0.5)
        y = torch.cat((self.left(x[:, :half, :, :]), self.right(x[:, half:, :, :])), 1)
        return channel_shuffle(F.relu(y + x), 2)


@network("shapes", "dilation", "data", "sizes", "gates")
class LEDNetLike(nn.Module):
    """Split, shuffled channels by `x.data.size()`; dilations that grow and start again; attention by a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            Initial(3, 8), SplitShuffle(8, 1), Initial(8, 16), SplitShuffle(16, 1), Initial(16, 24),
            SplitShuffle(24, 1), SplitShuffle(24, 2), SplitShuffle(24, 5), SplitShuffle(24, 9),
            SplitShuffle(24, 2), SplitShuffle(24, 5),
        )  # fmt: skip
        self.branch1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(24, 4, 1))
        self.mid, self.down1, self.down2 = conv(24, 4, 1), conv(24, 1, 7, 2), conv(1, 1, 5, 2)
        self.conv2, self.conv1 = conv(1, 1, 5), conv(1, 1, 7)

    def forward(self, input):
        x = self.encoder(input)
        h, w = x.size()[2], x.size()[3]
        b1 = F.interpolate(self.branch1(x), size=(h, w), mode="bilinear", align_corners=True)
        x1 = self.down1(x)
        x2 = F.interpolate(self.conv2(self.down2(x1)), size=x1.shape[2:], mode="bilinear", align_corners=True)
        y = F.interpolate(x2 + self.conv1(x1), size=(h, w), mode="bilinear", align_corners=True)
        y = torch.mul(y, self.mid(x)) + b1
        return F.interpolate(y, size=input.size()[2:], mode="bilinear", align_corners=True)
