"""In the manner of libraries: layers by rows of a list, nested skips, gates of halves, outputs in other layouts."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import torch
import torch.nn.functional as F
from corpus_blocks import conv, twice
from torch import nn

from benchmarks.zoo.corpus import network

ROWS = [  # from, kind, outputs, stride
    (-1, "conv", 8, 2),
    (-1, "conv", 16, 2),
    (-1, "conv", 16, 1),
    (-1, "conv", 32, 2),
    (-1, "up", 32, 2),
    ((-1, 2), "cat", 48, 1),
    (-1, "conv", 16, 1),
    ((6, 3), "heads", 6, 1),
]


class Cat(nn.Module):
    """Channels of several layers."""

    def forward(self, maps):
        return torch.cat(maps, 1)


class Heads(nn.Module):
    """A head for each map; in evaluation mode all positions in a row, and the maps."""

    def __init__(self, widths, outputs) -> None:
        super().__init__()
        self.cv = nn.ModuleList(nn.Sequential(conv(c, 16), nn.Conv2d(16, outputs, 1)) for c in widths)

    def forward(self, maps):
        maps = [head(x) for head, x in zip(self.cv, maps, strict=True)]
        if self.training:
            return maps
        flat = torch.cat([x.view(x.shape[0], x.shape[1], -1) for x in maps], 2)
        return flat.sigmoid(), maps


@network("modules", "outputs", "resizing", "shapes")
class LayersByRows(nn.Module):
    """Layers from rows of a list; each knows its sources, and only what is read again is kept (as YOLO)."""

    def __init__(self) -> None:
        super().__init__()
        widths, layers, save = [3], [], set()
        for i, (source, kind, outputs, stride) in enumerate(ROWS):
            sources = source if isinstance(source, tuple) else (source,)
            save |= {s % i for s in sources if s != -1}
            inputs = [widths[-1] if s == -1 else widths[s + 1] for s in sources]
            layer = {
                "conv": lambda n=inputs[0], o=outputs, s=stride: conv(n, o, 3, s),
                "up": lambda s=stride: nn.Upsample(None, s, "nearest"),
                "cat": Cat,
                "heads": lambda n=inputs, o=outputs: Heads(n, o),
            }[kind]()
            layer.i, layer.f = i, source
            layers.append(layer)
            widths.append(outputs)
        self.model, self.save = nn.Sequential(*layers), sorted(save)

    def forward(self, x, augment=False, profile=False):
        y = []
        for layer in self.model:
            if layer.f != -1:
                x = y[layer.f] if isinstance(layer.f, int) else [x if j == -1 else y[j] for j in layer.f]
            x = layer(x)
            y.append(x if layer.i in self.save else None)
        return x


class Joined(nn.Module):
    """What comes in, and what a module makes of it."""

    def __init__(self, submodule: nn.Module) -> None:
        super().__init__()
        self.submodule = submodule

    def forward(self, x):
        return torch.cat([x, self.submodule(x)], dim=1)


@network("transposed", "modules", "norms")
def nested_skips():
    """A U-Net of nothing but nested Sequentials: each level is a module within the one above (as MONAI's)."""

    def down(inputs, outputs):
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(inputs, outputs, 3, 2, 1), norm=nn.InstanceNorm2d(outputs), act=nn.PReLU()
            )
        )

    def level(inputs, outputs, widths):
        inner, *deeper = widths
        below = level(inner, inner, deeper) if deeper else nn.Sequential(conv(inner, 2 * inner))
        joined = inner + (inner if deeper else 2 * inner)
        up = nn.ConvTranspose2d(joined, outputs, 3, 2, 1, output_padding=1)
        return nn.Sequential(down(inputs, inner), Joined(below), up)

    return level(3, 4, [8, 16, 32])


Features = namedtuple("Features", "fine middle coarse")


@network("outputs", "resizing", "shapes")
class ScoresLast(nn.Module):
    """Slices of an encoder give a named tuple; scores with the channels last, and the map before them (as CRAFT)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            *conv(3, 8, 3, 2),
            *twice(8, 16),
            nn.MaxPool2d(2),
            *conv(16, 32),
            nn.MaxPool2d(2),
            *conv(32, 32),
        ]
        self.slice1 = nn.Sequential(*layers[:5])
        self.slice2 = nn.Sequential(*[layers[i] for i in range(5, 9)])
        self.slice3 = nn.Sequential(*[layers[i] for i in range(9, len(layers))])
        self.up1, self.up2 = twice(64, 16), twice(32, 8)
        self.cls = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1))

    def forward(self, x):
        fine = self.slice1(x)
        middle = self.slice2(fine)
        sources = Features(fine, middle, self.slice3(middle))
        y = F.interpolate(sources.coarse, size=sources[1].size()[2:], mode="bilinear", align_corners=False)
        y = self.up1(torch.cat([y, sources[1]], dim=1))
        y = F.interpolate(y, size=sources[0].size()[2:], mode="bilinear", align_corners=False)
        feature = self.up2(torch.cat([y, sources[0]], dim=1))
        return self.cls(feature).permute(0, 2, 3, 1), feature


class Gate(nn.Module):
    """One half of the channels times the other."""

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        return x1 * x2


class GatedBlock(nn.Module):
    """Depthwise, gated, weighted by means of the channels; two learned scales that begin at zero."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, c), nn.GroupNorm(1, c)
        self.conv1, self.conv2 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, 2 * c, 3, 1, 1, groups=2 * c)
        self.conv3, self.conv4, self.conv5 = nn.Conv2d(c, c, 1), nn.Conv2d(c, 2 * c, 1), nn.Conv2d(c, c, 1)
        self.sca = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, c, 1))
        self.gate = Gate()
        self.beta = nn.Parameter(torch.zeros((1, c, 1, 1)), requires_grad=True)
        self.gamma = nn.Parameter(torch.zeros((1, c, 1, 1)), requires_grad=True)

    def forward(self, inp):
        x = self.gate(self.conv2(self.conv1(self.norm1(inp))))
        y = inp + self.conv3(x * self.sca(x)) * self.beta
        return y + self.conv5(self.gate(self.conv4(self.norm2(y)))) * self.gamma


@network("gates", "pads", "norms", "resizing")
class GatesOfHalves(nn.Module):
    """Restoration: padded to a multiple of the strides, halves as gates, shuffled pixels, cropped (as NAFNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.intro, self.ending = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.encoders = nn.ModuleList(GatedBlock(c) for c in (8, 16))
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, 2) for c in (8, 16))
        self.middle = GatedBlock(32)
        self.ups = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 2 * c, 1, bias=False), nn.PixelShuffle(2)) for c in (32, 16)
        )
        self.decoders = nn.ModuleList(GatedBlock(c) for c in (16, 8))
        self.padder_size = 4

    def forward(self, inp):
        _, _, height, width = inp.shape
        inp = self.check_image_size(inp)
        x, skips = self.intro(inp), []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.middle(x)
        for decoder, up, skip in zip(self.decoders, self.ups, skips[::-1], strict=True):
            x = decoder(up(x) + skip)
        return (self.ending(x) + inp)[:, :, :height, :width]

    def check_image_size(self, x):
        _, _, h, w = x.size()
        pad_h = (self.padder_size - h % self.padder_size) % self.padder_size
        pad_w = (self.padder_size - w % self.padder_size) % self.padder_size
        return F.pad(x, (0, pad_w, 0, pad_h))


@network("outputs", "modules")
class SideOutputs(nn.Module):
    """A map of edges after each block, at its own size; the mean of the image is a parameter (as ControlNet's HED)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.zeros(size=(1, 3, 1, 1)))
        self.block1, self.block2, self.block3 = twice(3, 8), twice(8, 16), twice(16, 32)
        self.side = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in (8, 16, 32))

    def forward(self, x):
        h = self.block1(x - self.norm)
        outputs = [self.side[0](h)]
        for block, side in ((self.block2, self.side[1]), (self.block3, self.side[2])):
            h = block(F.max_pool2d(h, kernel_size=(2, 2), stride=(2, 2)))
            outputs.append(side(h))
        return tuple(outputs)
