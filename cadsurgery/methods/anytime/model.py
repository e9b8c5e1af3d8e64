"""A network that predicts several times, each time better, and computes nothing any more where it is confident."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, fx, nn

from cadsurgery.data.networks import source_of
from cadsurgery.methods import files
from cadsurgery.methods.anytime.exits import Exit, Outlet, find_exits, find_outlet
from cadsurgery.methods.anytime.heads import MOST_STEPS, HeadKind, connect, make_head
from cadsurgery.methods.anytime.program import AnytimeProgram, cut
from cadsurgery.methods.anytime.report import AnytimeMacs, AnytimePlan, ExitMacs, ExitPlan
from cadsurgery.methods.anytime.run import Run
from cadsurgery.methods.converted import GraphModel, register
from cadsurgery.methods.positions import Sites
from cadsurgery.methods.program import Work, ancestors, work_of
from cadsurgery.methods.spatial import WHOLE, Spatial, SpatialKind
from cadsurgery.network.adaptify import Example, copy_network, traceable_part
from cadsurgery.network.macs import meta_copy
from cadsurgery.network.storage import check_width
from cadsurgery.support.errors import CannotConvert, InvalidInput, check_name
from cadsurgery.surgery.arguments import image_of
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.hooks import child
from cadsurgery.surgery.trace import evaluating

Confidence = Literal["probability", "entropy"]
Fill = Literal["gaussian", "interpolated", "zeros"]
Threshold = float | Sequence[float]  # of all exits but the last, or one of each
HEADS = "exit_heads"  # the child that holds them
# Widths that the Gaussian of each convolution starts with: the published one, and one by which nearly the nearest alone
# count of positions two apart; and how far apart positions are that are computed all the same.
_WIDTHS: dict[str, float] = {"gaussian": 3.0, "interpolated": 2.5}
_GRID = 2
WIDTH_NAME = "width"  # the parameter of the module of the convolution
_HIDDEN = 64


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
    """The same network with exits: a first prediction early, better ones later, nothing computed where one is
    confident (Liu et al., ICLR 2022).

    The argument is not changed; parameters keep names and values, and its state dict loads into the result. The heads
    of the exits are new and have to be trained.

    Args:
        model: a network that returns class scores for each position, alone or as `out` of a dictionary: its own head is
            the last exit. Or a backbone that returns several maps: the last exit is then a plain head on all of them.
        exits: names of modules or nodes after which there is an exit; `"auto"`: after each stage of the backbone that
            halves the map or is a group of blocks, but the last. Several maps, as of parallel branches, are resized to
            the finest and concatenated.
        head: `"redesigned"`, computed at lower resolutions, earlier ones at lower; or `"plain"`, see `make_head`.
        classes: that a backbone's heads predict; of a network its own.
        hidden: channels inside the heads; default: 64, in plain ones as many as they read.
        threshold: where the largest probability of a class is above it, later exits compute nothing; with
            `confidence="entropy"`, where the entropy (in nats) is below it. One number, or one of each exit but the
            last.
        confidence: `"probability"` or `"entropy"`.
        fill: what convolutions give where nothing is computed: the `"gaussian"` of what is computed around, whose width
            is learned (`functional.gaussian_fill`), as published; `"interpolated"`: every second position of both axes
            is computed all the same, and the others are the normalised Gaussian between these, which disturbs a network
            that was not trained with gaps far less; or `"zeros"`.
        example_input: an image batch (B, C, H, W), or all arguments of a call; default: small random images.

    Raises:
        CannotConvert: a network that torch.fx cannot follow whole, without maps, or without stages for `auto`.
        UnknownName: no such module, node, or option.
        InvalidInput: classes that are unknown or not the network's, or an exit that is none.
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
    found = find_exits(facts, outlet, exits)
    heads, graph, logits = _add_heads(facts, outlet, found, head, number, hidden)
    weight = next(whole.parameters())
    whole.add_module(HEADS, heads.to(weight.device, weight.dtype).train(whole.training))
    signature = inspect.signature(whole.forward)
    defaults = {name: one.default for name, one in signature.parameters.items()}
    work = work_of(cut(graph, {}, signature).steps, meta_copy(whole), {**defaults, **facts.arguments})
    spatial, apart = _find_spatial(facts, logits, work)
    if fill in _WIDTHS:
        for node in graph.nodes:
            if spatial.get(node.name, WHOLE).kind == "conv":
                module: Any = whole.get_submodule(str(node.target))
                module.register_parameter(WIDTH_NAME, nn.Parameter(module.weight.new_tensor(_WIDTHS[fill])))
    options = {
        "exits": [exit.name for exit in found],
        "head": head,
        "classes": number,
        "hidden": hidden,
        "fill": fill,
    }
    program = cut(graph, spatial, signature)
    net = AnytimeModel(whole, program, options, confidence=confidence, threshold=threshold)
    net.plan, net.source = _make_plan(net, found, work, apart, facts.example), source_of(model)
    return net


def _count_classes(facts: Facts, outlet: Outlet, asked: int | None) -> int:
    if outlet.logits is None:
        if asked is None:
            raise InvalidInput(
                f"{type(facts.model).__name__} returns {len(outlet.maps)} maps, and no class scores.",
                why="how many classes its heads are to predict is not known.",
                next="say classes=N.",
            )
        return asked
    own = facts.shapes[outlet.logits][1]
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
    order = {node: place for place, node in enumerate(graph.nodes)}
    places: list[tuple[HeadKind, int, tuple[fx.Node, ...]]] = [
        (kind, min(len(exits) - number, MOST_STEPS), exit.branches) for number, exit in enumerate(exits)
    ]
    if outlet.logits is None:
        finest = max(outlet.maps, key=lambda node: facts.shapes[node][2] * facts.shapes[node][3])
        places.append(("plain", 0, (finest, *(node for node in outlet.maps if node is not finest))))
    for number, (of_head, steps, branches) in enumerate(places):
        channels = sum(facts.shapes[node][1] for node in branches)
        inside = hidden or (channels if of_head == "plain" else _HIDDEN)
        layers = make_head(of_head, channels, inside, classes, steps)
        heads.append(layers)
        with graph.inserting_after(max(branches, key=order.__getitem__)):
            anchor = graph.create_node("call_function", connect)  # where nodes are put, in their order
        with graph.inserting_before(anchor):
            logits.append(connect(graph, f"{HEADS}.{number}", layers, list(branches)))
        graph.erase_node(anchor)
    output = next(node for node in graph.nodes if node.op == "output")
    if outlet.logits is not None:
        logits.append(outlet.logits)
    output.args = ((*logits, outlet.final if outlet.final is not None else logits[-1]),)
    return heads, graph, logits


def _find_spatial(
    facts: Facts, logits: list[fx.Node], work: Work
) -> tuple[dict[str, SpatialKind], list[tuple[str, str]]]:
    """How the nodes behind the first exit act on positions; and convolutions that do not on some alone, and why."""
    shapes = {
        node: torch.Size(work.shapes[node.name]) for node in facts.graph.nodes if node.name in work.shapes
    }
    seen = Spatial(replace(facts, shapes={**shapes, **facts.shapes}))  # with the heads'
    kinds, apart = dict[str, SpatialKind](), list[tuple[str, str]]()
    behind = ancestors(*logits) - ancestors(logits[0])
    for node in facts.graph.nodes:
        size = work.size(node.name)
        if node not in behind or size is None:
            continue
        kind = seen.kind(node)
        # Of maps of other sizes only one value for all positions of an image can be read at some of them.
        read = [other for one in node.all_input_nodes if (other := work.size(one.name)) is not None]
        if kind.kind != "point" or (size in read and {*read} <= {size, (1, 1)}):
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
    net: AnytimeModel, exits: list[Exit], work: Work, apart: list[tuple[str, str]], example: Tensor
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
    exits_of, shape = tuple(planned), tuple(example.shape)
    return AnytimePlan(
        exits=exits_of, classes=net.options["classes"], whole=tuple(apart), example_shape=shape
    )


@register
class AnytimeModel(GraphModel):
    """A network with exits: called as the original, it gives a tuple of predictions, the last one best.

    Each prediction is aggregated: where the one before was confident, it is that, on the finest grid of class scores
    so far. `steps` gives them one by one.

    Attributes:
        plan: what was made of the network.
        options: of `anytime`, as values.
        threshold: where an exit is confident, one number or one of each exit but the last; may be set. 1 (entropy: 0)
            computes everything.
        confidence: `probability` or `entropy`.
        source: where the network came from, if it was built by name.
    """

    method, converted_by, already = "anytime", "cs.anytime", "this network has exits already."
    convert, plan_type = staticmethod(anytime), AnytimePlan
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
        """True for what is of a head, or the width of a convolution's Gaussian."""
        return name.startswith(f"{HEADS}.") or name.rpartition(".")[2] == WIDTH_NAME

    @classmethod
    def check_stored(cls, path: str | Path, stored: files.Stored, tensors: dict[str, Tensor]) -> None:
        """Refuse heads that are wider than those in the file."""
        check_width(path, max(stored.options["classes"], stored.options["hidden"] or 0), tensors)

    def fitting(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file: older ones may have widths for other convolutions, of attention over channels."""
        own = self.state_dict()
        kept = {name: value for name, value in tensors.items() if name in own or not name.endswith(".width")}
        return {name: value for name, value in own.items() if name.endswith(".width")} | kept

    @torch.compiler.disable(
        reason="what is computed depends on what its exits are sure of: call it as it is, or its copy net.optimize()"
    )
    def forward(self, *args: Any, threshold: Threshold | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
        """All predictions, aggregated, in the form and size the original returns its scores.

        Args:
            args: as the original is called; the first is the image batch (B, C, H, W).
            threshold: for this call, as the attribute.
            kwargs: as the original is called.
        """
        return tuple(self.steps(*args, threshold=threshold, **kwargs))

    def steps(self, *args: Any, threshold: Threshold | None = None, **kwargs: Any) -> Iterator[Tensor]:
        """Each prediction as soon as it is there; of what comes after the last one taken nothing is computed.

        Args:
            args, threshold, kwargs: as of a call.

        Raises:
            InvalidInput: what is no image batch.
        """
        run = self._start(args, kwargs)  # at once: a generator would say only later what it is given
        return (run.prediction(logits) for logits in self._logits(run, threshold))

    def logits(self, *args: Any, threshold: Threshold | None = None, **kwargs: Any) -> tuple[Tensor, ...]:
        """The aggregated class scores of all exits, before the network resizes them."""
        return tuple(self._logits(self._start(args, kwargs), threshold))

    @property
    def threshold(self) -> float | tuple[float, ...]:
        """Where an exit is confident."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: Threshold) -> None:
        each = self.thresholds(threshold)
        self._threshold = each if isinstance(threshold, Sequence) else float(threshold)

    def thresholds(self, threshold: Threshold | None = None) -> tuple[float, ...]:
        """Those of all exits but the last.

        Args:
            threshold: one number, or one of each; default: the network's own.

        Raises:
            InvalidInput: no numbers, negative ones, or not as many.
        """
        given, count = self.threshold if threshold is None else threshold, len(self.program.logits) - 1
        each = tuple(given) if isinstance(given, Sequence) else (given,) * count
        if any(isinstance(one, Real) and one < 0 for one in each):
            raise InvalidInput(
                f"threshold={given!r:.60} is negative.",
                why="probabilities and entropies are not.",
                next=f"give a number from 0 on; {self.everything:g} computes everything.",
            )
        if len(each) != count or not all(isinstance(one, Real) and one == one for one in each):
            raise InvalidInput(
                f"threshold={given!r:.60} of a network with {count} exits before the last.",
                next=f"give one number, or {count}: one of each of these exits.",
            )
        return tuple(map(float, each))

    @property
    def everything(self) -> float:
        """The threshold by which everything is computed."""
        return 0.0 if self.confidence == "entropy" else 1.0

    def undecided_mask(self, logits: Tensor, threshold: Threshold | None = None, exit: int = 1) -> Tensor:
        """(B, H, W) bool: True where class scores leave something to be computed.

        Args:
            logits: (B, classes, H, W), of an exit.
            threshold: default: the network's own.
            exit: its number, from 1: which of several thresholds counts.
        """
        limit, scores = self.thresholds(threshold)[exit - 1], logits.detach()
        if self.confidence == "entropy":
            logarithms = scores.log_softmax(1)
            return ~(-(logarithms.exp() * logarithms).sum(1) < limit)  # NaN leaves something
        return ~(scores.softmax(1).amax(1) > limit)

    def asks_everything(self, threshold: Threshold | None = None) -> bool:
        """True if no class scores of any exit are confident, whatever they are."""
        return all(map(self._is_never, self.thresholds(threshold)))

    def _is_never(self, limit: float) -> bool:
        return limit <= 0 if self.confidence == "entropy" else limit >= 1

    def macs(
        self, *args: Any, rule: str = "conv", threshold: float | None = None, **kwargs: Any
    ) -> AnytimeMacs:
        """Multiply-accumulates up to each exit on an image, which is run, with masks and without.

        Args:
            args, threshold, kwargs: as of a call. On the meta device nothing is run: everything counts as computed.
            rule: `conv`, or `published`, see `AnytimeMacs`.

        Raises:
            UnknownName: no such rule.
        """
        with torch.no_grad(), evaluating(self):
            run = self._start(args, kwargs, rule=rule)
            if not image_of(run.arguments).is_meta:
                for _ in self._logits(run, threshold):
                    pass
        return self._counted(run, rule)

    def predict_and_count(
        self, *args: Any, threshold: Threshold | None = None, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], AnytimeMacs]:
        """All predictions, and the multiply-accumulates up to each; of a network in evaluation mode.

        Args:
            args, threshold, kwargs: as of a call.
        """
        run = self._start(args, kwargs)
        predictions = tuple(run.prediction(logits) for logits in self._logits(run, threshold))
        return predictions, self._counted(run, "conv")

    def until(
        self, *args: Any, milliseconds: float, threshold: Threshold | None = None, **kwargs: Any
    ) -> tuple[Tensor, int]:
        """The best prediction within a deadline, and the number of its exit, from 1; the first whatever it takes.

        A further exit is tried if, by the time per multiply-accumulate so far, it would be there in time even if
        everything were left to compute.

        Args:
            args, threshold, kwargs: as of a call.
            milliseconds: from now.
        """
        began = time.perf_counter()
        run = self._start(args, kwargs, is_training=False)
        assert run.work is not None
        work = self._dense_macs(run.work)
        logits, number = None, 0
        for scores in self._logits(run, threshold):
            logits, number = scores, number + 1
            passed = 1e3 * (time.perf_counter() - began)
            if number == len(work) or passed * work[number] / work[number - 1] > milliseconds:
                break
        assert logits is not None
        return run.prediction(logits), number

    def _dense_macs(self, work: Work) -> list[int]:
        return list(
            accumulate(sum(work.macs[step.name] for step in steps) for steps in self.program.segments)
        )

    def _counted(self, run: Run, rule: str) -> AnytimeMacs:
        assert run.work is not None
        dense = own = self._dense_macs(run.work)
        shape = tuple(image_of(run.arguments).shape)
        if not image_of(run.arguments).is_meta:
            counted = [macs[rule == "published"] for macs in run.macs]
            own = list(accumulate(counted + [0] * (len(dense) - len(counted))))
        rows = zip((exit.name for exit in self.plan.exits), own, dense, strict=True)
        exits = tuple(ExitMacs(*row) for row in rows)
        return AnytimeMacs(exits=exits, rule=rule, shape=shape, not_counted=run.work.not_counted)

    def optimize(self) -> AnytimeModel:
        """An inference copy: batch norm folded, residuals and activations fused, weights packed."""
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
        return self.inference_copy(fused, cut(fused.graph, spatial, self.program.signature, is_fused=True))

    @property
    def heads(self) -> nn.ModuleList:
        """Those of the exits; the network's own is not among them."""
        heads = self._modules[HEADS]
        assert isinstance(heads, nn.ModuleList)
        return heads

    # -- running -----------------------------------------------------------------------------------

    def _start(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_training: bool | None = None,
        rule: str = "conv",
    ) -> Run:
        arguments = self.bind(args, kwargs, rule)
        training = self.training if is_training is None else is_training
        work = None if training else self.work(arguments)
        return Run(self, arguments, work)

    @property
    def grid(self) -> int:
        """How far apart positions are that are computed all the same; 0: none are."""
        return _GRID if self.options["fill"] == "interpolated" else 0

    def _logits(self, run: Run, threshold: Threshold | None) -> Iterator[Tensor]:
        return self._aggregate(
            run, self.thresholds(threshold)
        )  # at once: a generator would refuse only later

    def _aggregate(self, run: Run, thresholds: tuple[float, ...]) -> Iterator[Tensor]:
        sites: Sites | None = None
        logits: Tensor | None = None
        for number in range(len(self.program.segments)):
            if logits is not None and not self._is_never(thresholds[number - 1]):
                sites = Sites(self.undecided_mask(logits, thresholds, number), sites, self.grid)
            if sites is None or not sites.is_nothing or self.training:
                run.segment(number, sites)
                logits = run.logits(number, sites, logits)
            assert logits is not None
            yield logits
