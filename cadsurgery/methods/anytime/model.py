"""A network with several exits that stops computing positions at which a prediction is confident."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor, fx, nn

from cadsurgery.data.networks import source_of
from cadsurgery.following.arguments import describe_call, image_of, outside_inference_mode
from cadsurgery.following.call_entry import signature_of
from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import upstream
from cadsurgery.following.hooks import child
from cadsurgery.following.trace import evaluating
from cadsurgery.methods.anytime.exit_calls import AnytimeRun
from cadsurgery.methods.anytime.exits import Exit, Outlet, by_resolution, find_exits, find_outlet
from cadsurgery.methods.anytime.heads import MOST_STEPS, HeadKind, connect, make_head
from cadsurgery.methods.anytime.program import AnytimeProgram
from cadsurgery.methods.anytime.report import AnytimeMacs, AnytimePlan, ExitMacs, ExitPlan
from cadsurgery.methods.converted import GraphModel, register
from cadsurgery.methods.positions import Sites
from cadsurgery.methods.program import CallWork
from cadsurgery.network.adaptify import copy_network
from cadsurgery.network.adaptive_part import Example, traceable_part
from cadsurgery.network.signature import Forward
from cadsurgery.network.storage import Stored, check_width
from cadsurgery.support.errors import CannotConvert, InvalidInput, check_name
from cadsurgery.surgery.spatial import WHOLE, Spatial, SpatialKind

Confidence = Literal["probability", "entropy"]
Fill = Literal["gaussian", "interpolated", "zeros"]
Threshold = float | Sequence[float]  # one for all exits but the last, or one for each of them
HEADS = "exit_heads"  # name of the child module that holds the heads
# Initial width of the Gaussian of each convolution: the published one, and one at which, between positions two apart,
# hardly anything but the nearest counts.
_WIDTHS: dict[str, float] = {"gaussian": 3.0, "interpolated": 2.5}
_GRID = 2  # distance between positions that are computed in any case, with fill="interpolated"
WIDTH_NAME = "width"  # name of a convolution's parameter
_HIDDEN = 64


@outside_inference_mode
def anytime(
    model: nn.Module,
    exits: str | Sequence[str] = "auto",
    head: HeadKind = "redesigned",
    classes: int | None = None,
    hidden: int | None = None,
    threshold: Threshold = 0.998,
    confidence: Confidence = "probability",
    fill: Fill = "gaussian",
    *,
    example_input: Example | None = None,
) -> AnytimeModel:
    """Add exits to a network: an early prediction, better ones later, no computation at positions that are confident
    (Liu et al., ICLR 2022).

    `model` is not changed. Parameters keep names and values, and the model's state dict loads into the result. The
    heads of the exits are new and have to be trained.

    Args:
        model: a network that returns class scores for each position, or has them as `out` of a dictionary; its own head
            is the last exit. Or a backbone that returns several maps; the last exit is then a plain head on all of
            them.
        exits: names of modules or nodes after which an exit is added; `"auto"` for each stage of the backbone that
            halves the map or is a group of blocks, except the last. Several maps, e.g. of parallel branches, are
            resized to the finest and concatenated.
        head: `"redesigned"`, computed at lower resolutions, the lower the earlier the exit; or `"plain"`. See
            `make_head`.
        classes: number of classes, needed for a backbone; a network has its own.
        hidden: channels inside the heads; default: 64, and for plain heads the number of their input channels.
        threshold: later exits skip positions whose largest class probability is above it; with `confidence="entropy"`,
            whose entropy (in nats) is below it. One number, or one for each exit but the last.
        confidence: `"probability"` or `"entropy"`.
        fill: values of skipped positions after a convolution. `"gaussian"`, as published: a Gaussian of the computed
            positions around, with a learned width (`functional.gaussian_fill`). `"interpolated"`: every second
            position on both axes is computed in any case, and the others are a normalised Gaussian of these, which
            disturbs a network that was not trained with gaps far less. `"zeros"`.
        example_input: an image batch (B, C, H, W), or all arguments of a call; default: small random images.

    Raises:
        CannotConvert: torch.fx cannot trace the whole network, it has no maps, or `auto` finds no stages.
        UnknownName: there is no such module, node or option.
        InvalidInput: the number of classes is unknown or not the network's, or an exit is not possible.
    """
    for name, value, hint in (
        ("head", head, HeadKind),
        ("confidence", confidence, Confidence),
        ("fill", fill, Fill),
    ):
        check_name(name, value, get_args(hint))
    for name, number in (("classes", classes), ("hidden", hidden)):
        if number is not None and number < 1:
            raise InvalidInput(f"{name}={number}.", next="it must be at least 1.")
    AnytimeModel.refuse_again(model)
    whole = copy_network(model)
    path, facts = traceable_part(whole, example_input)
    if path:
        raise CannotConvert(
            f"{type(model).__name__} cannot be followed whole, only its {path}.",
            why="exits need all of the network, up to its class scores.",
            next=f"pass its backbone, model.{path}, if it returns maps, with classes=; or a network without "
            "data-dependent code.",
        )
    outlet = find_outlet(facts)
    number = _count_classes(facts, outlet, classes)
    chosen = find_exits(facts, outlet, exits)
    heads, graph, logits = _add_heads(facts, outlet, chosen, head, number, hidden)
    weight = next(whole.parameters())
    whole.add_module(HEADS, heads.to(weight.device, weight.dtype).train(whole.training))
    options = {
        "exits": [exit.name for exit in chosen],
        "head": head,
        "classes": number,
        "hidden": hidden,
        "fill": fill,
    }
    program = AnytimeProgram(graph=graph, signature=signature_of(whole), spatial={})
    net = AnytimeModel(whole, program, options, confidence=confidence, threshold=threshold)
    work = net.work({**net.defaults, **facts.arguments})
    spatial, apart = _find_spatial(facts, logits, work)
    if fill in _WIDTHS:
        for node in graph.nodes:
            if spatial.get(node.name, WHOLE).kind == "conv":
                module: Any = net.get_submodule(str(node.target))
                module.register_parameter(WIDTH_NAME, nn.Parameter(module.weight.new_tensor(_WIDTHS[fill])))
    net.program = replace(program, spatial=spatial)
    net.plan, net.source = _make_plan(net, chosen, work, apart, facts), source_of(model)
    return net


def _count_classes(facts: Facts, outlet: Outlet, asked: int | None) -> int:
    if outlet.final is None:
        if asked is None:
            raise InvalidInput(
                f"{type(facts.model).__name__} returns {len(outlet.ends)} maps, and no class scores.",
                why="how many classes its heads are to predict is not known.",
                next="say classes=N.",
            )
        return asked
    own = facts.shapes[outlet.ends[0]][1]
    if asked is not None and asked != own:
        raise InvalidInput(
            f"classes={asked}, but the network itself predicts {own}.",
            why="its own head is the last exit, and all exits predict the same classes.",
            next=f"leave out classes=, or pass a network of {asked} classes.",
        )
    return own


def _add_heads(
    facts: Facts, outlet: Outlet, exits: list[Exit], kind: HeadKind, classes: int, hidden: int | None
) -> tuple[nn.ModuleList, fx.Graph, list[fx.Node]]:
    graph, heads, logits = facts.graph, nn.ModuleList(), []
    places: list[tuple[HeadKind, int, tuple[fx.Node, ...]]] = [
        (kind, min(len(exits) - number, MOST_STEPS), exit.branches) for number, exit in enumerate(exits)
    ]
    if outlet.final is None:
        places.append(("plain", 0, by_resolution(outlet.ends, facts)))
    for number, (head_kind, steps, branches) in enumerate(places):
        channels = sum(facts.shapes[node][1] for node in branches)
        inside = hidden or (channels if head_kind == "plain" else _HIDDEN)
        layers = make_head(head_kind, channels, inside, classes, steps)
        heads.append(layers)
        with graph.inserting_before(max(branches).next):
            logits.append(connect(graph, f"{HEADS}.{number}", layers, list(branches)))
    output = graph.output_node()
    logits += outlet.ends if outlet.final is not None else ()
    output.args = ((*logits, outlet.final or logits[-1]),)
    return heads, graph, logits


def _find_spatial(
    facts: Facts, logits: list[fx.Node], work: CallWork
) -> tuple[dict[str, SpatialKind], list[tuple[str, str]]]:
    """Classify the nodes after the first exit by how they act on positions.

    Also return the convolutions that cannot be computed at chosen positions, with the reason.
    """
    shapes = {
        node: torch.Size(work.shapes[node.name]) for node in facts.graph.nodes if node.name in work.shapes
    }
    seen = Spatial(replace(facts, shapes={**shapes, **facts.shapes}))  # including the heads
    kinds, apart = dict[str, SpatialKind](), list[tuple[str, str]]()
    behind = upstream(*logits) - upstream(logits[0])
    for node in facts.graph.nodes:
        size = work.sizes.get(node.name)
        if node not in behind or size is None:
            continue
        kind = seen.kind(node)
        # A map of another size can be read at chosen positions only if it has one value per image.
        read = {work.sizes[source.name] for source in node.all_input_nodes if source.name in work.sizes}
        if kind.kind != "point" or (size in read and read <= {size, (1, 1)}):
            kinds[node.name] = kind
        if node.op == "call_module" and isinstance(facts.module(node), nn.Conv2d) and kind.kind != "conv":
            why = (
                seen.treatments[node].why
                if seen.maps(node)
                else "its map is no grid of the image's positions"
            )
            apart.append((str(node.target), why))
    return kinds, apart


def _make_plan(
    net: AnytimeModel, exits: list[Exit], work: CallWork, apart: list[tuple[str, str]], facts: Facts
) -> AnytimePlan:
    names = [*((exit.name, tuple(node.name for node in exit.branches)) for exit in exits), ("the end", ())]
    planned = []
    for number, (name, branches) in enumerate(names):
        steps = net.program.segments[number]
        chosen = [step for step in steps if step.spatial.kind == "conv"]
        macs = sum(work.macs[step.name] for step in steps)
        share = sum(work.macs[step.name] for step in chosen) / macs if macs else 0.0
        channels = sum(work.shapes[branch][1] for branch in branches)
        head = f"{net.options['head']} head" if number < len(net.heads) else "the network's own head"
        planned.append(ExitPlan(name, branches, channels, head, macs, len(chosen), round(share, 4)))
    return AnytimePlan(
        exits=tuple(planned),
        classes=net.options["classes"],
        whole=tuple(apart),
        example_shape=tuple(facts.example.shape),
        call=describe_call(facts.model, facts.arguments),
    )


@register
class AnytimeModel(GraphModel):
    """A network with exits. Called as the original, it returns a tuple of predictions, the last one best.

    Each prediction is aggregated: where the previous exit was confident, it repeats that exit's prediction. Its grid
    is the finest grid of class scores so far. `steps` yields the predictions one by one.

    Attributes:
        plan: how the network was converted.
        options: arguments of `anytime`, as plain values.
        threshold: where an exit is confident, one number or one for each exit but the last; may be set. At 1
            (entropy: 0) everything is computed.
        confidence: `probability` or `entropy`.
        source: where the network came from, if it was built by name.
    """

    method, converted_by, already = "anytime", "cs.anytime", "this network has exits already."
    convert, plan_type = staticmethod(anytime), AnytimePlan
    group, group_in_words, child, objective = "exits", "a network with exits", HEADS, "anytime"
    option_types: ClassVar[dict[str, Any]] = {
        "exits": tuple[str, ...],
        "head": HeadKind,
        "classes": int,
        "hidden": int | None,
        "fill": Fill,
        "confidence": Confidence,
        "threshold": float | tuple[float, ...],
    }
    plan: AnytimePlan
    program: AnytimeProgram
    confidence: Confidence

    @classmethod
    def is_own(cls, name: str) -> bool:
        """True for tensors of a head and for the width of a convolution's Gaussian."""
        return name.startswith(f"{HEADS}.") or name.rpartition(".")[2] == WIDTH_NAME

    @property
    def decided_by(self) -> str:
        """The number of exits."""
        return f"{len(self.plan.exits)} exits"

    def identity(self) -> dict[str, Any]:
        """Return thresholds and confidence."""
        return {"threshold": self.threshold, "confidence": self.confidence}

    def train_part(self) -> None:
        """Train the heads. The network itself is in training mode, too, in which whole maps are filled, as the
        statistics of the heads require."""
        self.heads.train()
        self.training = True

    @classmethod
    def rebuild(
        cls, path: str | Path, stored: Stored, tensors: dict[str, Tensor], model: nn.Module | None
    ) -> Self:
        """Build the network of a file, unless its options ask for heads wider than those in the file."""
        check_width(path, max(stored.options["classes"], stored.options["hidden"] or 0), tensors)
        return super().rebuild(path, stored, tensors, model)

    @Forward
    @torch.compiler.disable(
        reason="its work depends on the confidence of its exits: call it as it is, or its copy net.optimize()"
    )
    def forward(self, *args: Any, threshold: Threshold | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return all aggregated predictions, in the form and size of the original's class scores.

        Args:
            args: as for the original; the first is the image batch (B, C, H, W).
            threshold: replaces the attribute in this call.
            kwargs: as for the original.
        """
        return tuple(self.steps(*args, threshold=threshold, **kwargs))

    def steps(self, *args: Any, threshold: Threshold | None = None, **kwargs: Any) -> Iterator[Tensor]:
        """Yield each prediction as soon as it is computed; later exits are computed only when they are requested.

        Args:
            args, threshold, kwargs: as in a call.

        Raises:
            InvalidInput: the image is not an image batch.
        """
        run = self._start(
            args, kwargs
        )  # here, since a generator would check the arguments only when it starts
        return map(run.prediction, self._logits(run, self.thresholds(threshold)))

    def logits(self, *args: Any, threshold: Threshold | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
        """Return the aggregated class scores of all exits, before the network resizes them."""
        return tuple(self._logits(self._start(args, kwargs), self.thresholds(threshold)))

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """The threshold of the exits, or one for each exit but the last."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: Threshold) -> None:
        each = self.thresholds(threshold)
        self._threshold = each if isinstance(threshold, Sequence) else float(threshold)

    def thresholds(self, threshold: Threshold | None = None) -> tuple[float, ...]:
        """Return the thresholds of all exits but the last.

        Args:
            threshold: one number, or one for each exit; default: the network's own.

        Raises:
            InvalidInput: they are not numbers, are negative, or their number is wrong.
        """
        value, count = self.threshold if threshold is None else threshold, len(self.program.logits) - 1
        limits = tuple(value) if isinstance(value, Sequence) else (value,) * count
        if len(limits) != count or not all(isinstance(limit, Real) and limit >= 0 for limit in limits):
            raise InvalidInput(
                f"threshold={value!r:.60} of a network with {count} exits before the last.",
                why="it is compared with probabilities, or entropies, which are not negative.",
                next=f"give one number, or {count}: one of each of these exits, from 0 on; {self.everything:g} "
                "computes everything.",
            )
        return tuple(map(float, limits))

    @property
    def everything(self) -> float:
        """The threshold at which everything is computed."""
        return 0.0 if self.confidence == "entropy" else 1.0

    def undecided_mask(self, logits: Tensor, threshold: Threshold | None = None, exit: int = 1) -> Tensor:
        """Return (B, H, W) bool: True where the class scores are not confident.

        Args:
            logits: class scores (B, classes, H, W) of an exit.
            threshold: replaces the network's own.
            exit: number of the exit, from 1, which selects one of several thresholds.
        """
        limit, scores = self.thresholds(threshold)[exit - 1], logits.detach()
        if self.confidence == "entropy":
            logarithms = scores.log_softmax(1)
            return ~(-(logarithms.exp() * logarithms).sum(1) < limit)  # NaN counts as undecided
        return ~(scores.softmax(1).amax(1) > limit)

    def asks_everything(self, threshold: Threshold | None = None) -> bool:
        """True if no exit can be confident at this threshold, whatever its class scores."""
        return all(map(self._is_never, self.thresholds(threshold)))

    def _is_never(self, limit: float) -> bool:
        return limit <= 0 if self.confidence == "entropy" else limit >= 1

    def macs(self, *args: Any, threshold: float | None = None, **kwargs: Any) -> AnytimeMacs:
        """Run the network on an image and count the multiply-accumulates up to each exit, with and without skipping.

        Args:
            args, threshold, kwargs: as in a call. On the meta device nothing is run, and everything counts as
                computed.
        """
        with torch.no_grad(), evaluating(self):
            run = self._start(args, kwargs)
            if not image_of(run.arguments).is_meta:
                for _ in self._logits(run, self.thresholds(threshold)):
                    pass
        return self._counted(run)

    def predict_and_count(
        self, *args: Any, threshold: Threshold | None = None, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], AnytimeMacs]:
        """Return all predictions and the multiply-accumulates up to each, of a network in evaluation mode.

        Args:
            args, threshold, kwargs: as in a call.
        """
        run = self._start(args, kwargs)
        predictions = tuple(map(run.prediction, self._logits(run, self.thresholds(threshold))))
        return predictions, self._counted(run)

    def until(
        self, *args: Any, milliseconds: float, threshold: Threshold | None = None, **kwargs: Any
    ) -> tuple[Tensor, int]:
        """Return the best prediction within a deadline and the number of its exit, from 1.

        The first exit is always computed. A further exit is computed if it would meet the deadline even with
        everything undecided, estimated by the time per multiply-accumulate so far.

        Args:
            args, threshold, kwargs: as in a call.
            milliseconds: the deadline, counted from the call.
        """
        began = time.perf_counter()
        run = self._start(args, kwargs, is_training=False)
        work = self._dense_macs(run.work)
        logits, number = None, 0
        for scores in self._logits(run, self.thresholds(threshold)):
            logits, number = scores, number + 1
            passed = 1e3 * (time.perf_counter() - began)
            if number == len(work) or passed * work[number] / work[number - 1] > milliseconds:
                break
        assert logits is not None
        return run.prediction(logits), number

    def _dense_macs(self, work: CallWork) -> list[int]:
        return list(
            accumulate(sum(work.macs[step.name] for step in steps) for steps in self.program.segments)
        )

    def _counted(self, run: AnytimeRun) -> AnytimeMacs:
        dense = own = self._dense_macs(run.work)
        shape = tuple(image_of(run.arguments).shape)
        if not image_of(run.arguments).is_meta:
            own = list(accumulate(run.macs + [0] * (len(dense) - len(run.macs))))
        rows = zip((exit.name for exit in self.plan.exits), own, dense, strict=True)
        exits = tuple(ExitMacs(*row) for row in rows)
        return AnytimeMacs(exits=exits, shape=shape, not_counted=run.work.not_counted)

    def optimize(self) -> AnytimeModel:
        """Return an inference copy: batch norm folded, residuals and activations fused, weights packed."""
        fused, spatial = self.fused(), dict(self.program.spatial)
        paths = {node.name: str(node.target) for node in self.program.graph.nodes}
        for node in fused.graph.nodes:
            if node.name not in fused.origins:
                continue
            origin = fused.origins[node.name]
            kind, kernel = self.program.spatial.get(origin, WHOLE), fused.kernel(node)
            spatial[node.name] = kind if kernel is None or kind.kind == "conv" else WHOLE
            if kernel is not None:
                width = getattr(child(self, paths[origin]), WIDTH_NAME, None) if kind.kind == "conv" else None
                kernel.register_buffer(WIDTH_NAME, None if width is None else width.detach().clone())
        return self.inference_copy(fused, spatial=spatial)

    @property
    def heads(self) -> nn.ModuleList:
        """The heads that were added; the network's own head is not among them."""
        heads = self._modules[HEADS]
        assert isinstance(heads, nn.ModuleList)
        return heads

    # -- running -----------------------------------------------------------------------------------

    def _start(self, args: Any, kwargs: Any, is_training: bool | None = None) -> AnytimeRun:
        arguments = self.bind(args, kwargs)
        training = self.training if is_training is None else is_training
        work = CallWork({}, {}, {}, {}) if training else self.work(arguments)
        return AnytimeRun(self, arguments, work)

    @property
    def grid(self) -> int:
        """Distance between positions that are computed in any case; 0 for none."""
        return _GRID if self.options["fill"] == "interpolated" else 0

    def _logits(self, run: AnytimeRun, thresholds: tuple[float, ...]) -> Iterator[Tensor]:
        sites: Sites | None = None
        logits: Tensor | None = None
        for number in range(len(self.program.segments)):
            if logits is not None and not self._is_never(thresholds[number - 1]):
                sites = Sites(self.undecided_mask(logits, thresholds, number), sites, self.grid)
            if sites is None or bool(sites.undecided.any()) or self.training:
                run.segment(number, sites)
                logits = run.logits(number, sites, logits)
            assert logits is not None
            yield logits
