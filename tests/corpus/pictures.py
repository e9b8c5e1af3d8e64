"""Image to image, flow, several images: generators, restoration, pairs and additional inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import Encoder, Residual, conv, twice
from torch import nn

from benchmarks.zoo.corpus import network


class ReflectedResidual(nn.Module):
    """Two convolutions on reflected borders with instance norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width), nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3), nn.InstanceNorm2d(width),
        )  # fmt: skip

    def forward(self, x):
        return x + self.block(x)


@network("transposed", "norms", "pads")
class ResidualGenerator(nn.Module):
    """Two strided convolutions, residual blocks, two transposed 3/2; reflected borders (as CycleGAN)."""

    def __init__(self) -> None:
        super().__init__()
        model: list[nn.Module] = [
            nn.ReflectionPad2d(3),
            nn.Conv2d(3, 8, 7),
            nn.InstanceNorm2d(8),
            nn.ReLU(True),
        ]
        for a, b in ((8, 16), (16, 32)):
            model += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.InstanceNorm2d(b), nn.ReLU(True)]
        model += [ReflectedResidual(32) for _ in range(3)]
        for a, b in ((32, 16), (16, 8)):
            model += [
                nn.ConvTranspose2d(a, b, 3, stride=2, padding=1, output_padding=1),
                nn.InstanceNorm2d(b),
                nn.ReLU(True),
            ]
        model += [nn.ReflectionPad2d(3), nn.Conv2d(8, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*model)

    def forward(self, input):
        return self.model(input)


@network("resizing", "pads")
class StyleTransfer(nn.Module):
    """Reflected borders, batch norms, nearest upsampling before convolutions."""

    def __init__(self) -> None:
        super().__init__()

        def step(a, b, k, s=1):
            return nn.Sequential(
                nn.ReflectionPad2d(k // 2), nn.Conv2d(a, b, k, s), nn.BatchNorm2d(b), nn.ReLU()
            )

        self.down = nn.Sequential(step(3, 8, 9), step(8, 16, 3, 2), step(16, 32, 3, 2))
        self.res = nn.Sequential(Residual(32, 32), Residual(32, 32))
        self.up1, self.up2 = step(32, 16, 3), step(16, 8, 3)
        self.last = nn.Sequential(nn.ReflectionPad2d(4), nn.Conv2d(8, 3, 9))

    def forward(self, x):
        y = self.res(self.down(x))
        y = self.up1(F.interpolate(y, scale_factor=2))
        y = self.up2(nn.functional.interpolate(y, mode="nearest", scale_factor=2))
        return self.last(y)


class SkipBlock(nn.Module):
    """A U-Net by recursion: everything below it stands inside it."""

    def __init__(
        self, outer: int, inner: int, inside: nn.Module | None = None, outermost: bool = False
    ) -> None:
        super().__init__()
        self.outermost = outermost
        down = nn.Conv2d(3 if outermost else outer, inner, 4, 2, 1)
        up = nn.ConvTranspose2d(inner * (1 if inside is None else 2), outer, 4, 2, 1)
        end: list[nn.Module] = [nn.Tanh()] if outermost else [nn.BatchNorm2d(outer)]
        middle = [] if inside is None else [inside]
        self.model = nn.Sequential(
            nn.LeakyReLU(0.2), down, nn.BatchNorm2d(inner), *middle, nn.ReLU(), up, *end
        )

    def forward(self, x):
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


@network("transposed")
def recursive_generator() -> nn.Module:
    """Convolutions 4/2 down and transposed 4/2 up, one block within the other (as pix2pix)."""
    block = SkipBlock(32, 64)
    for a, b in ((16, 32), (8, 16)):
        block = SkipBlock(a, b, block)
    return SkipBlock(3, 8, block, outermost=True)


@network("resizing", "shapes")
class ShuffledRestoration(nn.Module):
    """Denoising at half the resolution: PixelUnshuffle, convolutions with a stride, PixelShuffle, plus the image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
        self.down, self.body = conv(16, 24, 3, 2), nn.Sequential(conv(24, 24), conv(24, 24))
        self.up = nn.Sequential(nn.Conv2d(24, 64, 1), nn.PixelShuffle(2))
        self.tail = nn.Sequential(nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, x):
        h, w = x.shape[-2:]
        padded = F.pad(x, (0, w % 2, 0, h % 2), mode="replicate")
        y = self.head(padded)
        z = self.up(self.body(self.down(y)))[..., : y.shape[-2], : y.shape[-1]]
        return x - self.tail(y + z)[..., :h, :w]


@network("resizing", "outputs", "sizes")
class MultiScaleRestoration(nn.Module):
    """The image at three sizes goes in, and an image of each comes out (as MIMO-UNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.feat = nn.ModuleList([conv(3, 8), conv(8, 16, 3, 2), conv(16, 32, 3, 2)])
        self.scm1, self.scm2 = conv(3, 16), conv(3, 32)
        self.body = nn.ModuleList([Residual(8, 8), Residual(16, 16), Residual(32, 32)])
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.out2, self.out1, self.out0 = (
            nn.Conv2d(32, 3, 3, padding=1),
            nn.Conv2d(16, 3, 3, padding=1),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def forward(self, x):
        x_2 = F.interpolate(x, scale_factor=0.5)
        x_4 = F.interpolate(x_2, scale_factor=0.5)
        z0 = self.body[0](self.feat[0](x))
        z1 = self.body[1](self.feat[1](z0) * self.scm1(x_2))
        z2 = self.body[2](self.feat[2](z1) + self.scm2(x_4))
        outputs = [self.out2(z2) + x_4]
        z = self.up2(z2) + z1
        outputs.append(self.out1(z) + x_2)
        outputs.append(self.out0(self.up1(z) + z0) + x)
        return outputs


@network("transposed", "outputs", "pads")
class FlowPair(nn.Module):
    """Flow from two images as six channels (as FlowNetS): kernels 7, 5, 3; flows of three scales."""

    def __init__(self) -> None:
        super().__init__()

        def step(a, b, k, s=2):
            return nn.Sequential(nn.Conv2d(a, b, k, s, (k - 1) // 2), nn.LeakyReLU(0.1, inplace=True))

        self.conv1, self.conv2, self.conv3, self.conv4 = (
            step(6, 8, 7),
            step(8, 16, 5),
            step(16, 32, 3),
            step(32, 48, 3),
        )
        self.flow4, self.flow3, self.flow2 = (nn.Conv2d(c, 2, 3, 1, 1) for c in (48, 66, 50))
        self.up4, self.up3 = (
            nn.ConvTranspose2d(2, 2, 4, 2, 1, bias=False),
            nn.ConvTranspose2d(2, 2, 4, 2, 1, bias=False),
        )
        self.deconv3 = nn.Sequential(nn.ConvTranspose2d(48, 32, 4, 2, 1), nn.LeakyReLU(0.1))
        self.deconv2 = nn.Sequential(nn.ConvTranspose2d(66, 32, 4, 2, 1), nn.LeakyReLU(0.1))

    @staticmethod
    def crop_like(input, target):
        if input.size()[2:] == target.size()[2:]:
            return input
        return input[:, :, : target.size(2), : target.size(3)]

    def forward(self, x):
        c2 = self.conv2(self.conv1(x))
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        flow4 = self.flow4(c4)
        concat3 = torch.cat(
            (c3, self.crop_like(self.deconv3(c4), c3), self.crop_like(self.up4(flow4), c3)), 1
        )
        flow3 = self.flow3(concat3)
        up, flow = self.crop_like(self.deconv2(concat3), c2), self.crop_like(self.up3(flow3), c2)
        return self.flow2(torch.cat((c2, up, flow), 1)), flow3, flow4


@network("factories", "sizes")
class Coordinates(nn.Module):
    """Where a pixel is, as two channels more (CoordConv), by `linspace` and `expand`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.encoder = conv(5, 8), Encoder(8)
        self.out = nn.Conv2d(64, 2, 1)

    def add_coords(self, x):
        b, _, h, w = x.size()
        ys = torch.linspace(-1, 1, h, device=x.device).view(1, 1, h, 1).expand(b, 1, h, w)
        xs = torch.linspace(-1, 1, w, device=x.device).view(1, 1, 1, w).expand(b, 1, h, w)
        return torch.cat([x, ys.type_as(x), xs.type_as(x)], dim=1)

    def forward(self, x):
        return F.interpolate(self.out(self.encoder(self.first(self.add_coords(x)))[-1]), size=x.shape[2:])


@network("factories", "sizes", "resizing")
class CoordinatesInside(nn.Module):
    """Coordinates by `meshgrid` of `arange` in front of the head, at the features' size; zeros by `new_zeros`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Sequential(conv(67, 16), nn.Conv2d(16, 3, 1))

    def forward(self, x):
        y = self.encoder(x)[-1]
        n, h, w = y.size(0), y.size(2), y.size(3)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        grid = torch.stack([rows / h, columns / w]).to(y).unsqueeze(0).repeat(n, 1, 1, 1)
        y = self.head(torch.cat([y, grid, y.new_zeros(n, 1, h, w)], 1))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear")


@network("inputs", "resizing", call=lambda x: (x, x.flip(2)))
class ChangePair(nn.Module):
    """Change between two images: one encoder called twice, differences of each scale decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.fuse = nn.ModuleList([conv(c, 12, 1) for c in Encoder.widths])
        self.out = nn.Sequential(conv(48, 16), nn.Conv2d(16, 2, 1))

    def forward(self, before, after):
        maps = []
        for fuse, a, b in zip(self.fuse, self.encoder(before), self.encoder(after)):
            y = fuse(torch.abs(a - b))
            maps.append(y if not maps else F.interpolate(y, size=maps[0].shape[2:], mode="bilinear"))
        return F.interpolate(self.out(torch.cat(maps, 1)), size=before.shape[2:], mode="bilinear")


@network("inputs", "gates", call=lambda x: {"image": x, "mask": (x[:, :1] > 0).to(x.dtype)})
class Inpainting(nn.Module):
    """Gated convolutions on an image with a hole, and its mask, by name; the hole is filled."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((4, 8, 1, 1), (8, 16, 2, 1), (16, 24, 2, 1), (24, 24, 1, 1))
        self.convs = nn.ModuleList([nn.Conv2d(a, 2 * b, 3, s, d, d) for a, b, s, d in shapes])
        self.ups = nn.ModuleList([nn.Conv2d(24, 2 * 16, 3, 1, 1), nn.Conv2d(16, 2 * 8, 3, 1, 1)])
        self.out = nn.Conv2d(8, 3, 3, 1, 1)

    @staticmethod
    def gated(x):
        feature, gate = torch.chunk(x, 2, dim=1)
        return F.elu(feature) * torch.sigmoid(gate)

    def forward(self, image, mask):
        size = image.shape[2:]
        x = torch.cat([image * (1.0 - mask), mask], dim=1)
        for step in self.convs:
            x = self.gated(step(x))
        for step in self.ups:
            x = self.gated(step(F.interpolate(x, scale_factor=2, mode="nearest")))
        x = torch.tanh(self.out(x))[:, :, : size[0], : size[1]]
        return x * mask + image * (1 - mask)


@network("inputs", "modules", call=lambda x: ([x, x.mean(1, keepdim=True)],))
class ImageAndDepth(nn.Module):
    """A list of image and depth; two encoders whose maps are added after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rgb = nn.ModuleList([conv(3, 8, 3, 2), Residual(8, 16, 2), Residual(16, 32, 2)])
        self.depth = nn.ModuleList([conv(1, 8, 3, 2), Residual(8, 16, 2), Residual(16, 32, 2)])
        self.out = nn.Conv2d(32, 4, 1)

    def forward(self, inputs):
        rgb, depth = inputs
        size = rgb.shape[2:]
        for step, other in zip(self.rgb, self.depth):
            depth = other(depth)
            rgb = step(rgb) + depth
        return F.interpolate(self.out(rgb), size=size, mode="bilinear")


@network("inputs", "outputs", call=lambda x: ({"image": x, "label": torch.zeros(len(x))},))
class Batches(nn.Module):
    """A dictionary goes in, as a data loader gives it, and one comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Sequential(twice(64, 16), nn.Conv2d(16, 4, 1))

    def forward(self, batch):
        image = batch["image"]
        logits = F.interpolate(self.head(self.encoder(image)[-1]), size=image.shape[2:], mode="bilinear")
        return {"logits": logits, "classes": logits.argmax(1)}


@network("inputs", "arguments", "decisions", call=lambda x: {"pixel_values": x})
class KeywordImage(nn.Module):
    """The image as a keyword, others that are None, a dictionary or a tuple (as transformers has it)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Conv2d(64, 4, 1)

    def forward(self, input_ids=None, pixel_values=None, labels=None, return_dict: bool = True):
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        loss = None
        logits = self.head(self.encoder(pixel_values)[-1])
        if labels is not None:
            loss = F.cross_entropy(logits, labels)
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return {"loss": loss, "logits": logits}
