"""U-Nets: how the decoder grows, and how its maps are made to fit those of the encoder."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from corpus_blocks import conv, twice
from torch import Tensor, nn

from benchmarks.zoo.corpus import network


class Steps(nn.Module):
    """The encoder of a U-Net, whose maps are at output strides 1, 2, 4, 8."""

    widths = (8, 16, 32, 64)

    def __init__(self, inputs: int = 3) -> None:
        super().__init__()
        self.inc = twice(inputs, 8)
        self.down1 = nn.Sequential(nn.MaxPool2d(2), twice(8, 16))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), twice(16, 32))
        self.down3 = nn.Sequential(nn.MaxPool2d(2), twice(32, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        return x1, x2, x3, self.down3(x3)


class PaddedUp(nn.Module):
    """Upsample, pad to the size of the skip, join."""

    def __init__(self, inputs: int, skip: int, outputs: int, bilinear: bool) -> None:
        super().__init__()
        if bilinear:
            self.up: nn.Module = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        else:
            self.up = nn.ConvTranspose2d(inputs, inputs, 2, stride=2)
        self.conv = twice(inputs + skip, outputs)

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        x1 = self.up(x1)
        dy = x2.size()[2] - x1.size()[2]
        dx = x2.size()[3] - x1.size()[3]
        x1 = F.pad(x1, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.conv(torch.cat([x2, x1], dim=1))


class PaddedUNet(nn.Module):
    """The U-Net that most tutorials have."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.encoder = Steps()
        self.up1 = PaddedUp(64, 32, 32, bilinear)
        self.up2 = PaddedUp(32, 16, 16, bilinear)
        self.up3 = PaddedUp(16, 8, 8, bilinear)
        self.out = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2, x3, x4 = self.encoder(x)
        x = self.up1(x4, x3)
        x = self.up2(x, x2)
        return self.out(self.up3(x, x1))


@network("transposed", "pads")
def unet_transposed() -> nn.Module:
    """ConvTranspose2d of kernel 2, stride 2; `F.pad` to the skip."""
    return PaddedUNet(bilinear=False)


@network("resizing", "pads")
def unet_bilinear() -> nn.Module:
    """Upsample(2, bilinear, align_corners=True); `F.pad` to the skip."""
    return PaddedUNet(bilinear=True)


@network("transposed", "pads", "modules")
class UNetStrided(nn.Module):
    """Strided convolutions down; ConvTranspose2d 3/2 with output padding up, cropped to the skip; loops over lists."""

    def __init__(self, widths=(8, 16, 32, 64)) -> None:
        super().__init__()
        self.stem = conv(3, widths[0])
        self.downs = nn.ModuleList([conv(a, b, 3, 2) for a, b in zip(widths, widths[1:])])
        self.ups = nn.ModuleList()
        self.joins = nn.ModuleList()
        for a, b in zip(widths[::-1], widths[-2::-1]):
            self.ups.append(nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1))
            self.joins.append(conv(2 * b, b))
        self.head = nn.Conv2d(widths[0], 3, 1)

    def forward(self, x):
        features = [self.stem(x)]
        for down in self.downs:
            features.append(down(features[-1]))
        y = features.pop()
        for up, join in zip(self.ups, self.joins):
            skip = features.pop()
            y = F.relu(up(y))[..., : skip.shape[-2], : skip.shape[-1]]
            y = join(torch.cat([y, skip], dim=1))
        return self.head(y)


def center_crop(layer: Tensor, target: list[int]) -> Tensor:
    """The middle of a map."""
    _, _, height, width = layer.size()
    y, x = (height - target[0]) // 2, (width - target[1]) // 2
    return layer[:, :, y : (y + target[0]), x : (x + target[1])]


@network("transposed", "pads", "sizes")
class UNetUnpadded(nn.Module):
    """As first published: convolutions without padding, and the middle of the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1 = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.enc2 = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.enc3 = nn.Sequential(nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 24, 3), nn.ReLU())
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(24, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.dec2 = nn.Sequential(nn.Conv2d(32, 16, 3), nn.ReLU())
        self.dec1 = nn.Sequential(nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        e1 = self.enc1(x)
        e2 = self.enc2(self.pool(e1))
        up = self.up2(self.enc3(self.pool(e2)))
        up = self.dec2(torch.cat([up, center_crop(e2, up.shape[2:])], 1))
        up = self.up1(up)
        return self.dec1(torch.cat([up, center_crop(e1, up.shape[2:])], 1))


@network("pads", "decisions", "transposed", "sizes")
class UNetPadsToMultiple(nn.Module):
    """The image is padded to a multiple of the stride, what comes out is cropped to it again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Steps()
        self.up3, self.dec3 = nn.ConvTranspose2d(64, 32, 2, 2), twice(64, 32)
        self.up2, self.dec2 = nn.ConvTranspose2d(32, 16, 2, 2), twice(32, 16)
        self.up1, self.dec1 = nn.ConvTranspose2d(16, 8, 2, 2), twice(16, 8)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        h, w = x.size(2), x.size(3)
        bottom = math.ceil(h / 8) * 8 - h
        right = math.ceil(w / 8) * 8 - w
        if bottom > 0 or right > 0:
            x = F.pad(x, (0, right, 0, bottom))
        x1, x2, x3, x4 = self.encoder(x)
        y = self.dec3(torch.cat([self.up3(x4), x3], 1))
        y = self.dec2(torch.cat([self.up2(y), x2], 1))
        y = self.dec1(torch.cat([self.up1(y), x1], 1))
        return self.out(y)[:, :, :h, :w]


def upsample_like(src: Tensor, tar: Tensor) -> Tensor:
    """Bilinear, to another map's size."""
    return F.interpolate(src, size=tar.shape[2:], mode="bilinear", align_corners=False)


class RSU(nn.Module):
    """A U-Net in the place of a convolution; its lowest one is dilated."""

    def __init__(self, inputs: int, outputs: int, inner: int = 6) -> None:
        super().__init__()
        self.convin = conv(inputs, outputs)
        self.conv1, self.conv2, self.conv3 = conv(outputs, inner), conv(inner, inner), conv(inner, inner)
        self.pool1 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.pool2 = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.conv4 = conv(inner, inner, dilation=2)
        self.conv3d, self.conv2d = conv(2 * inner, inner), conv(2 * inner, inner)
        self.conv1d = conv(2 * inner, outputs)

    def forward(self, x):
        hxin = self.convin(x)
        hx1 = self.conv1(hxin)
        hx2 = self.conv2(self.pool1(hx1))
        hx3 = self.conv3(self.pool2(hx2))
        hx3d = self.conv3d(torch.cat((self.conv4(hx3), hx3), 1))
        hx2d = self.conv2d(torch.cat((upsample_like(hx3d, hx2), hx2), 1))
        return self.conv1d(torch.cat((upsample_like(hx2d, hx1), hx1), 1)) + hxin


class DilatedRSU(nn.Module):
    """The same without pooling: dilations 1, 2, 4, 8 and back."""

    def __init__(self, inputs: int, outputs: int, inner: int = 6) -> None:
        super().__init__()
        self.convin = conv(inputs, outputs)
        self.conv1, self.conv2 = conv(outputs, inner), conv(inner, inner, dilation=2)
        self.conv3, self.conv4 = conv(inner, inner, dilation=4), conv(inner, inner, dilation=8)
        self.conv3d, self.conv2d = conv(2 * inner, inner, dilation=4), conv(2 * inner, inner, dilation=2)
        self.conv1d = conv(2 * inner, outputs)

    def forward(self, x):
        hxin = self.convin(x)
        hx1 = self.conv1(hxin)
        hx2 = self.conv2(hx1)
        hx3 = self.conv3(hx2)
        hx3d = self.conv3d(torch.cat((self.conv4(hx3), hx3), 1))
        hx2d = self.conv2d(torch.cat((hx3d, hx2), 1))
        return self.conv1d(torch.cat((hx2d, hx1), 1)) + hxin


@network("dilation", "resizing", "outputs")
class NestedSalience(nn.Module):
    """U-Nets within a U-Net (as U2-Net): dilation by design, side outputs, their fusion, sigmoids of all."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1, self.stage2 = RSU(3, 12), RSU(12, 16)
        self.stage3, self.stage4 = DilatedRSU(16, 16), DilatedRSU(16, 16)
        self.pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        self.stage3d, self.stage2d, self.stage1d = DilatedRSU(32, 16), RSU(32, 12), RSU(24, 12)
        self.side1, self.side2 = nn.Conv2d(12, 1, 3, padding=1), nn.Conv2d(12, 1, 3, padding=1)
        self.side3 = nn.Conv2d(16, 1, 3, padding=1)
        self.outconv = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        hx1 = self.stage1(x)
        hx2 = self.stage2(self.pool(hx1))
        hx3 = self.stage3(self.pool(hx2))
        hx4 = self.stage4(self.pool(hx3))
        hx3d = self.stage3d(torch.cat((upsample_like(hx4, hx3), hx3), 1))
        hx2d = self.stage2d(torch.cat((upsample_like(hx3d, hx2), hx2), 1))
        hx1d = self.stage1d(torch.cat((upsample_like(hx2d, hx1), hx1), 1))
        d1 = self.side1(hx1d)
        d2 = upsample_like(self.side2(hx2d), d1)
        d3 = upsample_like(self.side3(hx3d), d1)
        d0 = self.outconv(torch.cat((d1, d2, d3), 1))
        return torch.sigmoid(d0), torch.sigmoid(d1), torch.sigmoid(d2), torch.sigmoid(d3)


@network("norms", "transposed", "outputs", "modules")
class InstanceNormUNet(nn.Module):
    """Instance norms and leaky ReLU, strided, a list of outputs from the finest to the coarsest (as nnU-Net)."""

    def __init__(self, widths=(8, 16, 32, 64)) -> None:
        super().__init__()

        def step(a, b, stride=1):
            return nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1),
                nn.InstanceNorm2d(b, affine=True),
                nn.LeakyReLU(0.01, inplace=True),
            )

        self.stages = nn.ModuleList([nn.Sequential(step(3, 8), step(8, 8))])
        for a, b in zip(widths, widths[1:]):
            self.stages.append(nn.Sequential(step(a, b, 2), step(b, b)))
        pairs = list(zip(widths[::-1], widths[-2::-1]))
        self.transpconvs = nn.ModuleList([nn.ConvTranspose2d(a, b, 2, 2, bias=False) for a, b in pairs])
        self.decoder = nn.ModuleList([step(2 * b, b) for _, b in pairs])
        self.seg_layers = nn.ModuleList([nn.Conv2d(b, 3, 1) for _, b in pairs])

    def forward(self, x):
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        outputs = []
        lres = skips[-1]
        for s in range(len(self.decoder)):
            x = self.transpconvs[s](lres)
            x = self.decoder[s](torch.cat((x, skips[-(s + 2)]), 1))
            outputs.append(self.seg_layers[s](x))
            lres = x
        return outputs[::-1]


@network("dropout", "transposed", "gates")
class DropoutUNet(nn.Module):
    """Functional dropouts of channels; squeeze and excitation of the skips; sums for joins."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Steps()
        self.fc1, self.fc2 = nn.Linear(32, 4), nn.Linear(4, 32)
        self.up3, self.up2, self.up1 = (
            nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((64, 32), (32, 16), (16, 8))
        )
        self.dec3, self.dec2, self.dec1 = conv(32, 32), conv(16, 16), conv(8, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def excite(self, x):
        b, c, _, _ = x.size()
        weight = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3)))))).view(b, c, 1, 1)
        return x * weight.expand_as(x)

    def forward(self, x):
        x1, x2, x3, x4 = self.encoder(x)
        x4 = F.dropout2d(x4, 0.3, training=self.training)
        y = self.dec3(self.up3(x4) + self.excite(x3))
        y = F.dropout(self.dec2(self.up2(y) + x2), p=0.1, training=self.training)
        return self.out(F.dropout2d(self.dec1(self.up1(y) + x1), training=self.training))
