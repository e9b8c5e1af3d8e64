"""Fit a network's masks and levels to photos without labels (`cadsurgery tune`), and report fidelity against work."""

from __future__ import annotations

import copy
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.text import Text
from safetensors.torch import load_file
from torch import Tensor, nn

from cadsurgery.data import Samples, SegmentationData, as_data, open_data
from cadsurgery.data.sources import HELD_OUT
from cadsurgery.finetune.adapters import ROUNDS, calibrate_adapters
from cadsurgery.finetune.balance import class_shares, class_weights
from cadsurgery.finetune.batches import inputs_of
from cadsurgery.finetune.checkpoints import identity_of
from cadsurgery.finetune.gain import STEPS as GAIN_STEPS
from cadsurgery.finetune.gain import GainFit, fit_gain
from cadsurgery.finetune.logs import check_packages
from cadsurgery.finetune.loop import fit
from cadsurgery.finetune.objectives import dense_high
from cadsurgery.finetune.refinement import STEPS, RefinementFit, fit_refinement
from cadsurgery.masks import Budget
from cadsurgery.methods.storage import save
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.stem import CachedStem, body_of
from cadsurgery.network.storage import checksum, write_tensors
from cadsurgery.support.divergence import Kind, kind_of, maps_of
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.files import as_file_error, make_folder
from cadsurgery.support.progress import Step, silent
from cadsurgery.tasks.evaluation import EvaluationReport, evaluate
from cadsurgery.tasks.judging import (
    AGREEMENT,
    CLASSES,
    FEW,
    VALUES,
    Estimate,
    Judgement,
    estimate,
    judge,
    pool,
)
from cadsurgery.tasks.open import open_converted
from cadsurgery.tasks.options import Settings
from cadsurgery.tasks.report import Report, Row, percent
from cadsurgery.tasks.run_folder import Identity, check_same_run, read_json, write_json

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
LOW = "none"  # mask of everything low
WORDS = {CLASSES: "balanced fidelity", AGREEMENT: "agreement", VALUES: "one minus the relative error"}
PARTS = {
    "calibration": "calibration of means over the image",
    "adapters": "level adapters",
    "refinement": "refinements",
    "gain": "gain mask instead of detail",
}
_FEWEST = HELD_OUT + 2  # smallest number of photos
_APART = 5 * HELD_OUT  # number of photos from which deciding and the table have photos of their own
_MEMORY = 2 << 30  # bytes of stem outputs kept for training
_MOST = 32  # number of photos for means and for shares of classes
_TRAINING, _REFINING, _RANKING = 0.45, 0.15, 0.25  # shares of the time
_TRIAL = 3  # number of steps to measure the time of a step
# Budgets at which, beside everything low, a part is compared with the network without it.
_DECIDING = (0.1, 0.3)
CALIBRATED, TRAINED, REFINED, RANKED, NETWORK = (
    f"{name}.safetensors" for name in ("calibrated", "trained", "refined", "ranked", "net")
)
# Adapters start by adding nothing, and a few photos overfit quickly.
TRAINING = Settings(
    batch=1,
    accumulate=4,
    lr=3e-4,
    optimizer="adamw",
    weight_decay=0.0,
    crop=0,
    jitter=0.0,
    train="adapters",
    objective="any-budget",
    objective_options={"high": 0.5, "ranking": ("detail", "random"), "teacher": "self", "supervision": 0.0},
    save_every=25,
    workers=0,
)


@dataclass(frozen=True)
class TuningReport(Report):
    """Result of a tuning run.

    Attributes:
        measure: what is compared with the dense network: `fidelity`, the balanced fidelity, for maps of class scores;
            `agreement` of classes for other class scores; `accuracy`, one minus the relative error, for other values.
        photos: names of the photos that each part was fitted to (`fitted`), that decided what is kept (`deciding`),
            and that the table is computed on (`table`).
        calibrated: number of calibrated layers, i.e. layers that read a mean over the image.
        steps: training steps of the adapters.
        decisions: for each fitted part its effect on the measure; the part is kept if that is an improvement by more
            than its standard error.
        refinement: result of fitting refinements; None if the network has no map to refine.
        gain: result of fitting the gain mask.
        share: the share of the measure to keep.
        chosen: mask of the file: the least work that keeps the share, or else the mask that keeps most.
        is_kept: True if the chosen mask keeps the share.
        network: the file.
        evaluation: evaluation of everything low and of all budgets.
    """

    measure: str
    photos: Mapping[str, Sequence[str]]
    calibrated: int
    steps: int
    decisions: Mapping[str, Estimate]
    refinement: RefinementFit | None
    gain: GainFit
    share: float
    chosen: str
    is_kept: bool
    network: Path
    evaluation: EvaluationReport

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the fitted parts that are kept."""
        return tuple(name for name, decision in self.decisions.items() if decision.is_improvement)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        return {**super().to_dict(), "kept": list(self.kept)}

    def parts(self) -> Iterator[RenderableType]:
        """Yield the table of budgets, which photos did what, what was fitted and kept, and the chosen budget."""
        yield from self.evaluation.parts()
        yield Text(self._about_photos())
        if self.calibrated:
            yield Text(f"{self.calibrated} layers read means over the image")
        yield Text(f"level adapters were trained for {self.steps} steps")
        if (refined := self.refinement) is not None:
            yield Text(
                f"refinements were fitted to {refined.images} images: divergence {refined.before:.4f} before, "
                f"{refined.after:.4f} after"
            )
        shares = ", ".join(f"{name} {percent(value)} %" for name, value in self.gain.captured.items())
        yield Text(f"share of the loss in the tenth of the patches ranked best: {shares}")
        for name, decision in self.decisions.items():
            fate = "kept" if decision.is_improvement else "discarded: no improvement by more than its error"
            yield Text(
                f"{PARTS[name]}: {100 * decision.change:+.2f} (±{100 * decision.error:.2f}) points of "
                f"{WORDS[self.measure]}; {fate}"
            )
        if (count := len(self.photos["deciding"])) < FEW:
            error = max(decision.error for decision in self.decisions.values())
            yield Text(
                f"{count} photos decided what is kept: they cannot tell improvements below {100 * error:.2f} points, "
                f"nor whether larger ones hold for other photos. Give {FEW * HELD_OUT} photos or more."
            )
        row = next(row for row in self.evaluation.rows if row.mask == self.chosen)
        words = f"{percent(_quality(row))} % {WORDS[self.measure]}"
        if self.measure == CLASSES:
            words += f" ({percent(row.pixel_accuracy)} % agreement)"
        words += f" at {_cost(row)}"
        if self.is_kept:
            yield Text(f"{self.chosen} keeps {words}", style="bold green")
        else:
            text = f"no budget keeps {percent(self.share)} %; most keeps {self.chosen}: {words}"
            yield Text(text, style="bold yellow")
        yield Text(f"wrote {self.network}")

    def figure(self) -> Figure:
        """Draw accuracy against work."""
        return self.evaluation.figure()

    def _about_photos(self) -> str:
        fitted, deciding, table = (len(self.photos[name]) for name in ("fitted", "deciding", "table"))
        if self.photos["deciding"] != self.photos["table"]:
            return (
                f"photos: {fitted} were fitted to, {deciding} others decided what is kept, and the table and the "
                f"choice of the budget are of {table} others"
            )
        return (
            f"photos: {fitted} were fitted to; {table} others decided what is kept, and the table and the choice of "
            f"the budget are of the same, so it may flatter what was kept: from {_APART} photos on they are apart"
        )


def tune(
    network: str | AdaptiveModel,
    images: str | Path | Samples,
    *,
    output: Path,
    minutes: float = 20.0,
    keep: float = 0.99,
    steps: int = 0,
    seed: int = 0,
    fractions: Sequence[float] = FRACTIONS,
    rounds: int = 3,
    weights: str = "auto",
    options: Mapping[str, Any] | None = None,
    step: Step = silent,
    trust: bool = False,
) -> TuningReport:
    """Fit level adapters, refinements and a gain mask to photos without labels, and choose a budget.

    The weights of the network do not change, and so its outputs with everything high do not change. Each fitted part
    is kept only if photos that it was not fitted to show that it helps: the balanced fidelity to the dense network
    (mean IoU over the classes that it predicts; see `TuningReport.measure` for other networks) must improve by more
    than the standard error of the change (a paired bootstrap over the photos, which few photos widen). A discarded
    part is not in the file.
    Adapters and gain mask are fitted to a divergence in which all classes count the same, see
    `cadsurgery.finetune.balance`.

    The budget is the one with the least work of the whole network that keeps a share of the balanced fidelity, among
    everything low, budgets of `detail`, and, if it is kept, budgets of `gain`.

    Every eighth photo is held out for the table. From 40 photos on, another eighth decides what is kept; of fewer,
    the same photos do both. An interrupted run continues when called again with the same arguments; the number of
    steps, which depends on the time, is then that of the first call.

    Args:
        network: a converted network or file, or a network by name, or `module:function`.
        images: a folder of photos, or data of `cs.open_data` or of your own, see `cadsurgery.data.samples.Samples`;
            labels do not count.
        output: folder of the run, for `net.safetensors`, `report.json` and `curve.png`.
        minutes: processor time for all fitting; comparing and evaluating take additional time.
        keep: share of the balanced fidelity to keep, in 0..1.
        steps: training steps of the adapters, and of the refinements; 0 to use the time.
        seed: seed of everything random.
        fractions: budgets to evaluate, in 0..1.
        rounds: timing rounds on the first photo; 0 for none.
        weights: weights of a network by name.
        options: further options of `adaptify` for such a network.
        step: progress callback.
        trust: run code that a converted file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: a value is out of range, there are fewer than ten photos, the network has no level below full
            resolution, or the folder contains another run.
        CadError: an error of the network, the photos or the folder.
    """
    _check_numbers(minutes, keep, steps, rounds, fractions)
    check_packages(TRAINING.log)
    photos = _open(images)
    fitted, deciding, table = _divide(photos)
    folder = make_folder(output)
    step("building and converting")
    net = network
    if not isinstance(net, AdaptiveModel):
        net = open_converted(net, "", options, weights=weights, trust=trust)
    net = copy.deepcopy(net).eval()
    net.mask = LOW
    settings = replace(TRAINING, seed=seed)
    identity = identity_of(net, photos, None, settings, processes=1)
    counts = {"fitted": len(fitted), "deciding": len(deciding), "table": len(table)}
    identity |= {"minutes": minutes, "steps": steps, "weights": checksum(net.state_dict()), "photos": counts}
    step("running the network on the first photo")
    run = _Run(fitted, deciding, folder, identity, step, _measure_of(net, fitted))
    net = run.calibrate(net)
    net = run.train(net, minutes, steps, settings)
    net = run.refine(net, minutes, steps or STEPS, seed)
    masks = _masks(run.rank(net, minutes, seed), fractions)
    evaluation = evaluate(net, table, list(masks.values()), rounds=rounds, step=step, trust=trust)
    evaluation = _named(evaluation, masks)
    chosen, is_kept = _choose(evaluation, keep)
    net.mask = masks.get(chosen.mask, LOW)
    save(net, folder / NETWORK)
    noted = run.read()
    report = TuningReport(
        measure=run.measure,
        photos={"fitted": fitted.names, "deciding": deciding.names, "table": table.names},
        calibrated=noted["calibrated"],
        steps=noted["steps"],
        decisions=run.decisions,
        refinement=RefinementFit(**noted["refinement"]) if "refinement" in noted else None,
        gain=GainFit(**noted["gain"]),
        share=keep,
        chosen=chosen.mask,
        is_kept=is_kept,
        network=folder / NETWORK,
        evaluation=evaluation,
    )
    report.write(folder / "report.json", folder / "curve.png")
    return report


def _masks(ranking: nn.Module | None, fractions: Sequence[float]) -> dict[str, Budget]:
    """Return budgets of `detail` and, if it is kept, of the fitted ranking, by name."""
    rankings: dict[str, Any] = {"detail": "detail"}
    if ranking is not None:
        rankings["gain"] = ranking
    return {
        f"{name} | budget:fraction={fraction:g}": Budget(rankings[name], fraction)
        for name, fraction in itertools.product(rankings, fractions)
    }


def _named(evaluation: EvaluationReport, masks: Iterable[str]) -> EvaluationReport:
    """Return the report with the masks' names without default options."""
    names = iter(masks)
    return replace(
        evaluation,
        rows=tuple(row if row.anchor else _renamed(row, next(names)) for row in evaluation.rows),
    )


def _choose(evaluation: EvaluationReport, keep: float) -> tuple[Row, bool]:
    """Return the row with the least work that keeps enough, or else the best, and True if it keeps enough."""
    rows = [row for row in evaluation.rows if not row.anchor or row.mask == LOW]
    enough = [row for row in rows if _quality(row) >= keep]
    return (min(enough, key=lambda row: row.macs) if enough else max(rows, key=_quality)), bool(enough)


def _check_numbers(minutes: float, keep: float, steps: int, rounds: int, fractions: Sequence[float]) -> None:
    in_range = minutes > 0 and 0 < keep <= 1 and steps >= 0 and rounds >= 0
    if not in_range or not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise InvalidInput(
            f"minutes={minutes}, keep={keep}, steps={steps}, rounds={rounds}, fractions={tuple(fractions)}.",
            next="give minutes above 0, keep in 0..1, and budgets between 0 and 1.",
        )


def _open(images: str | Path | Samples) -> SegmentationData:
    """Open the photos; there must be enough to hold some out."""
    photos = open_data(f"images:{images}", "all") if isinstance(images, (str, Path)) else as_data(images)
    if len(photos) < _FEWEST:
        raise InvalidInput(
            f"{photos.name} has {len(photos)} photos.",
            why=f"every {HELD_OUT}th is held out for the evaluation.",
            next=f"give {_FEWEST} or more.",
        )
    return photos


@dataclass(frozen=True)
class _Run:
    """The stages of a run in one folder; a stage with a file in the folder is not repeated.

    Each stage takes the network as it is and returns it with another part, or as it is if the part is no improvement.
    Parts are fitted to `photos`, and `deciding` decides by the measure; `judged` are the judgements of the last network
    that was kept, by mask and photo.
    """

    photos: SegmentationData
    deciding: SegmentationData
    folder: Path
    identity: Identity
    step: Step
    measure: str
    judged: list[list[Judgement]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse a folder with another run."""
        check_same_run(self.read().get("identity", self.identity), self.identity, self.folder)
        self._note(identity=self.identity)

    def read(self) -> dict[str, Any]:
        """Return the values that were noted in the folder."""
        return read_json(self.folder / "tune.json")

    def _note(self, **values: Any) -> None:
        write_json(self.folder / "tune.json", {**self.read(), **values})

    def _fit(self, name: str, part: nn.Module, work: Callable[[], Mapping[str, Any]]) -> None:
        """Load a part from a file of an earlier call, or fit it, note the result and write the file."""
        path = self.folder / name
        if not path.is_file():
            self._note(**work())
            write_tensors(path, part.state_dict())
            return
        with as_file_error(f"{path} does not fit the network.", "choose another output folder."):
            part.load_state_dict(load_file(path))

    # -- stages ----------------------------------------------------------------------------------------

    def calibrate(self, net: AdaptiveModel) -> AdaptiveModel:
        """Calibrate the level adapters of values computed from means."""
        candidate = copy.deepcopy(net)
        adapters = candidate.add_adapters()

        def work() -> dict[str, Any]:
            some = self._some(_MOST)
            told = self._told(some, "calibrating means over the image", ROUNDS * len(some))
            return {"calibrated": calibrate_adapters(candidate, told)}

        self._fit(CALIBRATED, adapters, work)
        return self._better("calibration", net, candidate) if self.read()["calibrated"] else net

    def train(self, net: AdaptiveModel, minutes: float, steps: int, settings: Settings) -> AdaptiveModel:
        """Train all level adapters by the divergence from the network itself, in which classes count the same."""
        candidate = copy.deepcopy(net)
        adapters = candidate.add_adapters()

        def work() -> dict[str, Any]:
            cached, body = self._cache(candidate), body_of(candidate)
            balanced = self._balanced(settings, cached, body)
            count = steps or self.read().get("steps", 0)
            if not count:
                count = max(1, int(60 * minutes * _TRAINING / self._seconds(candidate, cached, balanced)))
            self._note(steps=count)
            show = self._counter("training level adapters", "step", count)
            self._train(body, cached, replace(balanced, steps=count), self.folder / "training", show)
            return {"steps": count}

        self._fit(TRAINED, adapters, work)
        return self._better("adapters", net, candidate)

    def refine(self, net: AdaptiveModel, minutes: float, steps: int, seed: int) -> AdaptiveModel:
        """Fit refinements, if the network has a map to refine."""
        candidate = copy.deepcopy(net)
        try:
            adapters = candidate.add_refinement()
        except InvalidInput:
            return net

        def work() -> dict[str, Any]:
            what = "fitting refinements"
            refined = fit_refinement(
                candidate,
                self._told(self.photos, what, 2 * len(self.photos), 60 * _REFINING * minutes),
                minutes=_REFINING * minutes,
                steps=steps,
                seed=seed,
                on_step=self._counter(what, "step", steps),
            )
            return {"refinement": refined.to_dict()}

        self._fit(REFINED, adapters, work)
        return self._better("refinement", net, candidate)

    def rank(self, net: AdaptiveModel, minutes: float, seed: int) -> nn.Module | None:
        """Fit a gain mask, and return it if it ranks patches better than `detail`."""
        net.mask = "gain"
        ranking = net.mask

        def work() -> dict[str, Any]:
            gain = fit_gain(
                net,
                self._told(self.photos, "measuring what each patch loses", 0, 60 * _RANKING * minutes),
                minutes=_RANKING * minutes,
                seed=seed,
                balance=float(self.measure == CLASSES),
                on_step=self._counter("fitting the gain mask", "step", GAIN_STEPS),
            )
            return {"gain": gain.to_dict()}

        self._fit(RANKED, ranking, work)

        def compare() -> Estimate:
            judged = self._judge(net, [Budget(ranking, fraction) for fraction in _DECIDING], "the gain mask")
            return self._compare(self._judged_of(net)[1:], judged)

        return ranking if self._decide("gain", compare).is_improvement else None

    # -- deciding --------------------------------------------------------------------------------------

    @property
    def decisions(self) -> dict[str, Estimate]:
        """The decisions so far, by part."""
        noted = self.read().get("decisions", {})
        return {
            name: Estimate(**{**values, "error": math.nan if values["error"] is None else values["error"]})
            for name, values in noted.items()
        }

    def _decide(self, name: str, compare: Callable[[], Estimate]) -> Estimate:
        """Return the effect of a part, also from an earlier call."""
        decisions = self.decisions
        if name not in decisions:
            decisions[name] = compare()
            self._note(decisions={name: decision.to_dict() for name, decision in decisions.items()})
        return decisions[name]

    def _better(self, name: str, net: AdaptiveModel, candidate: AdaptiveModel) -> AdaptiveModel:
        """Return the network with another part if that is an improvement, otherwise the network as it is."""
        judged: list[list[Judgement]] = []

        def compare() -> Estimate:
            judged[:] = self._judge(candidate, _deciding_masks(), PARTS[name])
            return self._compare(self._judged_of(net), judged)

        if not self._decide(name, compare).is_improvement:
            return net
        self.judged[:] = judged
        return candidate

    def _judged_of(self, net: AdaptiveModel) -> list[list[Judgement]]:
        """Return the judgements of the network as it is."""
        self.judged[:] = self.judged or self._judge(net, _deciding_masks(), "the network as it is")
        return self.judged

    def _judge(self, net: AdaptiveModel, masks: Sequence[object], what: str) -> list[list[Judgement]]:
        """Compare a network under each mask with the dense network, photo by photo."""
        fast, judged = net.optimize(), [list[Judgement]() for _ in masks]
        kind: Kind = "values" if self.measure == VALUES else "classes"
        photos = self._told(self.deciding, f"comparing {what}")
        for index in range(len(photos)):
            image, _ = inputs_of(net, photos, index)
            dense, size = dense_high(fast, image), (image[0].shape[2], image[0].shape[3])
            for place, mask in enumerate(masks):
                with torch.inference_mode():
                    judged[place].append(judge(0.0, fast(*image, mask=mask), dense, None, size, kind))
        return judged

    def _compare(self, before: list[list[Judgement]], after: list[list[Judgement]]) -> Estimate:
        """Estimate the change of the measure over all masks."""
        old, new = (
            [pool(judgements) for judgements in zip(*judged, strict=True)] for judged in (before, after)
        )
        return estimate(new, old, self.measure)

    # -- photos and progress ---------------------------------------------------------------------------

    def _balanced(self, settings: Settings, cached: CachedStem, body: AdaptiveModel) -> Settings:
        """Return the settings with weights of the classes; unchanged for outputs that are no maps of class scores."""
        if self.measure != CLASSES:
            return settings
        if "class_weights" not in self.read():
            places = range(0, len(cached), 2 * -(-len(cached) // (2 * _MOST)))  # no mirrored ones
            show, shares = self._counter("counting classes", "photo", len(places)), list[Tensor]()
            for number, place in enumerate(places, 1):
                show(number)
                inputs, _ = cached[place]
                shares.append(class_shares(dense_high(body, tuple(value[None] for value in inputs))))
            self._note(class_weights=class_weights(torch.stack(shares).mean(0)).tolist())
        chosen = {**settings.objective_options, "class_weights": self.read()["class_weights"]}
        return replace(settings, objective_options=chosen)

    def _cache(self, net: AdaptiveModel) -> CachedStem:
        """Return the stem's outputs for as many photos as memory allows, evenly spread, each also mirrored."""
        bytes_per_photo = CachedStem(net, self.photos.at([0]), flip=True).bytes
        some = self._some(max(1, _MEMORY // bytes_per_photo))
        return CachedStem(net, self._told(some, "running the stem over the photos"), flip=True)

    def _seconds(self, net: AdaptiveModel, cached: CachedStem, settings: Settings) -> float:
        """Return the processor time of a training step in seconds."""
        times: list[float] = []
        show = self._counter("measuring the time of a step", "step", _TRIAL)

        def note(number: int) -> None:
            times.append(time.process_time())
            show(number)

        with tempfile.TemporaryDirectory() as folder:
            body = body_of(copy.deepcopy(net))
            self._train(body, cached, replace(settings, steps=_TRIAL), Path(folder), note)
        return (times[-1] - times[0]) / (_TRIAL - 1)

    @staticmethod
    def _train(
        body: AdaptiveModel, data: CachedStem, settings: Settings, output: Path, show: Callable[[int], None]
    ) -> None:
        fit(
            body, data, settings, output=output, device="cpu", on_step=lambda row: show(int(row["step"] or 0))
        )

    def _some(self, most: int) -> SegmentationData:
        """Return photos to fit to, at most so many, evenly spread."""
        return self.photos.at(range(0, len(self.photos), -(-len(self.photos) // most)))

    def _told(
        self, photos: SegmentationData, what: str, total: int = 0, seconds: float = math.inf
    ) -> SegmentationData:
        """Return the photos; each time one is read, progress is reported, see `_counter`."""
        show, numbers = self._counter(what, "photo", total or len(photos), seconds), itertools.count(1)

        def read(position: int) -> Any:
            show(next(numbers))
            return photos.read(position)

        return replace(photos, read=read)

    def _counter(self, what: str, item: str, total: int, seconds: float = math.inf) -> Callable[[int], None]:
        """Return a function that reports the item with a number, counted from 1; all take so many seconds at most."""
        begin = time.perf_counter()

        def show(number: int) -> None:
            limit = None if math.isinf(seconds) else max(0.0, seconds - (time.perf_counter() - begin))
            self.step(f"{what}, {item} {number} of {total}", number - 1, total, limit)

        return show


def _deciding_masks() -> list[object]:
    return [LOW, *(Budget("detail", fraction) for fraction in _DECIDING)]


def _divide(photos: SegmentationData) -> tuple[SegmentationData, SegmentationData, SegmentationData]:
    """Return the photos to fit to, those that decide what is kept, and those of the table; none has labels."""
    photos, count = photos.unlabelled(), len(photos)
    table = range(0, count, HELD_OUT)
    deciding = range(HELD_OUT // 2, count, HELD_OUT) if count >= _APART else table
    fitted = [place for place in range(count) if place not in table and place not in deciding]
    return photos.at(fitted), photos.at(deciding), photos.at(table)


def _measure_of(net: AdaptiveModel, photos: SegmentationData) -> str:
    """Return the measure for the outputs of a network."""
    net = copy.deepcopy(net)  # the first picture may set its normalisation
    output = dense_high(net, inputs_of(net, photos, 0)[0])
    if kind_of(output) == "values":
        return VALUES
    return AGREEMENT if maps_of(output)[0].shape[2:].numel() == 1 else CLASSES


def _renamed(row: Row, mask: str) -> Row:
    high, low = row.output_stride
    return row.with_values(f"{mask} {high}->{low}", mask=mask, typed=mask)


def _cost(row: Row) -> str:
    """Return the work in words: relative to the network as given, if its MACs are known."""
    if row.macs_of_given is None:
        return f"{row.macs_of_high:.2f} of the work of the dense network"
    return f"{row.macs_of_given:.2f} of the work of the network as given"


def _quality(row: Row) -> float:
    """Return the share of the dense network's output that is kept, see `TuningReport.measure`."""
    if row.relative_error is not None:
        return float(1 - row.relative_error)
    return float(row.pixel_accuracy if row.balanced_fidelity is None else row.balanced_fidelity)
