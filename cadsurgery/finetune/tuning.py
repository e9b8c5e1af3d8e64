"""Fit a network's masks and levels to photos without labels (`cadsurgery tune`), and report fidelity against work."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import RenderableType
from rich.text import Text
from safetensors.torch import load_file
from torch import nn

from cadsurgery.data import SegmentationData, open_data
from cadsurgery.data.sources import HELD_OUT
from cadsurgery.finetune.adapters import calibrate_adapters
from cadsurgery.finetune.checkpoints import Identity, check_same_run, identity_of
from cadsurgery.finetune.evaluation import evaluate as measure
from cadsurgery.finetune.gain import GainFit, fit_gain
from cadsurgery.finetune.loop import fit
from cadsurgery.finetune.refinement import STEPS, RefinementFit, fit_refinement
from cadsurgery.finetune.results import write_network
from cadsurgery.finetune.settings import Settings
from cadsurgery.masks import Budget
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.stem import CachedStem, body_of
from cadsurgery.network.storage import checksum, write_tensors
from cadsurgery.support.errors import FileError, InvalidInput, first_line
from cadsurgery.support.files import make_folder, write_whole
from cadsurgery.tasks.evaluation import EvaluationReport, evaluate
from cadsurgery.tasks.for_each import Step, silent
from cadsurgery.tasks.open import open_converted
from cadsurgery.tasks.report import Report, Row, percent

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)
RANKINGS = ("gain", "detail")
_FEWEST = HELD_OUT + 2  # smallest number of photos
_MEMORY = 2 << 30  # bytes of stem outputs kept for training
_TRAINING, _REFINING, _RANKING = 0.45, 0.15, 0.25  # shares of the time
_TRIAL = 3  # number of steps to measure the time of a step
CALIBRATED, TRAINED, REFINED, NETWORK = (
    f"{name}.safetensors" for name in ("calibrated", "trained", "refined", "net")
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
        calibrated: number of calibrated layers, i.e. layers that read a mean over the image.
        steps: training steps of the adapters.
        before: metrics of the held-out photos with everything downsampled, after calibration alone.
        after: the same with trained adapters.
        is_adapted: True if trained adapters were better; then they are in the file.
        refinement: result of fitting refinements; None if the network has no map to refine.
        gain: result of fitting the gain mask.
        share: the share to keep: of agreement with the dense network, or of one minus the relative error.
        chosen: mask of the file: the least work that keeps the share, or else the mask that keeps most.
        is_kept: True if the chosen mask keeps the share.
        network: the file.
        evaluation: evaluation of all budgets on the held-out photos.
    """

    calibrated: int
    steps: int
    before: dict[str, float]
    after: dict[str, float]
    is_adapted: bool
    refinement: RefinementFit | None
    gain: GainFit
    share: float
    chosen: str
    is_kept: bool
    network: Path
    evaluation: EvaluationReport

    def parts(self) -> Iterator[RenderableType]:
        """Yield the table of budgets, what was fitted, and the chosen budget."""
        yield from self.evaluation.parts()
        if self.calibrated:
            yield Text(f"{self.calibrated} layers that read means over the image are calibrated")
        yield Text(
            f"level adapters, {self.steps} steps: divergence with everything downsampled "
            f"{self.before['divergence']:.4f} before, {self.after['divergence']:.4f} after; {_fate(self.is_adapted)}"
        )
        if (refined := self.refinement) is not None:
            yield Text(
                f"refinement, {refined.images} images: divergence {refined.before:.4f} before, "
                f"{refined.after:.4f} after; {_fate(refined.is_better)}"
            )
        shares = ", ".join(f"{name} {percent(value)} %" for name, value in self.gain.captured.items())
        yield Text(f"share of the loss in the tenth of the patches ranked best: {shares}")
        row = next(row for row in self.evaluation.rows if row.mask == self.chosen)
        words = f"{percent(_share(row))} % at {_cost(row)}"
        if self.is_kept:
            yield Text(f"{self.chosen} keeps {words}", style="bold green")
        else:
            text = f"no budget keeps {percent(self.share)} %; most keeps {self.chosen}: {words}"
            yield Text(text, style="bold yellow")
        yield Text(f"wrote {self.network}")

    def figure(self) -> Figure:
        """Draw accuracy against work."""
        return self.evaluation.figure()


def tune(
    network: str | AdaptiveModel,
    images: str | Path | SegmentationData,
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

    The budget is the one with the least work that keeps a share of the network's output at full resolution.

    The weights of the network do not change, and so its outputs with everything high do not change. Every eighth
    photo is held out for the evaluation. An interrupted run continues when called again with the same arguments; the
    number of steps, which depends on the time, is then that of the first call.

    Args:
        network: a converted network or file, or a network by name, or `module:function`.
        images: a folder of photos, or data of `cs.open_data`; labels do not count.
        output: folder of the run, for `net.safetensors`, `report.json` and `curve.png`.
        minutes: processor time for all fitting; the evaluation takes additional time.
        keep: share to keep, in 0..1.
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
    in_range = minutes > 0 and 0 < keep <= 1 and steps >= 0 and rounds >= 0
    if not in_range or not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise InvalidInput(
            f"minutes={minutes}, keep={keep}, steps={steps}, rounds={rounds}, fractions={tuple(fractions)}.",
            next="give minutes above 0, keep in 0..1, and budgets between 0 and 1.",
        )
    photos = images if isinstance(images, SegmentationData) else open_data(f"images:{images}", "all")
    if len(photos) < _FEWEST:
        raise InvalidInput(
            f"{photos.name} has {len(photos)} photos.",
            why=f"every {HELD_OUT}th is held out for the evaluation.",
            next=f"give {_FEWEST} or more.",
        )
    held_out, others = (
        _select(photos, [at for at in range(len(photos)) if (at % HELD_OUT == 0) == is_held_out])
        for is_held_out in (True, False)
    )
    folder = make_folder(output)
    step("building and converting")
    net = network
    if not isinstance(net, AdaptiveModel):
        net = open_converted(net, "", options, weights=weights, trust=trust)
    net = copy.deepcopy(net).eval()
    net.mask = "none"
    settings = replace(TRAINING, seed=seed)
    identity = identity_of(net, photos, None, settings, processes=1)
    identity |= {"minutes": minutes, "steps": steps, "weights": checksum(net.state_dict())}
    run = _Run(net, others, folder, identity, step)
    calibrated = run.calibrate()
    before = measure(net, held_out)
    count = run.train(minutes, steps, settings)
    after = measure(net, held_out)
    is_adapted = after["divergence"] < before["divergence"]
    if not is_adapted:
        run.calibrate()
    refinement = run.refine(minutes, steps or STEPS, seed)
    gain = run.rank(minutes, seed)
    fitted = net.mask
    masks = {
        f"{name} | budget:fraction={fraction:g}": Budget(fitted if name == "gain" else name, fraction)
        for name in RANKINGS
        for fraction in fractions
    }
    evaluation = evaluate(net, held_out, list(masks.values()), rounds=rounds, step=step, trust=trust)
    names = iter(masks)  # without default options
    named = tuple(row if row.anchor else _renamed(row, next(names)) for row in evaluation.rows)
    evaluation = replace(evaluation, rows=named)
    rows = [row for row in named if not row.anchor]
    enough = [row for row in rows if _share(row) >= keep]
    chosen = min(enough, key=lambda row: row.macs) if enough else max(rows, key=_share)
    net.mask = masks[chosen.mask]
    write_network(net, folder / NETWORK)
    report = TuningReport(
        calibrated=calibrated,
        steps=count,
        before=before,
        after=after,
        is_adapted=is_adapted,
        refinement=refinement,
        gain=gain,
        share=keep,
        chosen=chosen.mask,
        is_kept=bool(enough),
        network=folder / NETWORK,
        evaluation=evaluation,
    )
    report.write(folder / "report.json", folder / "curve.png")
    return report


@dataclass(frozen=True)
class _Run:
    """The stages of a run in one folder; a stage with a file in the folder is not repeated.

    Attributes:
        net: the network, which is tuned in place.
        photos: photos to fit to.
        folder: folder of the run.
        identity: plain values that identify the run.
        step: progress callback.
    """

    net: AdaptiveModel
    photos: SegmentationData
    folder: Path
    identity: Identity
    step: Step

    def __post_init__(self) -> None:
        """Refuse a folder with another run."""
        check_same_run(self._read().get("identity", self.identity), self.identity, self.folder)
        self._note(identity=self.identity)

    def _read(self) -> dict[str, Any]:
        path = self.folder / "tune.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            return dict(values)
        except (OSError, ValueError, TypeError) as error:
            raise FileError(
                f"{path} cannot be read.", why=first_line(error), next="choose another output folder."
            ) from error

    def _note(self, **values: Any) -> None:
        known = self._read()
        with write_whole(self.folder / "tune.json") as temporary:
            temporary.write_text(json.dumps({**known, **values}, indent=2) + "\n", encoding="utf-8")

    def _restore(self, name: str, part: nn.Module) -> bool:
        """Load a part from a file of an earlier call; True if there is one."""
        path = self.folder / name
        if not path.is_file():
            return False
        try:
            part.load_state_dict(load_file(path))
        except Exception as error:
            raise FileError(
                f"{path} does not fit the network.",
                why=first_line(error),
                next="choose another output folder.",
            ) from error
        return True

    def calibrate(self) -> int:
        """Calibrate the level adapters of values computed from means; return the number of layers."""
        adapters = self.net.add_adapters()
        if not self._restore(CALIBRATED, adapters):
            self.step("calibrating means over the image")
            self._note(calibrated=calibrate_adapters(self.net, self.photos))
            write_tensors(self.folder / CALIBRATED, adapters.state_dict())
        return int(self._read()["calibrated"])

    def train(self, minutes: float, steps: int, settings: Settings) -> int:
        """Train all level adapters by the divergence from the network itself; return the number of steps."""
        adapters = self.net.add_adapters()
        if not self._restore(TRAINED, adapters):
            self.step("running the stem over the photos")
            cached, body = self._cache(), body_of(self.net)
            count = steps or self._read().get("steps", 0)
            if not count:
                self.step("measuring a step")
                count = max(1, int(60 * minutes * _TRAINING / self._seconds(cached, settings)))
            self._note(steps=count)
            fit(
                body,
                cached,
                replace(settings, steps=count),
                output=self.folder / "training",
                device="cpu",
                on_step=lambda row: self.step(f"level adapters, step {row['step']} of {count}"),
            )
            write_tensors(self.folder / TRAINED, adapters.state_dict())
        return int(self._read()["steps"])

    def refine(self, minutes: float, steps: int, seed: int) -> RefinementFit | None:
        """Fit refinements; return None if the network has no map to refine."""
        try:
            adapters = self.net.add_refinement()
        except InvalidInput:
            return None
        if not self._restore(REFINED, adapters):
            self.step("fitting refinements")
            refined = fit_refinement(
                self.net, self.photos, minutes=_REFINING * minutes, steps=steps, seed=seed
            )
            self._note(refinement=refined.to_dict())
            write_tensors(self.folder / REFINED, adapters.state_dict())
        return RefinementFit(**self._read()["refinement"])

    def _cache(self) -> CachedStem:
        """Return the stem's outputs for as many photos as memory allows, evenly spread, each also mirrored."""
        bytes_per_photo = CachedStem(self.net, _select(self.photos, [0]), flip=True).bytes
        step = -(-len(self.photos) * bytes_per_photo // _MEMORY)
        return CachedStem(self.net, _select(self.photos, range(0, len(self.photos), step)), flip=True)

    def _seconds(self, cached: CachedStem, settings: Settings) -> float:
        """Return the processor time of a training step in seconds."""
        times: list[float] = []
        with tempfile.TemporaryDirectory() as folder:
            fit(
                body_of(copy.deepcopy(self.net)),
                cached,
                replace(settings, steps=_TRIAL),
                output=folder,
                device="cpu",
                on_step=lambda row: times.append(time.process_time()),
            )
        return (times[-1] - times[0]) / (_TRIAL - 1)

    def rank(self, minutes: float, seed: int) -> GainFit:
        """Fit the gain mask."""
        self.net.mask = "gain"
        self.step("measuring what each patch loses")
        return fit_gain(self.net, self.photos, minutes=_RANKING * minutes, seed=seed)


def _select(data: SegmentationData, places: Sequence[int]) -> SegmentationData:
    """Return some of the photos, without labels."""
    names = tuple(data.names[place] for place in places)
    return replace(data, names=names, classes=(), read=partial(_read_alone, data.read, tuple(places)))


def _read_alone(read: Callable[[int], tuple[Any, Any]], places: Sequence[int], position: int) -> Any:
    return read(places[position])[0], None


def _fate(is_better: bool) -> str:
    return "kept" if is_better else "discarded: no better on held-out photos"


def _renamed(row: Row, mask: str) -> Row:
    high, low = row.output_stride
    return row.with_values(f"{mask} {high}->{low}", mask=mask, typed=mask)


def _cost(row: Row) -> str:
    """Return the work in words: relative to the network as given, if its MACs are known."""
    if row.macs_of_given is None:
        return f"{row.macs_of_high:.2f} of the work of the dense network"
    return f"{row.macs_of_given:.2f} of the work of the network as given"


def _share(row: Row) -> float:
    """Return the share of the dense network's output that is kept."""
    accuracy: float | None = row.pixel_accuracy
    if accuracy is not None:
        return accuracy
    return 1 - row.relative_error if row.relative_error is not None else 0.0
