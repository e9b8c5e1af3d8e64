"""Image to image, flow, several images: generators, restoration, pairs and additional inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from corpus_blocks import Encoder, Residual, conv
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
