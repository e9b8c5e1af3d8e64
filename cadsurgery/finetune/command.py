"""The command `cadsurgery finetune`: from names and paths to a trained file and a short report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from cadsurgery.finetune.batches import augmentation
from cadsurgery.finetune.logs import Row, check_packages
from cadsurgery.finetune.loop import Outcome, fit
from cadsurgery.masks import resolve_mask
from cadsurgery.methods.method_files import Converted
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import InvalidInput
from cadsurgery.support.launcher import world
from cadsurgery.support.progress import Step
from cadsurgery.tasks.commands import FinetuneOptions
from cadsurgery.tasks.open import open_any, open_converted, read_by
from cadsurgery.tasks.report import Report
from cadsurgery.tasks.task_options import Settings


@dataclass(frozen=True)
class TrainingReport(Report):
    """Result of the command."""

    model: str
    mask: str
    data: str
    outcome: Outcome

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, including those of the outcome."""
        values = super().to_dict()
        outcome = values.pop("outcome")
        return {**values, **outcome}

    def parts(self) -> Iterator[Text]:
        """Yield a few lines: what was trained, metrics before and after, files."""
        run = self.outcome
        went_on = f", resumed after step {run.resumed}" if run.resumed else ""
        is_named = self.mask.endswith((" exits", " gates", " sampler"))
        what = self.mask if is_named else f"mask {self.mask}"
        yield Text(f"{self.model}, {what}, {self.data}: {run.steps} steps{went_on}")
        for group in run.groups:
            rate = f"lr x {group['factor']}" if group["factor"] else "not trained"
            yield Text(f"  {group['group']}: {group['tensors']} tensors, {group['values']} values, {rate}")
        for name, before in run.before.items():
            yield Text(f"{name}: {before:.4f} before, {run.after[name]:.4f} after")
        if run.best is not None:
            metric = "mIoU" if "miou" in run.after else "relative error"
            yield Text(f"best {metric} {run.best:.4f} at step {run.best_step}: {run.best_network}")
        yield Text(f"wrote {run.network}")


def finetune(*, model: str, options: FinetuneOptions, step: Step) -> TrainingReport:
    """Build or load, convert, train, report; see `cadsurgery finetune --help`.

    Raises:
        CadError: an error of the data, the network or `fit`.
    """
    from cadsurgery.data import open_data
    from cadsurgery.data.samples import pictures_of

    chosen = make_settings(options.config, dict(options.settings))
    world()  # report a wrong start of several processes first
    check_packages(chosen.log)
    if options.mask:
        resolve_mask(options.mask)
    if options.data.startswith("clip:"):
        raise InvalidInput(
            f"training on {options.data}.",
            why="training reads pictures in any order, and a clip is read from its beginning to its end.",
            next="write frames into a folder, ffmpeg -i CLIP -vf fps=1 -start_number 0 frames/%06d.png, and give "
            "--data images:frames.",
        )
    held_out = options.validation_split
    step(f"opening {options.data}")
    training = open_data(options.data, options.split, bands=options.bands)
    validation = open_data(options.data, held_out, bands=options.bands) if held_out else None
    step(f"building {model}")
    classes = len(training.classes) or None
    net: Converted | None = open_any(model, options.trust)
    if net is None:
        net = open_converted(
            *(model, options.mask, options.conversion),
            weights=options.weights,
            num_classes=classes,
            bands=options.bands,
            pictures=pictures_of(training),
            trust=options.trust,
        )
    elif options.mask:
        raise InvalidInput(
            "a network with exits, with gates or with a sampled input has no masks of its own.",
            next="leave out --mask.",
        )
    else:
        read_by(net, options.bands, options.conversion.get("normalisation"), pictures_of(training))
    step("training")
    outcome = fit(
        net,
        training,
        chosen,
        output=options.output,
        validation=validation,
        augment=augmentation(chosen),
        device=options.device,
        on_step=training_steps(step, chosen.steps, chosen.batch * chosen.accumulate),
    )
    data_in_words = f"{training.name} ({len(training)} images)"
    decided_by = net.mask.spec() if isinstance(net, AdaptiveModel) else net.decided_by
    return TrainingReport(model, decided_by, data_in_words, outcome)


def training_steps(step: Step, steps: int, images: int) -> Callable[[Row], None]:
    """Return a callback that shows rows of a training log as steps, with the images per second if the speed is known.

    Args:
        step: progress callback; that of the command line has a `speed`, in steps per second.
        steps: number of steps of the training.
        images: images per step.
    """

    def on_step(row: Row) -> None:
        at = int(row["step"] or 0)
        words = [f"{name} {value:.3g}" for name, value in row.items() if name != "step" and value is not None]
        step(f"step {at} of {steps}", at, steps)
        if speed := getattr(step, "speed", None):
            words.append(f"{speed * images:.1f} images/s")
        step(", ".join((f"step {at} of {steps}", *words)), at, steps)

    return on_step


def make_settings(config: Path | None, overrides: dict[str, Any]) -> Settings:
    """Return the default settings, changed by a file, then by values of which options of the objective are a part.

    Raises:
        InvalidInput: a setting is out of range.
        UnknownName, FileError: as `Settings.read`.
    """
    settings = Settings.read(config) if config is not None else Settings()
    of_objective = settings.objective_options | overrides.pop("objective_options", {})
    return settings.changed({**overrides, "objective_options": of_objective})
