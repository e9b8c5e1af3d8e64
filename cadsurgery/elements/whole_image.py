"""Operations on an image as a whole: normalisation, means, sums, and the products of channel attention.

Elements are weighted by the area of their cells. A sum or norm is the weighted mean times the number of samples on the
network's own grid, so that it keeps the scale the weights were trained with, at any resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.elements.axes import NCHW, image_dims
from cadsurgery.elements.backends.choose import compute
from cadsurgery.elements.backends.packed import ScaleShift
from cadsurgery.elements.backends.sums import as_map_of_rows, back_to_rows, sum_products, weigh_rows
from cadsurgery.elements.backends.works import Normalising, Weighing
from cadsurgery.elements.elements import Elements, check_joint, native_shape, own_image, rows_on
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.operations import operation
from cadsurgery.elements.sizes import divide_up
from cadsurgery.support.autocast import no_autocast
from cadsurgery.support.processes import count_together
from cadsurgery.support.running import running

_MANY = 1 << 16  # positions whose sum in float32 is off by about 1e-5 if they are added one by one


@operation(reads="element")
def batch_norm(
    x: Elements, norm: nn.BatchNorm2d | nn.SyncBatchNorm, *, weighted: bool | None = None
) -> Elements:
    """Apply batch normalisation with the parameters and statistics of `norm`.

    In training the statistics are computed over the real (not padding) elements of all images. With `weighted`
    each element counts by the area of its cell, so that the statistics estimate the dense network's; False counts
    each element once, as published; None uses the geometry's setting. Running statistics are updated as in torch.
    A `SyncBatchNorm` in training uses the elements of all processes."""
    use_batch = norm.training or norm.running_mean is None or norm.running_var is None
    if not use_batch:
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return Elements(
            back_to_rows(F.batch_norm(as_map_of_rows(x.rows), *statistics, False, 0.0, norm.eps)), x.lattice
        )
    weighted = x.lattice.geometry.statistics == "area" if weighted is None else weighted
    real, count = x.lattice.real, x.lattice.count
    of_batch: int | Tensor = count if real is None else x.lattice.counts.sum()
    if norm.training and isinstance(norm, nn.SyncBatchNorm) and count_together(norm.process_group) > 1:
        rows, mean, variance, of_batch = _norm_together(x, norm, weighted, of_batch)
    else:
        share = x.lattice.derive(("share", weighted), lambda: _share_of_batch(x.lattice, weighted))
        share = share.to(x.rows.device, torch.promote_types(x.rows.dtype, torch.float32))
        norms = norm.weight, norm.bias, norm.eps
        rows, mean, variance = compute(Normalising(x.rows, share, *norms, x.lattice.real))
    if norm.training and norm.track_running_stats:
        of_batch = of_batch.to(variance) if isinstance(of_batch, Tensor) else of_batch
        _update_statistics(norm, mean.detach(), variance.detach(), of_batch)
    return Elements(rows.to(x.rows.dtype), x.lattice)


def _share_of_batch(lattice: Lattice, weighted: bool) -> Tensor:
    """Return each element's weight in a mean over the batch, by its area or the same for each: (N,) float64."""
    if weighted:
        share = lattice.weights
    elif lattice.real is not None:
        share = lattice.real.double()
    else:
        share = torch.ones(lattice.count, dtype=torch.float64, device=lattice.levels.device)
    return share / share.sum()


@operation(reads="element")
def scale_and_shift(x: Elements, norm: ScaleShift) -> Elements:
    """Apply a batch normalisation with fixed statistics and the activation behind it."""
    return Elements(norm(x.rows, last=True), x.lattice)


def _norm_together(
    x: Elements, norm: nn.SyncBatchNorm, weighted: bool, count: int | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the rows normalised by the statistics of all processes, mean, variance and number of elements. Gradients
    flow through the sums, whose gradients are summed over processes."""
    from torch.distributed.nn.functional import all_reduce

    values = without_padding(x).to(torch.promote_types(x.rows.dtype, torch.float32))
    real = x.lattice.real
    share = x.lattice.weights if weighted else values.new_ones(len(values)) if real is None else real
    share = share.to(values)
    with no_autocast(values):
        numbers = torch.stack([share.sum(), torch.as_tensor(count).to(share)])
        sums = all_reduce(torch.cat([numbers, weigh_rows(share, values)]), group=norm.process_group)
        mean = sums[2:] / sums[0]
        squares = all_reduce(weigh_rows(share, (values - mean).square()), group=norm.process_group)
        variance = squares / sums[0]
        rows = (values - mean) * (variance + norm.eps).rsqrt()
        if norm.weight is not None:
            rows = rows * norm.weight + norm.bias
    return rows, mean, variance, sums[1]


@operation(reads="batch")
def norm_of_batch(x: Elements, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Elements:
    """Apply `batch_norm` without running statistics: it always uses those of the batch and so mixes its images."""
    return batch_norm(x, norm)


def without_padding(x: Elements, value: float = 0.0) -> Tensor:
    """Return the rows with padding rows set to `value`, so that they can be summed over an image."""
    real = x.lattice.real
    if real is None:
        return x.rows
    return torch.where(real.to(x.rows.device).view(-1, *(1,) * (x.rows.dim() - 1)), x.rows, value)


@operation(reads="image")
def group_norm(
    x: Elements, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> Elements:
    """Apply group normalisation; the mean and variance of each image and group weight elements by area.

    With one group per channel this is instance normalisation.
    """
    centred, variance = _centre_groups(x, groups)
    rows = (centred * (variance + eps).rsqrt()).flatten(1).to(x.rows.dtype)
    if weight is not None:
        rows = rows * weight if bias is None else torch.addcmul(bias, rows, weight)
    return Elements(rows, x.lattice)


def contiguous_gradient(values: Tensor) -> Tensor:
    """Return a dense map whose gradient is made contiguous, whatever operation reads the map.

    On the CPU, torch 2.15's backward of instance normalisation treats the channels_last gradient of a single image as
    contiguous, which gives wrong values. Elements and convolutions produce such gradients.
    """
    if values.requires_grad and not running.in_graph:
        values.register_hook(_contiguous)
    return values


def exact_layout(values: Tensor) -> Tensor:
    """Return a dense map in the memory layout in which torch's norms of the image or batch are exact.

    On the CPU, torch 2.15 adds up channels_last maps one position after the other in their own type: the result of a
    group norm over 1.6 million positions is off by 7e-3. A copy takes longer than the norm, so only maps are copied
    whose sums lose digits that matter.
    """
    if running.is_exported or values.dim() != 4 or values.device.type != "cpu":
        return values
    return values.contiguous() if values.shape[2] * values.shape[3] >= _MANY else values


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return gradient.contiguous() if gradient is not None else None


@operation(reads="image")
def group_deviation(x: Elements, groups: int, eps: float) -> Elements:
    """Compute the standard deviation of each image and group (Liu et al. 2020, EvoNorm-S0), repeated per channel."""
    centred, variance = _centre_groups(x, groups)
    rows = (variance + eps).sqrt().expand_as(centred).flatten(1)
    return Elements(rows.to(x.rows.dtype), x.lattice)


@operation(reads="element", trains_only=True)
def drop_per_image(x: Elements, dropout: nn.Module) -> Elements:
    """Drop whole channels or whole images as `dropout` does on a map: each channel of an image is changed as one."""
    return _change_channels(x, dropout) if dropout.training else x


@operation(reads="element", trains_only=True)
def drop_channels(x: Elements, how: str, p: float = 0.5, training: bool = True) -> Elements:
    """Apply `drop_per_image` with a torch function: `dropout2d`, `dropout3d` or `feature_alpha_dropout`."""
    return _change_channels(x, lambda map: getattr(F, how)(map, p, True)) if training else x


def _change_channels(x: Elements, change: Callable[[Tensor], Tensor]) -> Elements:
    """Apply one affine change per channel and image; its coefficients are the results of `change` for zero and one."""
    channels = x.rows.shape[1:]
    ends = x.rows.new_tensor([0.0, 1.0]).expand(x.lattice.batch, *channels, 1, 2).contiguous()
    low, high = change(ends).split(1, dim=-1)
    layout = f"b{'c' * len(channels)}hw"
    slope, offset = (rows_on(values, x.lattice, layout) for values in (high - low, low))
    return Elements(torch.addcmul(offset, x.rows, slope), x.lattice)


@operation(reads="image", gives="vector")
def global_mean(x: Elements, keepdim: bool = True, layout: str = NCHW) -> Tensor:
    """Compute the area-weighted mean of each image, (B, C, 1, 1) or (B, C)."""
    share = x.lattice.membership.to(x.rows.device, torch.promote_types(x.rows.dtype, torch.float32))
    values = without_padding(x).reshape(x.lattice.count, -1)
    mean = compute(Weighing(values, share))
    return _per_image(mean.to(x.rows.dtype), x, keepdim, layout)


@operation(reads="image", gives="vector")
def global_max(x: Elements, keepdim: bool = True, layout: str = NCHW) -> Tensor:
    """Compute the maximum of each image, (B, C, 1, 1) or (B, C)."""
    values = without_padding(x, -torch.inf).reshape(x.lattice.count, -1)
    return _per_image(_largest(x, values), x, keepdim, layout)


def _largest(x: Elements, values: Tensor) -> Tensor:
    """Return the largest value (B, C) of the rows (N, C) of each image."""
    image = x.lattice.coordinates[0].to(values.device).unsqueeze(1).expand_as(values)
    lowest = values.new_full((x.lattice.batch, values.shape[1]), -torch.inf)
    return lowest.scatter_reduce(0, image, values, "amax")


@operation(reads="image", gives="vector")
def pool_to_bins(x: Elements, size: tuple[int, int], largest: bool = False, spacing: int = 1) -> Tensor:
    """Pool adaptively to a small map (B, C, height, width): the mean or the maximum of each bin.

    As in torch, bin i of s holds the samples floor(i n / s) to ceil((i + 1) n / s) of the network's n samples per axis.
    The weight of an element is the area that its cell shares with the bin, inside the map. In an image with one level
    everywhere cells count in full, cropped or not, as in `Lattice.weights`.

    Args:
        x: elements (N, C).
        size: bins (height, width).
        largest: return the maximum over elements that overlap the bin, instead of the mean.
        spacing: fine pixels between the samples of the network's own grid.
    """
    lattice = x.lattice
    shares = lattice.derive(("bins", size, spacing), lambda: _shares_of_bins(lattice, size, spacing))
    if largest:
        inside = (shares > 0).to(x.rows.device).unsqueeze(2).unbind(1)
        return torch.stack(
            [_largest(x, torch.where(own, x.rows, -torch.inf)) for own in inside], 2
        ).unflatten(2, size)
    values = without_padding(x)
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    with no_autocast(values):
        bins = _products_of_images(lattice, values, shares.to(values))
    return bins.unflatten(2, size).to(x.rows.dtype)


def _shares_of_bins(lattice: Lattice, size: tuple[int, int], spacing: int) -> Tensor:
    """Return the weight of each element in each bin of its image, (N, bins) float64; it sums to one per bin."""
    image, *place = lattice.coordinates
    flat = lattice.levels.flatten(1)
    whole = (flat.amin(1) == flat.amax(1))[image]
    shares = areas_in_bins(lattice, place, lattice.size, size, spacing, whole)
    if lattice.real is not None:
        shares = shares * lattice.real.unsqueeze(1)
    total = shares.new_zeros(lattice.batch, shares.shape[1]).index_add(0, image, shares)
    return shares / total[image]


def areas_in_bins(
    lattice: Lattice,
    place: Sequence[Tensor],
    whole: tuple[int, int],
    size: tuple[int, int],
    spacing: int,
    counts_in_full: Tensor | bool,
) -> Tensor:
    """Return the area that the cell of each element shares with each bin, (N, bins) float64.

    Args:
        lattice: the lattice, or that of some rows of a map.
        place: fine row and column of each element on the map.
        whole: fine size of the map.
        size: bins (height, width).
        spacing: fine pixels between the samples of the network's own grid.
        counts_in_full: True for elements whose cells count beyond the border of the map.
    """
    side, along = lattice.side_map.flatten()[lattice.anchors], []
    for at, length, bins in zip(place, whole, size, strict=True):
        samples, numbers = divide_up(length, spacing), torch.arange(bins, device=at.device)
        first = numbers * samples // bins * spacing
        last = divide_up((numbers + 1) * samples, bins) * spacing
        inside = (at + side).clamp(max=length)
        end = torch.where(torch.as_tensor(counts_in_full, device=at.device), at + side, inside).unsqueeze(1)
        along.append((torch.minimum(end, last) - torch.maximum(at.unsqueeze(1), first)).clamp(min=0))
    return (along[0].unsqueeze(2) * along[1].unsqueeze(1)).flatten(1).double()


@operation(reads="image", gives="vector")
def global_reduce(
    x: Elements,
    how: str,
    dims: tuple[int, ...],
    keepdim: bool = False,
    correction: int = 1,
    spacing: int = 1,
    layout: str = NCHW,
) -> Tensor:
    """Reduce over the image axes of each image, and over channel axes if `dims` contains any.

    A sum or norm is the weighted mean times the number of samples on the network's own grid, so that
    it keeps the scale the weights were trained with, at any resolution.

    Args:
        x: elements.
        how: `mean`, `sum`, `norm` (Euclidean), `var`, `std`, `amax` or `amin`.
        dims: axes of the dense map that are reduced; they include all image axes.
        keepdim: keep the reduced axes with size one.
        correction: correction of variances, as in torch.
        spacing: fine pixels between the samples of the network's own grid.
        layout: layout of the dense map.
    """
    channels = [dim for dim in dims if layout[dim] == "c"]
    # A list, because compilers cannot follow a generator into math.prod.
    samples = math.prod([native_shape(x, spacing, layout)[dim] for dim in dims])

    def mean(rows: Tensor) -> Tensor:
        whole = global_mean(Elements(rows, x.lattice), True, layout)
        return whole.mean(channels, keepdim=True) if channels else whole

    if how in ("amax", "amin"):
        sign = 1 if how == "amax" else -1
        reduced = sign * global_max(Elements(sign * x.rows, x.lattice), True, layout)
        reduced = getattr(reduced, how)(channels, keepdim=True) if channels else reduced
    elif how in ("var", "std"):
        centred = x.rows - rows_on(mean(x.rows), x.lattice, layout)
        reduced = mean(centred.square()) * (samples / max(samples - correction, 1))
        reduced = reduced.sqrt() if how == "std" else reduced
    elif how == "norm":
        reduced = (mean(x.rows.square()) * samples).sqrt()
    else:
        reduced = mean(x.rows) * (samples if how == "sum" else 1)
    return reduced if keepdim else reduced.squeeze(dims)


@operation(reads="image")
def softmax_over_image(x: Elements, spacing: int) -> Elements:
    """Compute the softmax over all positions of each image, separately for every channel.

    Each element counts once per sample of the network's own grid in its cell, so that the weights sum to one over
    that grid; see `global_reduce`.
    """
    layout = "bp" + "c" * (x.rows.dim() - 1)
    highest = rows_on(global_max(x, True, layout), x.lattice, layout)
    exponents = (x.rows - highest).exp()
    total = global_reduce(Elements(exponents, x.lattice), "sum", (1,), True, 0, spacing, layout)
    return Elements(exponents / rows_on(total, x.lattice, layout), x.lattice)


@operation(reads="image")
def normalize_over_image(x: Elements, spacing: int) -> Elements:
    """Divide each channel of an image by its Euclidean norm over all positions; see `global_reduce`."""
    layout = "bp" + "c" * (x.rows.dim() - 1)
    norm = global_reduce(x, "norm", (1,), True, 0, spacing, layout).clamp(min=1e-12)
    return Elements(x.rows / rows_on(norm, x.lattice, layout), x.lattice)


@operation(reads="image", gives="vector", macs=None)
def sum_of_products(
    x: Elements, other: Elements, spacing: int, layout: str, name: str = "a product"
) -> Tensor:
    """Multiply two maps along their positions: (B, ..., I, J) from rows (N, ..., I) and (N, ..., J).

    The sum over positions is scaled to the network's own grid; see `global_reduce`. Channel attention and attention
    pooling consist of such products.

    Raises:
        InvalidInput: see `check_joint`; `name` is that of the operation.
    """
    check_joint((spacing, name), x.lattice, other.lattice)
    height, width = x.lattice.samples(spacing)
    share = x.lattice.weights / (x.lattice.size[0] * x.lattice.size[1]) * height * width
    weighed = without_padding(x) * share.to(x.rows).view(-1, *(1,) * (x.rows.dim() - 1))
    return _products_of_images(x.lattice, without_padding(other), weighed).transpose(-1, -2)


@operation(reads="element", macs=None)
def matrix_on_rows(x: Elements, matrix: Tensor, transposed: bool) -> Elements:
    """Multiply the last channel axis of rows (N, ..., K) by a matrix (K, J), or by one per image (B, ..., K, J).

    Args:
        x: elements.
        matrix: matrix that the network multiplies from the right, or from the left if `transposed`.
        transposed: True if the last two axes of the matrix are (J, K).
    """
    matrix = matrix.transpose(-1, -2) if transposed else matrix
    if matrix.dim() == 2:
        return Elements(x.rows @ matrix, x.lattice)
    matrices = matrix.expand(x.lattice.batch, *matrix.shape[1:])
    if x.lattice.has_known_counts:
        parts = zip(x.rows.split(x.lattice.counts.tolist()), matrices, strict=True)
        return Elements(torch.cat([torch.einsum("n...k,...kj->n...j", *part) for part in parts]), x.lattice)
    return Elements(own_image(torch.einsum("n...k,b...kj->bn...j", x.rows, matrices), x.lattice), x.lattice)


def _products_of_images(lattice: Lattice, left: Tensor, right: Tensor) -> Tensor:
    """Sum the outer products of rows (N, ..., I) and (N, ..., J) over each image: (B, ..., I, J)."""
    if lattice.has_known_counts:
        parts = zip(*(rows.split(lattice.counts.tolist()) for rows in (left, right)), strict=True)
        return torch.stack([sum_products(*part) for part in parts])
    # Zero in the rows of other images.
    apart = right.new_zeros(lattice.count, lattice.batch, *right.shape[1:])
    apart[torch.arange(lattice.count, device=right.device), lattice.coordinates[0].to(right.device)] = right
    columns = apart.movedim(1, -2).flatten(-2)
    return sum_products(left, columns).unflatten(-1, (lattice.batch, -1)).movedim(-2, 0)


def _per_image(values: Tensor, x: Elements, keepdim: bool, layout: str) -> Tensor:
    """Reshape one vector (B, C) per image to the axes of a layout; image axes get size one or are removed."""
    channels = iter(range(1, x.rows.dim()))
    axes = [next(channels) if axis == "c" else 0 for axis in layout if axis in "bc"]
    values = values.view(-1, *x.rows.shape[1:]).permute(axes)
    for dim in image_dims(layout) if keepdim else ():
        values = values.unsqueeze(dim)
    return values


def _centre_groups(x: Elements, groups: int) -> tuple[Tensor, Tensor]:
    """Return rows (N, groups, C / groups) minus the mean of their image and group, and the variance (N, groups, 1)."""
    dtype = torch.promote_types(x.rows.dtype, torch.float32)
    layout = "bcchw"

    def mean(rows: Tensor) -> Tensor:
        vectors = global_reduce(Elements(rows, x.lattice), "mean", (2, 3, 4), True, layout=layout)
        return rows_on(vectors, x.lattice, layout)

    rows = x.rows.to(dtype).unflatten(1, (groups, -1))
    centred = rows - mean(rows)
    return centred, mean(centred.square())


def _update_statistics(
    norm: nn.BatchNorm2d | nn.SyncBatchNorm, mean: Tensor, variance: Tensor, count: int | Tensor
) -> None:
    assert norm.running_mean is not None and norm.running_var is not None
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    others = (count - 1).clamp(min=1) if isinstance(count, Tensor) else max(count - 1, 1)
    unbiased = variance * (count / others)
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean), momentum or 0.0)
        norm.running_var.lerp_(unbiased.to(norm.running_var), momentum or 0.0)
