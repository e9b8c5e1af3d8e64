"""Python that networks contain: checks, messages, locks, settings, norms by another name, modules for a size."""

from __future__ import annotations

import logging
import math
import threading

import torch
import torch.nn.functional as F
from corpus_blocks import Encoder, Residual, conv
from torch import nn

from benchmarks.zoo.corpus import network

logger = logging.getLogger(__name__)


@network("decisions", "sizes")
class ChecksItsInput(nn.Module):
    """Asserts, messages and exceptions about the shape of the image."""

    def __init__(self, verbose: bool = False) -> None:
        super().__init__()
        self.verbose = verbose
        self.encoder, self.head = Encoder(), nn.Conv2d(64, 3, 1)

    def forward(self, x):
        assert x.dim() == 4, "expected a batch"
        assert x.shape[1] == 3, f"three channels expected, {x.shape[1]} came"
        if not isinstance(x, torch.Tensor):
            raise TypeError("a tensor is expected")
        if x.size(2) < 32 or x.size(3) < 32:
            raise ValueError(f"too small: {tuple(x.shape)}")
        logger.debug("image of %s", x.shape)
        if self.verbose:
            print("features", x.shape)
        y = self.head(self.encoder(x)[-1])
        logger.debug(f"scores of {y.size(2)}x{y.size(3)}")
        return F.interpolate(y, size=x.shape[2:], mode="bilinear")


@network("decisions", "pads", "sizes")
class LargestSide(nn.Module):
    """`max` and `min` of sizes, `math.ceil`, and a multiple of 32 by padding around."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.up, self.head = Encoder(), nn.Upsample(scale_factor=32), nn.Conv2d(64, 2, 1)

    def forward(self, x):
        h, w = x.shape[-2:]
        if max(h, w) > 2048 or min(h, w) < 16:
            raise ValueError("an image of 16 to 2048 pixels")
        new_h, new_w = int(math.ceil(h / 32) * 32), int(math.ceil(w / 32) * 32)
        top, left = (new_h - h) // 2, (new_w - w) // 2
        x = F.pad(x, (left, new_w - w - left, top, new_h - h - top))
        y = self.up(self.head(self.encoder(x)[-1]))
        return y[:, :, top : top + h, left : left + w]


@network("decisions", "sizes", "modules")
class SizesInLoops(nn.Module):
    """`for` over sizes, comprehensions, `zip` of sizes, star expressions."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Conv2d(64, 3, 1)

    def forward(self, x):
        *_, h, w = x.shape
        y = self.head(self.encoder(x)[-1])
        wanted = [n // 2 + n % 2 for n in (h, w)]
        scale = [a / b for a, b in zip(wanted, y.shape[2:])]
        y = y * (scale[0] / scale[1])
        b, c, *_ = y.shape
        y = F.interpolate(y.reshape(b, c, *y.shape[2:]), size=wanted, mode="bilinear")
        for side in y.shape[2:]:
            y = y * (1 + 1 / float(side))
        return y


@network("norms")
def sync_batch_norms() -> nn.Module:
    """Every batch norm became a SyncBatchNorm, as `convert_sync_batchnorm` does."""
    net = nn.Sequential(conv(3, 8, 3, 2), Residual(8, 16, 2), Residual(16, 32, 2), nn.Conv2d(32, 4, 1))
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


class ActivatedNorm(nn.BatchNorm2d):
    """A batch norm that ends in its activation."""

    def __init__(self, width: int, slope: float = 0.01) -> None:
        super().__init__(width)
        self.slope = slope

    def forward(self, input):
        return F.leaky_relu(super().forward(input), self.slope)


class FrozenNorm(nn.Module):
    """A batch norm of buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class ChannelNorm(nn.Module):
    """A layer norm over the channels of each position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@network("norms", "gates")
class ManyNorms(nn.Module):
    """A norm that activates, one of buffers, one of channels, a weight that is standardised, spectral norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, 2, 1), ActivatedNorm(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), FrozenNorm(12)
        self.conv3, self.norm3 = nn.Conv2d(12, 16, 3, 2, 1), ChannelNorm(16)
        self.conv4 = nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 16, 3, padding=1))
        self.conv5, self.norm5 = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.out = nn.Conv2d(16, 4, 1)

    def standardised(self, x):
        weight = self.conv5.weight
        weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(
            x, weight / (weight.flatten(1).std(dim=1).view(-1, 1, 1, 1) + 1e-5), self.conv5.bias, padding=1
        )

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        y = F.relu(self.norm2(self.conv2(y)))
        y = F.gelu(self.norm3(self.conv3(y)))
        y = F.relu(self.norm5(self.standardised(F.relu(self.conv4(y)))))
        return F.interpolate(self.out(y), x.shape[2:], mode="bilinear")


class Locked(nn.Module):
    """Counts its calls, one thread at a time: a lock cannot be copied."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.lock, self.calls = inner, threading.Lock(), 0

    def forward(self, x):
        with self.lock:
            self.calls += 1
        return self.inner(x)


class Keyed(nn.Module):
    """Remembers the names of its parts as `dict.keys()`, which cannot be copied."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.names, self.parts = parts.keys(), nn.ModuleDict(parts)

    def forward(self, x):
        for name in self.names:
            x = self.parts[name](x)
        return x


@network("copy")
def with_a_lock() -> nn.Module:
    """A module that holds a lock."""
    return nn.Sequential(
        Locked(conv(3, 8, 3, 2)), Residual(8, 16, 2), Residual(16, 32, 2), nn.Conv2d(32, 4, 1)
    )


@network("copy", "modules")
def with_dictionary_keys() -> nn.Module:
    """A module that holds the keys of a dictionary."""
    return Keyed(
        stem=conv(3, 8, 3, 2), one=Residual(8, 16, 2), two=Residual(16, 32, 2), head=nn.Conv2d(32, 4, 1)
    )


@network("data", "dropout")
class ChangesInPlace(nn.Module):
    """`.data`, `detach`, `+=`, `*=`, `clone`, `copy_`, `feature_dropout`, and a dropout by its own flag."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Conv2d(64, 3, 1)
        self.mean = nn.Parameter(torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), requires_grad=False)
        self.drop_rate = 0.2

    def forward(self, x):
        size = x.data.shape[2:]
        x = x.clone()
        x -= self.mean.data
        x *= 2.0
        y = self.encoder(x)[-1]
        if self.drop_rate > 0:
            y = F.dropout2d(y, p=self.drop_rate, training=self.training)
            y = F.alpha_dropout(y, 0.1, self.training)
        y += y.detach().mean((2, 3), keepdim=True)
        return F.interpolate(self.head(y), size=size, mode="bilinear", align_corners=True)


@network("decisions", "arguments", "modules", "outputs")
class Configured(nn.Module):
    """Settings decide: dictionaries of modules, functions by name, an output only while training."""

    def __init__(self, **settings) -> None:
        super().__init__()
        self.settings = {"act": "relu", "deep": True, "up": "bilinear", **settings}
        self.blocks = nn.ModuleDict(
            {"c2": conv(3, 8, 3, 2), "c3": conv(8, 12, 3, 2), "c4": conv(12, 16, 3, 2)}
        )
        self.head, self.aux = nn.Conv2d(16, 3, 1), nn.Conv2d(12, 3, 1)

    def forward(self, x, *, mode: str = "tensor", return_aux: bool = False):
        maps = {}
        y = x
        for name, block in self.blocks.items():
            y = getattr(F, self.settings["act"])(block(y))
            maps[name] = y
        assert isinstance(maps, dict) and len(maps) == 3
        resize = {"size": x.shape[2:], "mode": self.settings["up"]}
        out = {"out": F.interpolate(self.head(maps["c4"]), **resize)}
        if self.settings["deep"] and (self.training or return_aux):
            out["aux"] = F.interpolate(self.aux(maps["c3"]), **resize)
        return out if mode == "tensor" else out["out"].argmax(1)
