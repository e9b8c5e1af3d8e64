"""Fit adapters to images without labels: refinements regress outputs at full resolution from those at lower resolution,
and shifts of means over the image are calibrated without training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from cadsurgery.data.samples import Samples, check_data
from cadsurgery.elements import functional
from cadsurgery.elements.functional import to_dense
from cadsurgery.elements.lattice import Lattice
from cadsurgery.elements.refinement import PLACES, Refinement, places_of
from cadsurgery.finetune.batches import inputs_of
from cadsurgery.following.trace import evaluating
from cadsurgery.masks import resolve_mask
from cadsurgery.network.adapters import can_shift_means
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.program import GraphInterpreter, Program, clone_values
from cadsurgery.support.divergence import Kind, divergence, kind_of, maps_of
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.rows import Plain

STEPS, _BATCH, _RATE, _DECAY = 800, 4, 5e-3, 1e-2
_SIDE = 64  # largest side of the crop of an image, in fine pixels
_MEASURING = 0.5  # largest share of the time for running the network
_HELD_OUT = 8  # every 8th image is held out
_BYTES = 1 << 30  # memory for kept maps
_LEAST, _MOST = 0.05, 0.25  # range of budgets
_ROUNDS = 2  # of means: a second round, because the first shifts change later layers
Note = Callable[[fx.Node, Any, Mapping[fx.Node, Any]], None]  # see `GraphInterpreter`


@dataclass(frozen=True)
class RefinementFit(Plain):
    """Result of a fit.

    Attributes:
        images: number of images on which the network was run, including mirrored and held-out images.
        held_out: number of images held out from the fit.
        seconds: processor time of all threads.
        before: divergence per pixel of the held-out images from everything high, without refinement: the mean over
            everything low and budgets.
        after: the same with refinement.
        is_better: True if the refinement was kept; without an improvement it is reset to adding nothing.
    """

    images: int
    held_out: int
    seconds: float
    before: float
    after: float
    is_better: bool


def fit_refinement(
    net: AdaptiveModel,
    images: Samples,
    *,
    minutes: float = 5.0,
    steps: int = STEPS,
    seed: int = 0,
) -> RefinementFit:
    """Fit the refinements of a network, in place, to images without labels; nothing else in the network changes.

    Each image is run with everything high, with everything low, and with two budgets, one ranked by detail and one
    random; then again mirrored, if there is time. Refinements are added if there are none. The weights are
    reproducible bit for bit with the same seed, the same images (as many as fit the time), and on the CPU the same
    number of threads.

    Args:
        net: an adaptive network.
        images: as in training; labels are not used.
        minutes: processor time; half of it is for running images, and further images are skipped, in an order
            determined by the seed.
        steps: training steps of four images each.
        seed: seed of everything random.

    Raises:
        InvalidInput: the network is not adaptive as a whole, is optimised, or has no map to refine; there are fewer
            than two images, no steps or no time.
    """
    begin = time.process_time()
    whole_program(net, "has no refinement that could be fitted")
    check_data(images, "unlabelled")
    if not minutes > 0 or steps < 1 or len(images) < 2:
        raise InvalidInput(
            f"there is nothing to fit: {len(images)} images, {minutes} minutes, {steps} steps.",
            next="give two images or more, and some time.",
        )
    refinements = [part for part in net.add_refinement().values() if isinstance(part, Refinement)]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator).tolist()
    fast, seen, size = net.optimize(), list[_ImageData](), 0
    for turn in range(2 * len(images)):
        enough = len(seen) > 1 and time.process_time() - begin > 60 * minutes * _MEASURING
        if enough or size > _BYTES:
            break
        index = order[turn % len(images)]
        inputs, _ = inputs_of(net, images, index)
        is_mirrored = (turn + turn // len(images)) % 2 == 1
        batch = [value.flip(-1) if is_mirrored else value for value in inputs]
        seen.append(_run_image(fast, batch, generator))
        size += sum(part.bytes for part in seen[-1])
    # Mirrored images follow in the same order, so they are held out together with the originals.
    is_held_out = [at % len(images) % _HELD_OUT == 0 for at in range(len(seen))]
    held_out = [image for image, out in zip(seen, is_held_out, strict=True) if out]
    fitted = [image for image, out in zip(seen, is_held_out, strict=True) if not out]
    dtype = next(refinements[0].parameters()).dtype
    for refinement in refinements:
        refinement.to(torch.promote_types(dtype, torch.float32))
    before, after = _fit(refinements, fitted, held_out, steps, seed)
    is_better = after < before
    for refinement in refinements:
        if not is_better:
            refinement.restart(seed)
        refinement.to(dtype)
    return RefinementFit(len(seen), len(held_out), time.process_time() - begin, before, after, is_better)


@dataclass(frozen=True)
class _RefinementData:
    """The data of one refinement on one image, each (1, C, h, w).

    Attributes:
        features: the entering features.
        high: the map with everything high.
        low: for each mask the map and its places, see `places_of`.
        kind: kind of the map.
    """

    features: Tensor
    high: Tensor
    low: tuple[tuple[Tensor, Tensor], ...]
    kind: Kind

    @property
    def bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for pair in ((self.features, self.high), *self.low) for tensor in pair)


_ImageData = tuple[_RefinementData, ...]  # of all refinements


@torch.no_grad()
def _run_image(net: AdaptiveModel, inputs: list[Tensor], generator: torch.Generator) -> _ImageData:
    """Run an image under all masks and crop its maps to the same place."""
    program = net.program
    fractions = (_LEAST + (_MOST - _LEAST) * torch.rand(2, generator=generator)).tolist()
    drawn = int(torch.randint(1 << 31, (), generator=generator))
    masks = (
        "none",
        f"detail | budget:fraction={fractions[0]}",
        f"random:fraction={fractions[1]},seed={drawn}",
    )
    with evaluating(net):
        values = program.before(program.bind(*inputs))
        features = values[program.halves.features]
        dtype = torch.promote_types(features.dtype, torch.float32)
        here: tuple[Any, ...] = (...,)
        for length in features.shape[2:]:
            side = min(_SIDE, length)
            low = int(torch.randint(length - side + 1, (), generator=generator))
            here = (*here, slice(low, low + side))
        high, output = _refined_maps(program, program.uniform(0), values)
        lows = [_refined_maps(program, program.masking(resolve_mask(mask)), values)[0] for mask in masks]
    kind, channels = kind_of(output), maps_of(output)[0].shape[1]

    def cropped(values: Tensor) -> Tensor:
        return values[here].to(dtype, copy=True)

    return tuple(
        _RefinementData(
            cropped(features),
            cropped(exact),
            tuple((cropped(x), cropped(places_of(lattice))) for x, lattice in of_masks),
            kind if exact.shape[1] == channels else "values",
        )
        for (exact, _), *of_masks in zip(high, *lows, strict=True)
    )


def _refined_maps(
    program: Program, masking: Any, values: tuple[Any, ...]
) -> tuple[list[tuple[Tensor, Lattice]], Any]:
    """Run the second half; return the map and the lattice that each refinement gets, and the output."""
    maps: list[tuple[Tensor, Lattice]] = []

    def note(node: fx.Node, _: Any, known: Mapping[fx.Node, Any]) -> None:
        if node.target in (functional.refine, functional.refine_resized):
            given: Any = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            args, kwargs = given
            is_resized = node.target is functional.refine_resized
            x = to_dense(args[1], 1, guide=kwargs.get("guide")) if is_resized else args[0]
            maps.append((x, args[-2]))

    return maps, _run_after(program, masking, values, note)


def _run_after(program: Program, masking: Any, values: tuple[Any, ...], note: Note) -> Any:
    """Run the second half with a note of each node, and return the output; the first half's values are not changed."""
    return GraphInterpreter(program, program.halves.after, note=note).run(masking, *clone_values(values))[0]


def _fit(
    refinements: list[Refinement],
    seen: list[_ImageData],
    held_out: list[_ImageData],
    steps: int,
    seed: int,
) -> tuple[float, float]:
    """Fit to the maps with everything high, fold the scales; return the divergence before and after."""
    generator = torch.Generator().manual_seed(seed)
    scales = [_Scales.of([image[at] for image in seen]) for at in range(len(refinements))]
    for refinement in refinements:
        refinement.restart(seed)
    before = _mean_divergence(refinements, held_out)
    parameters = [value for refinement in refinements for value in refinement.parameters()]
    with torch.inference_mode(False), torch.enable_grad():
        optimizer = torch.optim.AdamW(parameters, _RATE, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
        for _ in range(steps):
            for _ in range(_BATCH):
                image, mask = (int(torch.randint(count, (), generator=generator)) for count in (len(seen), 3))
                for at, refinement in enumerate(refinements):
                    part = seen[image][at]
                    x, places = part.low[mask]
                    refined = scales[at].refine(refinement, x, part.features, places)
                    (divergence(part.high, refined, part.kind).mean() / _BATCH).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for scale, refinement in zip(scales, refinements, strict=True):
        scale.fold(refinement)
    return before, _mean_divergence(refinements, held_out)


@dataclass(frozen=True)
class _Scales:
    """The scales in which a refinement learns.

    Attributes:
        centre, spread: mean and standard deviation of the map, (C, 1, 1).
        features: divisor of the features, one for all channels, so that rare features are not amplified.
        added: factor of the correction.
    """

    centre: Tensor
    spread: Tensor
    features: Tensor
    added: Tensor

    @classmethod
    def of(cls, parts: list[_RefinementData]) -> _Scales:
        """Compute the scales from the maps and the features of several images."""
        rows, features = (
            torch.cat([values[0].flatten(1) for values in maps], 1)
            for maps in ([part.high for part in parts], [part.features for part in parts])
        )
        least = torch.finfo(rows.dtype).tiny
        spread = rows.std(1)
        spread = spread.clamp(min=1e-3 * float(spread.mean()) + least)
        return cls(
            rows.mean(1)[:, None, None], spread[:, None, None], features.std().clamp(min=least), rows.std()
        )

    def refine(self, refinement: Refinement, x: Tensor, features: Tensor, places: Tensor) -> Tensor:
        """Apply a refinement to a map, in these scales."""
        scaled = (x - self.centre) / self.spread
        return x + self.added * (refinement(scaled, features / self.features, places) - scaled)

    @torch.no_grad()
    def fold(self, refinement: Refinement) -> None:
        """Fold the scales into the first and the last layer of a refinement."""
        first, last = refinement.inside, refinement.missing
        channels = len(self.centre)
        weight = first.weight[:, :channels]
        weight /= self.spread
        first.weight[:, channels : 1 - PLACES] /= self.features
        assert first.bias is not None and last.bias is not None
        first.bias -= weight[..., 0, 0] @ self.centre[:, 0, 0]
        last.weight *= self.added
        last.bias *= self.added


@torch.no_grad()
def _mean_divergence(refinements: list[Refinement], seen: list[_ImageData]) -> float:
    """Return the mean over images, masks and refinements."""
    losses = [
        float(divergence(part.high, refinement(x, part.features, places), part.kind).mean())
        for image in seen
        for refinement, part in zip(refinements, image, strict=True)
        for x, places in part.low
    ]
    return sum(losses) / len(losses)


# -- means over the image -----------------------------------------------------------------------------


def calibrate_means(net: AdaptiveModel, images: Samples, most: int = 32) -> int:
    """Shift values computed from means over the image, at each level, to their average at full resolution.

    Features at anchors equal those of full resolution as long as only convolutions precede them; a mean over fewer
    samples does not. Needs no gradients and no labels; shifts are added if the network has none, see
    `AdaptiveModel.add_mean_shifts`.

    Args:
        net: an adaptive network.
        images: as in training.
        most: maximum number of images used, evenly spread.

    Returns:
        The number of calibrated layers; 0 if no layer reads a mean.

    Raises:
        InvalidInput: the network is not adaptive as a whole or is optimised, or there are no images.
    """
    whole_program(net, "has no means that could be calibrated")
    check_data(images, "unlabelled")
    if not can_shift_means(net.program):
        return 0
    net.add_mean_shifts()
    program = net.program
    chosen = range(0, len(images), -(-len(images) // most))
    for _ in range(_ROUNDS):
        sums: dict[tuple[fx.Node, int], Tensor] = {}
        for index in chosen:
            inputs, _ = inputs_of(net, images, index)
            for node, level, apart in _differences(net, program, inputs):
                sums[node, level] = sums.get((node, level), 0) + apart
        with torch.no_grad():
            for (node, level), total in sums.items():
                by: Any = program.net.get_submodule(str(node.args[2].target))  # type: ignore[union-attr]
                by.shift[level - 1] += (total / len(chosen)).to(by.shift)
    return sum(node.target is functional.shift_vector for node in program.halves.after.nodes)


@torch.no_grad()
def _differences(
    net: AdaptiveModel, program: Program, inputs: tuple[Tensor, ...]
) -> Iterator[tuple[fx.Node, int, Tensor]]:
    """Yield, by node and level, how far an image's vector (C,) with the current shifts is from that at level 0."""
    with evaluating(net):
        values = program.before(program.bind(*inputs))
        high: dict[fx.Node, Tensor] = {}
        for level in range(program.geometry.max_level + 1):
            vectors: dict[fx.Node, Tensor] = {}

            def note(node: fx.Node, value: Any, _: Any, vectors: dict[fx.Node, Tensor] = vectors) -> None:
                if node.target is functional.shift_vector:
                    vectors[node] = value

            _run_after(program, program.uniform(level), values, note)
            high = high or vectors
            for node, vector in vectors.items() if level else ():
                yield node, level, (high[node] - vector).double().mean(0).flatten()
