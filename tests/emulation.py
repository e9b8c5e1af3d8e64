"""What an adaptive network computes, by brute force on dense maps; imports nothing from cadsurgery.

A feature is a dense fine map that is constant on every cell ("nearest filled"). Every operation reads that
map by `fill`, works on it densely with taps `spacing` fine pixels apart, and keeps the value found at the
anchor of each cell of the new level map. This is the definition that the laws compare the package with.

    level map T (B, H, W): R = sides[T] is the side of the cell a fine pixel lies in; after stage j: min(T, j)
    corner of a pixel: o = R * (pixel // R) per axis; all pixels of a cell share it; the cell's value is D(o)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Padding = tuple[int, int, int, int]  # top, bottom, left, right


def pick(dense: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """dense[b, :, y[b, i, j], x[b, i, j]] for index maps (B, h, w)."""
    image = torch.arange(dense.shape[0])[:, None, None]
    return dense.permute(0, 2, 3, 1)[image, y, x].permute(0, 3, 1, 2)


def pixels(side: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column number of every pixel, (B, H, W) each."""
    batch, height, width = side.shape
    y = torch.arange(height)[None, :, None].expand(batch, height, width)
    x = torch.arange(width)[None, None, :].expand(batch, height, width)
    return y, x


def fill_cells(dense: Tensor, side: Tensor) -> Tensor:
    """Every pixel takes the value at the top-left pixel of its cell; `side` is that of the pixel's cell."""
    y, x = pixels(side)
    return pick(dense, side * (y // side), side * (x // side))


def read(dense: Tensor, side: Tensor, fill: str, guide: Tensor | None = None) -> Tensor:
    """The value read at every pixel of a cell-constant map.

    nearest: D. linear, per axis: (1 - delta / R) D(o) + (delta / R) D(o + R), indices clamped to the map. guided: with
    a guide g (B, D, H, W), each of these four with the weight b becomes b / (d + (T + eps |g|^2) / 100)^2, normalised,
    where d is its squared distance to the pixel in the guide and T the sum of all b d; without one, linear.
    """
    if fill == "nearest":
        return dense
    height, width = side.shape[1:]
    y, x = pixels(side)
    top, left = side * (y // side), side * (x // side)
    bottom, right = (top + side).clamp(max=height - 1), (left + side).clamp(max=width - 1)
    down = ((y - top).to(dense.dtype) / side)[:, None]
    across = ((x - left).to(dense.dtype) / side)[:, None]
    corners = [(top, left), (top, right), (bottom, left), (bottom, right)]
    shares = [v * h for v in (1 - down, down) for h in (1 - across, across)]
    if fill == "guided" and guide is not None:
        guide = guide[:, :, y[0, :, 0].clamp(max=guide.shape[2] - 1)]
        guide = guide[:, :, :, x[0, 0].clamp(max=guide.shape[3] - 1)]  # beyond the image its border goes on
        at_anchor = fill_cells(guide, side)
        apart = [(pick(at_anchor, *corner) - guide).square().mean(1, keepdim=True) for corner in corners]
        typical = sum(share * far for share, far in zip(shares, apart, strict=True))
        typical = typical + torch.finfo(guide.dtype).eps * guide.square().mean(1, keepdim=True)
        flat = typical == 0
        near = [1 / (far + typical / 100 + flat).square() for far in apart]
        shares = [share * weight for share, weight in zip(shares, near, strict=True)]
        total = sum(shares)
        shares = [share / total for share in shares]
    return sum(share * pick(dense, *corner) for share, corner in zip(shares, corners, strict=True))  # type: ignore[return-value]


def ceil_samples(length: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output samples of torch's own pooling of `length` samples with ceil_mode."""
    line = torch.zeros(1, 1, length)
    return F.max_pool1d(line, kernel, stride, padding, dilation, True).shape[2]


def bordered(samples: int, before: int, after: int, mode: str) -> Tensor:
    """Which of `samples` stands at each place of a line with a replicated or reflected border.

    A border as long as the line or longer, which torch refuses, is reflected at one end after the other.
    """
    places, last = torch.arange(-before, samples + after), samples - 1
    if mode == "replicate" or not last:
        return places.clamp(0, last)
    while int(places.min()) < 0 or int(places.max()) > last:
        places = places.abs()
        places = torch.where(places > last, 2 * last - places, places)
    return places


@dataclass(frozen=True)
class Feature:
    """A value of the network: a cell-constant fine map.

    Attributes:
        data: (B, C, H, W).
        stage: adaptive stages passed.
        stride: fine pixels per sample in the network as it is written.
    """

    data: Tensor
    stage: int
    stride: int = 1

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def size(self) -> tuple[int, int]:
        return self.data.shape[2], self.data.shape[3]


@dataclass(frozen=True)
class Emulation:
    """Operations on features for one legal level map.

    Attributes:
        levels: (B, H, W) int64, legal.
        strides: of the adaptive stages.
        fill: "linear", "nearest" or "guided".
        anchor: "corner", or "center": windows start at the middle of a cell (published).
        pool: "atrous", or "drop": a strided max-pool leaves cells alone that it does not downsample.
    """

    levels: Tensor
    strides: tuple[int, ...]
    fill: str = "linear"
    anchor: str = "corner"
    pool: str = "atrous"

    def side(self, stage: int, size: tuple[int, int]) -> Tensor:
        """(B, H, W) side of the cell each pixel lies in, after `stage`, on the map cut to `size`."""
        sides = [1]
        for stride in self.strides:
            sides.append(sides[-1] * stride)
        y, x = (
            torch.arange(length).clamp(max=most - 1)  # beyond the level map its border goes on
            for length, most in zip(size, self.levels.shape[1:], strict=True)
        )
        return torch.tensor(sides)[self.levels[:, y][:, :, x].clamp(max=stage)]

    def enter(self, dense: Tensor, stride: int = 1) -> Feature:
        """The fine map itself: level 0 everywhere."""
        return Feature(dense, 0, stride)

    def cut(self, data: Tensor, x: Feature, stage: int, size: tuple[int, int], stride: int = 1) -> Feature:
        """A dense result cropped to `size`, of which only the anchors of `stage` are kept."""
        data = data[:, :, : size[0], : size[1]]
        return Feature(fill_cells(data, self.side(stage, size)), stage, x.stride * stride)

    def coarsen(self, x: Feature, stage: int, size: tuple[int, int] | None = None) -> Feature:
        """The same feature after a later stage: the anchors that remain."""
        return self.cut(x.data, x, stage, size or x.size)

    def read(self, x: Feature, guide: Tensor | None = None) -> Tensor:
        """The dense map: every pixel read by `fill`, with a guide only where it leaves the region."""
        return read(x.data, self.side(x.stage, x.size), self.fill, guide)

    @staticmethod
    def fine_size(
        x: Feature,
        kernel: tuple[int, int],
        stride: int,
        dilation: tuple[int, int],
        padding: Padding,
        spacing: int,
        ceil_mode: bool = False,
    ) -> tuple[int, int]:
        """H' = min(H, n' spacing stride), with n' the output size in the network's own samples."""
        sizes = []
        for axis in (0, 1):
            samples = len(range(0, x.size[axis], spacing))
            before, after = padding[2 * axis : 2 * axis + 2]
            if ceil_mode and before == after:
                count = ceil_samples(samples, kernel[axis], stride, before, dilation[axis])
            elif ceil_mode:  # padded explicitly, so that the window has no padding of its own
                count = ceil_samples(samples + before + after, kernel[axis], stride, 0, dilation[axis])
            else:
                starts = range(0, samples + before + after - dilation[axis] * (kernel[axis] - 1), stride)
                count = len(starts)
            sizes.append(min(x.size[axis], count * spacing * stride))
        return sizes[0], sizes[1]

    def conv(
        self,
        x: Feature,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stage: int,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        padding: Padding = (0, 0, 0, 0),
        mode: str = "zeros",
        outside: float = 0.0,
        spacing: int = 1,
        groups: int = 1,
    ) -> Feature:
        """y(p) = sum_uv W[u, v] x(p + spacing (dilation (u, v) - padding)), x as read; anchors are kept."""
        kernel = (weight.shape[2], weight.shape[3])
        size = self.fine_size(x, kernel, stride, dilation, padding, spacing)
        padded = self._padded(self.read(x), kernel, dilation, padding, spacing, outside, mode)
        steps = (spacing * dilation[0], spacing * dilation[1])
        out = F.conv2d(padded, weight, bias, dilation=steps, groups=groups)
        if self.anchor == "center" and kernel != (1, 1):
            side = self.side(x.stage, x.size)
            y, c = pixels(side)
            out = pick(out, side * (y // side) + side // 2, side * (c // side) + side // 2)
        return self.cut(out, x, stage, size, stride)

    @staticmethod
    def _padded(
        values: Tensor,
        kernel: tuple[int, int],
        dilation: tuple[int, int],
        padding: Padding,
        spacing: int,
        value: float,
        mode: str = "zeros",
        beyond: float | None = None,
    ) -> Tensor:
        """The map inside its padding, with more below and to the right so that no pixel is lost: of the same `value`,
        unless something else is `beyond`. Reflected and replicated are `spacing` interleaved grids per axis, each as
        the network does it to its own grid, which goes on below and to the right."""
        top, bottom, left, right = (spacing * pad for pad in padding)
        below, beside = (step * (taps - 1) for step, taps in zip(dilation, kernel, strict=True))
        if mode == "zeros":
            around = F.pad(values, (left, right, top, bottom), value=value)
            more = (0, spacing * beside, 0, spacing * below)
            return F.pad(around, more, value=value if beyond is None else beyond)
        height, width = (-(-length // spacing) * spacing for length in values.shape[2:])
        around = values.new_zeros(*values.shape[:2], height + spacing * below, width + spacing * beside)
        for y in range(min(spacing, values.shape[2])):
            for c in range(min(spacing, values.shape[3])):
                grid = values[:, :, y::spacing, c::spacing]
                rows = bordered(grid.shape[2], padding[0], below - padding[0], mode)
                grid = grid[:, :, rows][..., bordered(grid.shape[3], padding[2], beside - padding[2], mode)]
                around[:, :, y::spacing, c::spacing][:, :, : grid.shape[2], : grid.shape[3]] = grid
        return around

    def max_pool(
        self,
        x: Feature,
        kernel: tuple[int, int],
        *,
        stage: int,
        stride: int = 1,
        dilation: tuple[int, int] = (1, 1),
        padding: Padding = (0, 0, 0, 0),
        mode: str = "zeros",
        outside: float = -torch.inf,
        spacing: int = 1,
        ceil_mode: bool = False,
    ) -> Feature:
        """Maximum over the window; outside the map is minus infinity, unless it was padded with something else."""
        size = self.fine_size(x, kernel, stride, dilation, padding, spacing, ceil_mode)
        values = self.read(x)
        padded = self._padded(values, kernel, dilation, padding, spacing, outside, mode, -torch.inf)
        height, width = (1 + spacing * dilation[i] * (kernel[i] - 1) for i in (0, 1))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        taps = windows[..., :: spacing * dilation[0], :: spacing * dilation[1]]
        out = taps.amax((4, 5))[:, :, : size[0], : size[1]]
        if self.pool == "drop" and stride > 1:
            kept = self.side(x.stage, size) == self.side(stage, size)
            out = torch.where(kept[:, None], x.data[:, :, : size[0], : size[1]], out)
        return self.cut(out, x, stage, size, stride)

    def drop_pool(self, x: Feature, *, stage: int, spacing: int) -> Feature:
        """As published: cells downsampled to `stage` take the maximum of their 2 x 2 cells, others stay."""
        side, before = self.side(stage, x.size), self.side(x.stage, x.size)
        boxes = F.max_pool2d(x.data, 2 * spacing)
        spread = boxes.repeat_interleave(2 * spacing, 2).repeat_interleave(2 * spacing, 3)
        return Feature(torch.where((side > before)[:, None], spread, x.data), stage, 2 * x.stride)

    def avg_pool(
        self,
        x: Feature,
        kernel: tuple[int, int],
        *,
        stage: int,
        stride: int = 1,
        padding: Padding = (0, 0, 0, 0),
        mode: str = "zeros",
        outside: float = 0.0,
        spacing: int = 1,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> Feature:
        """Sum over the window, divided by the taps in the padded map, in the map, or by `divisor`."""
        size = self.fine_size(x, kernel, stride, (1, 1), padding, spacing, ceil_mode)
        values = self.read(x)
        channels = values.shape[1]
        ones = values.new_ones(1, 1, *kernel)
        padded = self._padded(values, kernel, (1, 1), padding, spacing, outside, mode, 0.0)
        total = F.conv2d(padded, ones.expand(channels, 1, *kernel), dilation=spacing, groups=channels)
        inside, around = values.new_ones(1, 1, *x.size), float(count_include_pad)
        counted = self._padded(inside, kernel, (1, 1), padding, spacing, around, mode, 0.0)
        count = F.conv2d(counted, ones, dilation=spacing)
        return self.cut(total / (count if divisor is None else divisor), x, stage, size, stride)

    def weight_of_pixels(self, x: Feature) -> Tensor:
        """(B, H, W): how much each pixel of the filled map counts in a mean.

        Each pixel once, so a cell counts by its area in the map; but in an image with one level everywhere
        each cell counts once (a plain mean), whether the border cuts it or not.
        """
        side = self.side(x.stage, x.size)
        weight = torch.ones(side.shape, dtype=torch.float64)
        y, c = pixels(side)
        anchor = (y % side == 0) & (c % side == 0)
        for image in range(side.shape[0]):
            if int(side[image].min()) == int(side[image].max()):
                weight[image] = anchor[image].double() * side[image].numel() / anchor[image].sum()
        return weight

    def mean(self, x: Feature) -> Tensor:
        """(B, C, 1, 1) mean of each image."""
        weight = self.weight_of_pixels(x).to(x.data.dtype)[:, None]
        return (x.data * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True)

    def bins(self, x: Feature, size: tuple[int, int], spacing: int, largest: bool = False) -> Tensor:
        """(B, C, *size): the mean, or largest value, of each bin, torch's on the network's own grid, whose samples are
        `spacing` apart. Each pixel of the map counts once; in an image with one level everywhere its cells are whole,
        also those that the border cuts."""
        side = self.side(x.stage, x.size)
        images = []
        for image in range(len(x.data)):
            data, own = x.data[image], int(side[image].max())
            if own == int(side[image].min()):
                y, c = (torch.arange(-(-n // own) * own).clamp(max=n - 1) for n in x.size)
                data = data[:, y][:, :, c]
            lines = []
            for i in range(size[0]):
                for j in range(size[1]):
                    part = data
                    for axis, (number, bins, length) in enumerate(zip((i, j), size, x.size, strict=True), 1):
                        count = -(-length // spacing)
                        first, last = number * count // bins, -(-(number + 1) * count // bins)
                        part = part.narrow(
                            axis,
                            first * spacing,
                            min(last * spacing, part.shape[axis]) - first * spacing,
                        )
                    lines.append(part.amax((1, 2)) if largest else part.mean((1, 2)))
            images.append(torch.stack(lines, 1).unflatten(1, size))
        return torch.stack(images)

    def spread_small(
        self,
        small: Tensor,
        like: Feature,
        stage: int,
        size: tuple[int, int],
        samples: tuple[int, int],
        **how: Any,
    ) -> Tensor:
        """A small map resized to `samples` of the network's own grid, read at the centres of cells, or with aligned
        corners at their anchors; by `nearest` at the sample that the cell lies in."""
        side, ends = self.side(stage, size), []
        for at, have, want in zip(pixels(side), small.shape[2:], samples, strict=True):
            anchor = (side * (at // side)).double()
            if how["mode"] == "nearest":
                own = (anchor // like.stride).long().clamp(max=want - 1)
                line = torch.arange(have, dtype=torch.float32).view(1, 1, have)
                place = F.interpolate(line, want).flatten().long()[own].double()
            elif how["align_corners"]:
                place = anchor / like.stride * (have - 1) / max(want - 1, 1)
            else:
                place = (anchor + side / 2) / like.stride * have / want - 0.5
            place = place.clamp(0, have - 1)
            low = place.floor()
            share = (place - low).to(small.dtype)
            ends.append(((low.long(), 1 - share), ((low.long() + 1).clamp(max=have - 1), share)))
        small = small.expand(len(side), -1, -1, -1)
        return sum((v * h)[:, None] * pick(small, y, c) for y, v in ends[0] for c, h in ends[1])  # type: ignore[return-value]

    def maximum(self, x: Feature) -> Tensor:
        """(B, C, 1, 1) maximum of each image."""
        return x.data.amax((2, 3), keepdim=True)

    def batch_norm(
        self, x: Feature, weight: Tensor, bias: Tensor, eps: float, *, weighted: bool = True
    ) -> tuple[Feature, Tensor, Tensor]:
        """Training-mode normalisation over all images, with the mean and biased variance it used."""
        if weighted:
            share = self.weight_of_pixels(x)
        else:  # each cell once: its anchor
            side = self.side(x.stage, x.size)
            y, c = pixels(side)
            share = ((y % side == 0) & (c % side == 0)).double()
        share = (share / share.sum()).to(x.data.dtype)[:, None]
        mean = (x.data * share).sum((0, 2, 3), keepdim=True)
        variance = ((x.data - mean).square() * share).sum((0, 2, 3), keepdim=True)
        scaled = (x.data - mean) / (variance + eps).sqrt() * weight[:, None, None] + bias[:, None, None]
        return replace(x, data=scaled), mean.flatten(), variance.flatten()

    def group_norm(
        self, x: Feature, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Feature:
        """Each image and group of channels by its own mean and biased variance."""
        share = self.weight_of_pixels(x).to(x.data.dtype)
        share = (share / share.sum((1, 2), keepdim=True))[:, None, None]
        values = x.data.unflatten(1, (groups, -1))
        mean = (values * share).sum((3, 4), keepdim=True).mean(2, keepdim=True)
        variance = ((values - mean).square() * share).sum((3, 4), keepdim=True).mean(2, keepdim=True)
        data = ((values - mean) / (variance + eps).sqrt()).flatten(1, 2)
        if weight is not None:
            data = data * weight[:, None, None]
        return replace(x, data=data if bias is None else data + bias[:, None, None])

    def transposed(
        self,
        x: Feature,
        weight: Tensor,
        bias: Tensor | None,
        *,
        stage: int,
        stride: int,
        padding: tuple[int, int],
        more: tuple[int, int],
        spacing: int,
        groups: int,
    ) -> Feature:
        """A transposed convolution: y(q) = sum_t W[t] x(q + s (padding - t)), s = spacing / stride, x as read, zero
        outside, over the taps t that are q // s + padding modulo the stride: those of the sample of the network's own
        output grid that q lies in. On that grid, and on any shifted by less than s, it is torch's.

        Args:
            weight: (C, O / groups, kh, kw), as torch has it.
            more: torch's output_padding.
        """
        step, size = spacing // stride, []
        for axis, whole in enumerate(self.levels.shape[1:]):
            samples = -(-x.size[axis] // spacing)
            count = (samples - 1) * stride - 2 * padding[axis] + weight.shape[2 + axis] + more[axis]
            size.append(min(count * step, whole) if count <= -(-whole // step) else count * step)
        values = self.read(x).unflatten(1, (groups, -1))
        by_group = weight.unflatten(0, (groups, -1))
        out = values.new_zeros(len(values), groups, weight.shape[1], *size)
        y, c = (torch.arange(length) for length in size)
        for v in range(weight.shape[2]):
            for h in range(weight.shape[3]):
                of_phase, places, inside = [], [], []
                for at, tap, pad, length in zip((y, c), (v, h), padding, x.size, strict=True):
                    of_phase.append((at // step + pad - tap) % stride == 0)
                    place = at + step * (pad - tap)
                    inside.append((place >= 0) & (place < length))
                    places.append(place.clamp(0, length - 1))
                counts = (of_phase[0] & inside[0])[:, None] & (of_phase[1] & inside[1])
                seen = values[..., places[0], :][..., places[1]]
                out += torch.einsum("bgchw,gco->bgohw", seen, by_group[..., v, h]) * counts
        data = out.flatten(1, 2) + (0 if bias is None else bias[:, None, None])
        return Feature(fill_cells(data, self.side(stage, (size[0], size[1]))), stage, step)

    def max_pool_taps(
        self,
        x: Feature,
        kernel: tuple[int, int],
        *,
        stride: int,
        dilation: tuple[int, int],
        padding: Padding,
        spacing: int,
    ) -> Tensor:
        """Which tap of its window each value of `max_pool` is, by number, at every pixel; the first of equals."""
        padded = self._padded(self.read(x), kernel, dilation, padding, spacing, -torch.inf)
        height, width = x.size
        taps = [
            padded[:, :, v : v + height, h : h + width]
            for v in range(0, spacing * dilation[0] * kernel[0], spacing * dilation[0])
            for h in range(0, spacing * dilation[1] * kernel[1], spacing * dilation[1])
        ]
        return torch.stack(taps).max(0).indices

    def unshuffle(self, x: Feature, factor: int, *, stage: int, spacing: int) -> Feature:
        """Space to depth: the values under a window side by side in the channels, zeros outside the map."""
        size = self.fine_size(x, (factor, factor), factor, (1, 1), (0, 0, 0, 0), spacing)
        padded = self._padded(self.read(x), (factor, factor), (1, 1), (0, 0, 0, 0), spacing, 0.0)
        height, width = x.size
        taps = [
            padded[:, :, spacing * v : spacing * v + height, spacing * h : spacing * h + width]
            for v in range(factor)
            for h in range(factor)
        ]
        return self.cut(torch.stack(taps, 2).flatten(1, 2), x, stage, size, factor)

    def resize(
        self,
        x: Feature,
        *,
        stage: int,
        spacings: tuple[int, int],
        samples: tuple[int, int],
        mode: str,
        align_corners: bool,
        whole: tuple[int, int],
    ) -> Feature:
        """Upsampling inside the region to `samples` on the network's own grid, at most the fine map's `whole` size.

        Where a cell is as large as the one it lies in, that one's value. Else between cells of the size R of that one:
        at its place (y + side / 2) ratio - R / 2 (y ratio with align_corners) fine pixels from the border, in steps of
        R; ratio is one where the sizes divide. A map that stays on its grid and is stretched by a sample or so is read
        between cells of every size.
        """
        before, after = spacings
        samples_before = tuple(-(-length // before) for length in x.size)
        stretched = before == after and samples_before != tuple(samples)
        size = tuple(min(count * after, most) for count, most in zip(samples, whole, strict=True))
        target = self.side(stage, whole)[:, : size[0], : size[1]]
        source = self.side(x.stage, x.size)
        y, c = pixels(target)
        places = (y.clamp(max=x.size[0] - 1), c.clamp(max=x.size[1] - 1))
        cell = pick(source[:, None], *places)[:, 0]
        ends = []
        for axis, at in enumerate((y.double(), c.double())):
            own, most = -(-x.size[axis] // before), x.size[axis] - 1
            wanted = samples[axis]
            if align_corners:
                own, wanted = own - 1, max(wanted - 1, 1)
            ratio = own * before / (wanted * after)
            if mode == "nearest":
                place = (at * ratio / cell).floor() * cell
            elif align_corners:
                place = at * ratio
            else:
                place = (at + target / 2) * ratio - cell / 2
            same = (cell == target) & (not stretched)
            place = torch.where(same, at, place).clamp(min=0)
            low = (place / cell + 1e-9).floor()
            share = torch.where(same, 0.0, (place / cell - low).clamp(min=0)).to(x.data.dtype)
            first = (low * cell).long().clamp(max=most)
            ends.append(((first, 1 - share), ((first + cell).clamp(max=most), share)))
        data = sum((v * h)[:, None] * pick(x.data, at, c) for at, v in ends[0] for c, h in ends[1])
        return Feature(fill_cells(data, target), stage, after)

    def resize_to_dense(
        self,
        x: Feature,
        *,
        spacing: int,
        samples: tuple[int, int],
        scales: tuple[float, float] | None,
        mode: str,
        align_corners: bool,
        guide: Tensor | None,
    ) -> Tensor:
        """A resize of the network's own map, which has a sample on every `spacing`-th pixel, read from the cells.

        Output sample p is at u(p) own samples from the first, as torch has it, so at the pixel q = spacing u(p).
        Bilinear reads the map between pixels s apart: 1 if the fill is linear, else the side of the cell at q, at most
        `spacing`. Nearest takes the cell that holds torch's index on the fine grid.

        Args:
            x: the map.
            spacing: between own samples.
            samples: of the output.
            scales: own samples per sample of the output, if they are given and not that of the sizes.
            mode: `nearest`, `nearest-exact` or `bilinear`.
            align_corners: as in torch.
            guide: of a guided fill.
        """
        places = []
        for axis, (length, wanted) in enumerate(zip(x.size, samples, strict=True)):
            own, p = -(-length // spacing), torch.arange(wanted, dtype=torch.float64)
            scale = own / wanted if scales is None else scales[axis]
            if mode != "bilinear":
                at = (p + 0.5 * (mode == "nearest-exact")) * scale
                index = (at + 1e-9).floor().clamp(max=own - 1)
                within = (spacing * (at - index) + 1e-6).floor().clamp(0, spacing - 1)
                places.append((spacing * index + within).long().clamp(max=length - 1))
                continue
            at = p * ((own - 1) / max(wanted - 1, 1)) if align_corners else (p + 0.5) * scale - 0.5
            at = spacing * at.clamp(0, own - 1)
            whole = at.round()  # on a pixel, rounding must not decide in which cell it is
            places.append(torch.where((at - whole).abs() < 1e-6, whole, at))
        shape = (len(x.data), *samples)
        y, c = places[0][None, :, None].expand(shape), places[1][None, None, :].expand(shape)
        if mode != "bilinear":
            return pick(x.data, y, c)
        side = self.side(x.stage, x.size)
        apart = pick(side[:, None], y.long(), c.long())[:, 0].clamp(max=spacing)
        apart = torch.ones_like(apart) if self.fill == "linear" else apart
        fine, ends = self.read(x, guide), []
        for at, length in ((y, x.size[0]), (c, x.size[1])):
            last = (-(-length // spacing) - 1) * spacing
            first = (at / apart).floor() * apart
            share = ((at - first) / apart).to(fine.dtype)
            ends.append(((first.long(), 1 - share), ((first + apart).clamp(max=last).long(), share)))
        return sum((v * h)[:, None] * pick(fine, at, a) for at, v in ends[0] for a, h in ends[1])

    def join(self, function: Callable[..., Tensor], *values: Feature) -> Feature:
        """A pointwise function of features, on the last stage and smallest size among them."""
        stage = max(value.stage for value in values)
        size = (min(value.size[0] for value in values), min(value.size[1] for value in values))
        data = [self.coarsen(value, stage, size).data for value in values]
        return Feature(function(*data), stage, values[0].stride)


def finish(emulation: Emulation, value: Any, guide: Tensor | None = None) -> Any:
    """A result with each feature read as a dense map."""
    if isinstance(value, dict):
        return {key: finish(emulation, entry, guide) for key, entry in value.items()}
    return emulation.read(value, guide) if isinstance(value, Feature) else value
