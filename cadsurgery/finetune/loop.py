"""The training loop: one run in one folder, which can be resumed from every checkpoint at the exact step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import cadsurgery.finetune.blend  # noqa: F401  # registers its objective
from cadsurgery.data.networks import Source
from cadsurgery.data.samples import Samples, check_data, is_labelled
from cadsurgery.finetune.batches import Augmentation, Batch, batches
from cadsurgery.finetune.checkpoints import (
    Checkpoint,
    identity_of,
    optimizer_tensors,
    read_checkpoint,
    restore,
    restore_optimizer,
)
from cadsurgery.finetune.groups import (
    freeze_unused,
    make_groups,
    make_optimizer,
    set_modes,
    stem_of,
    trained_alone,
)
from cadsurgery.finetune.learning_rates import Draw, SampleOrder, derive_seed, learning_rate
from cadsurgery.finetune.logs import CsvLog, Row, TensorBoardLog, check_packages, open_log
from cadsurgery.finetune.objectives import Objective, copy_dense, make_objective
from cadsurgery.finetune.validation import count_outputs, evaluate
from cadsurgery.following.trace import evaluating
from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.methods.method_files import Converted, save
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.program import Derived
from cadsurgery.network.storage import write_tensors
from cadsurgery.support.errors import FileError, InvalidInput, TrainingStopped, first_line
from cadsurgery.support.files import make_folder
from cadsurgery.support.launcher import world
from cadsurgery.support.rows import Plain
from cadsurgery.tasks.journal import Identity, check_same_run
from cadsurgery.tasks.task_options import Settings

Validation = Samples | Callable[[nn.Module], dict[str, float]]
TRAINED = "fine-tuned"  # description of the weights in a trained network's source
START, LAST, BEST, NETWORK = (f"{name}.safetensors" for name in ("start", "checkpoint", "best", "net"))

_EXACTLY = (
    "a resumed run continues exactly as it began; the learning rate depends on the number of steps too."
)


@dataclass(frozen=True)
class Outcome(Plain):
    """Result of a training run.

    Attributes:
        steps: total number of completed steps.
        resumed: step at which this call began.
        before: metrics on the validation data before the first step; empty without validation.
        after: metrics after the last step.
        best_step: step of the best validation; 0 if there was none.
        best: its mIoU, or its relative error if the metrics have no mIoU.
        network: file of the final network.
        best_network: file of the best network, if there was a validation.
        checkpoint: file of the last checkpoint.
        groups: trained parameters and their rates; see `Group.describe`.
    """

    steps: int
    resumed: int
    before: dict[str, float]
    after: dict[str, float]
    best_step: int
    best: float | None
    network: Path
    best_network: Path | None
    checkpoint: Path
    groups: tuple[dict[str, object], ...]


def fit(
    net: nn.Module,
    data: Samples,
    settings: Settings | None = None,
    *,
    output: Path | str,
    validation: Validation | None = None,
    objective: Callable[[nn.Module], Objective] | None = None,
    augment: Augmentation | None = None,
    train: str | None = None,
    resume: bool = True,
    device: str = "auto",
    on_step: Callable[[Row], None] | None = None,
) -> Outcome:
    """Train a network, in place, and write it to `output/net.safetensors`.

    Everything random depends on seed and step alone. A killed run continues from its last checkpoint when `fit` is
    called again, to the same weights bit for bit (on the CPU with the same number of threads).

    Args:
        net: an adaptive network, or any other for comparison. It is left in evaluation mode on the device.
        data: training samples, with or without labels; see `Samples`.
        settings: default: the published settings.
        output: folder of the run; created if missing.
        validation: samples, or a function from the network to its metrics, including `miou` or `relative_error`.
            Samples without labels measure fidelity to the initial network with everything kept high.
        objective: creates the objective of the network; default: the objective named in the settings.
        augment: function (image, labels, seed) -> (image, labels); not for samples with tuples of inputs.
        train: `all`, `exits` or `gates`, replaces the value in the settings; see `Settings`.
        resume: False refuses a folder that contains a run.
        device: `auto` (a GPU if there is one, or the launcher's choice) or `cpu`.
        on_step: called in the main process with each row of the log, when the step is complete.

    Raises:
        InvalidInput: there are no data, labels have no output, the network or a setting does not fit, the folder
            contains another run, or a library is missing.
        FileError: the folder or a checkpoint cannot be read or written.
        TrainingStopped: the loss or the weights are not finite; the last good checkpoint is kept.
    """
    settings = (settings or Settings()).changed({"train": train} if train is not None else {})
    check_data(data, "training")
    if not settings.objective:
        name = "mixed" if is_labelled(data) else "divergence"
        of_method = net.objective if isinstance(net, ConvertedModel) else ""
        settings = replace(settings, objective=of_method or name)
    if isinstance(net, Derived) and net.is_optimized:
        raise InvalidInput(
            "an optimised network cannot be trained.",
            why="its weights are folded.",
            next="train the network it was made from, and call optimize() afterwards.",
        )
    modes = {module: module.training for module in net.modules()}
    gradients = {parameter: parameter.requires_grad for parameter in net.parameters()}
    try:
        folder = make_folder(output)
        run = _Training(net, data, settings, folder, validation, objective, augment, resume, device, on_step)
        outcome = run.train()
        modes = dict.fromkeys(modes, False)
        return outcome
    finally:
        for parameter, requires_gradient in gradients.items():
            parameter.requires_grad_(requires_gradient)
            parameter.grad = None
        for module, training in modes.items():
            module.training = training


@dataclass(eq=False)
class _Training:
    """One call of `fit`, with the state that its steps share."""

    net: nn.Module
    data: Samples
    settings: Settings
    folder: Path
    validation: Validation | None
    make: Callable[[nn.Module], Objective] | None
    augment: Augmentation | None
    resume: bool
    device: str
    on_step: Callable[[Row], None] | None

    def __post_init__(self) -> None:
        net, settings, make = self.net, self.settings, self.make
        self.accelerator = _make_accelerator(settings, self.device)
        self.main: bool = self.accelerator.is_main_process
        self.process: int = self.accelerator.process_index
        processes: int = self.accelerator.num_processes
        self.sampling = SampleOrder(
            len(self.data), settings.seed, settings.batch, settings.accumulate, processes
        )
        net.to(self.accelerator.device)
        self.chosen = trained_alone(net, settings.train)
        self.is_fixed = stem_of(net) if settings.freeze == "stem" else lambda name: False
        first = next(self._batches(range(1), workers=0))
        self.classes = count_outputs(net, self.data, first)
        identity = identity_of(net, self.data, self.augment, settings, processes)
        if make is not None:
            identity["objective"] = getattr(make, "__qualname__", type(make).__name__)
        self.dense: nn.Module | None = None  # initial network, reference of a validation without labels
        start = self._start(identity)  # loads the starting weights into the network
        for name, parameter in net.named_parameters():
            is_trained = parameter in self.chosen if self.chosen else not self.is_fixed(name)
            parameter.requires_grad_(parameter.requires_grad and is_trained)
        named = partial(make_objective, settings.objective, options=settings.objective_options)
        self.objective: Objective = (make or named)(net).to(self.accelerator.device)
        compares = not (self.validation is None or callable(self.validation) or is_labelled(self.validation))
        if compares and isinstance(net, AdaptiveModel):
            self.dense = getattr(self.objective, "teacher", None) or copy_dense(net)
        set_modes(self.net, self.is_fixed, self.settings)
        freeze_unused(self.objective, first, settings.seed)
        self.groups = make_groups(self.objective.own_parameters(), net, settings)
        self.optimizer = make_optimizer(self.groups, settings)
        self.average = None  # average of the weights; its buffers are the latest
        if settings.ema > 0:
            ema = get_ema_multi_avg_fn(settings.ema)
            self.average = AveragedModel(net, multi_avg_fn=ema, use_buffers=False).eval()
        self.wrapped, self.stepper = self.accelerator.prepare(self.objective, self.optimizer)
        self.state = self._resume(identity, start)
        self.measured: dict[int, dict[str, float]] = {}  # metrics of the last validation, by step

    @property
    def result(self) -> nn.Module:
        """The network that is validated and saved: the average of the weights, if there is one."""
        return self.average.module if self.average is not None else self.net

    def train(self) -> Outcome:
        """Run all remaining steps, and finish the run."""
        resumed = self.state.step
        opened: Any = contextlib.nullcontext()
        if self.main:
            opened = contextlib.closing(open_log(self.settings.log, self.folder, resumed))
        with opened as log:
            self._steps(range(resumed, self.settings.steps), log)
        return self._finish(resumed)

    def _steps(self, steps: range, log: CsvLog | TensorBoardLog | None) -> None:
        source = self._batches(steps, self.settings.workers)
        set_modes(self.net, self.is_fixed, self.settings)
        for step in steps:
            rate = learning_rate(step, 1.0, self.settings)
            scalars = self._step(step, source)
            row: Row = {"step": step + 1, "lr": rate, **scalars}
            last = step + 1 == self.settings.steps
            if self.validation is not None:
                due = last or (step + 1) % self.settings.validate_every == 0
                row[self.goal] = self._validate(step + 1) if due else None
            if log is not None:
                log.write(row)
            if last or (step + 1) % self.settings.save_every == 0:
                self._save(step + 1)
            if self.main and self.on_step is not None:
                self.on_step(row)

    def _step(self, step: int, source: Iterator[Batch]) -> dict[str, float]:
        """Run one optimiser step; return the mean of its scalars over batches and processes."""
        parts = self.settings.accumulate
        rows = []
        for part in range(parts):
            batch = next(source)
            batch.check_labels(self.classes)
            batch = batch.to(self.accelerator.device)
            torch.manual_seed(derive_seed(self.settings.seed, step, part, self.process, 4))
            draw = Draw(self.settings.seed, step, batch.positions)
            quiet = self.accelerator.no_sync(self.wrapped) if part + 1 < parts else contextlib.nullcontext()
            with quiet:
                outputs = self.wrapped(batch.inputs, batch.labels, draw)
                self.accelerator.backward(outputs["loss"] / parts)
            rows.append(torch.stack([value.detach().float() for value in outputs.values()]))
        mean = self.accelerator.reduce(torch.stack(rows).mean(0), reduction="mean")
        scalars: dict[str, float] = dict(zip(outputs, mean.tolist(), strict=True))
        if not math.isfinite(scalars["loss"]):
            raise TrainingStopped(
                f"the loss is {scalars['loss']} at step {step + 1}.",
                where=f"learning rate {learning_rate(step, 1.0, self.settings):.3g}, objective "
                f"{type(self.objective).__name__}",
                why=f"{self.folder / LAST} holds the last good state, of step {self.state.step}."
                if self.state.step
                else "it happened before the first checkpoint.",
                next="start again in another output folder with a lower lr, with clip=1, or in precision no.",
            )
        if self.settings.clip > 0:
            trained = [p for group in self.groups if group.factor > 0 for p in group.parameters.values()]
            self.accelerator.clip_grad_norm_(trained, self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, group["factor"], self.settings)
        self.stepper.step()
        self.stepper.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.net)
        return scalars

    def _batches(self, steps: range, workers: int) -> Iterator[Batch]:
        """Yield the batches of this process."""
        source, process = pictures_for(self.net), self.process
        return batches(
            self.data, self.sampling, self.augment, source, steps=steps, process=process, workers=workers
        )

    def _start(self, identity: Identity) -> Checkpoint:
        """Return the state before the first step, from the folder if it contains this run."""
        path = self.folder / START
        is_there = path.is_file()
        self.accelerator.wait_for_everyone()
        if is_there and not self.resume:
            raise FileError(
                f"{self.folder} holds a run already.",
                next="choose another output folder, remove this one, or resume.",
            )
        if not is_there:
            before = self._measure(self.net)
            if self.main:
                weights = {f"weights.{name}": value for name, value in _tensors(self.net).items()}
                Checkpoint(0, identity, weights, before=before).write(path)
        self.accelerator.wait_for_everyone()
        start = read_checkpoint(path)
        check_same_run(start.identity, identity, self.folder, _EXACTLY)
        restore(start.part("weights"), _tensors(self.net), path)
        return replace(start, tensors={})

    def _resume(self, identity: Identity, start: Checkpoint) -> Checkpoint:
        """Load the last checkpoint, if there is one, and return the state; otherwise the start."""
        path = self.folder / LAST
        if not path.is_file():
            return start
        state = read_checkpoint(path)
        check_same_run(state.identity, identity, self.folder, _EXACTLY)
        restore(state.part("weights"), self.objective.own_tensors(), path)
        trained = self.objective.own_parameters()
        restore_optimizer(self.optimizer, trained, state.part("optimizer"))
        if self.average is not None:
            restore(state.part("ema"), _tensors(self.average), path)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        return replace(state, tensors={})

    def _save(self, step: int) -> None:
        tensors = {f"weights.{name}": value for name, value in self.objective.own_tensors().items()}
        tensors |= optimizer_tensors(self.optimizer, self.objective.own_parameters())
        if self.average is not None:
            tensors |= {f"ema.{name}": value for name, value in _tensors(self.average).items()}
        scaler = self.accelerator.scaler
        state = replace(self.state, step=step, scaler=scaler.state_dict() if scaler is not None else {})
        if self.main:
            replace(state, tensors=tensors).write(self.folder / LAST)
        self.state = state

    @property
    def goal(self) -> str:
        """The metric that selects the best network; it was measured before the first step."""
        return "miou" if "miou" in self.state.before else "relative_error"

    def _validate(self, step: int) -> float:
        """Measure the selecting metric and write the network if it is the best so far."""
        self.measured = {step: self._measure(self.result)}
        value, best = self.measured[step][self.goal], self.state.best
        if best is None or (value > best if self.goal == "miou" else value < best):
            self.state = replace(self.state, best=value, best_step=step)
            if self.main:
                _write_network(self.result, self.folder / BEST)
        return value

    def _measure(self, net: nn.Module) -> dict[str, float]:
        """Return the metrics of a network, the same in every process; empty without validation."""
        if self.validation is None:
            return {}
        if callable(self.validation):
            with torch.no_grad(), evaluating(net):
                figures = self.validation(net)
        else:
            figures = evaluate(net, self.validation, self.dense)
        if "miou" not in figures and "relative_error" not in figures:
            raise InvalidInput(
                "the validation returns neither 'miou' nor 'relative_error'.",
                where=f"it returns {', '.join(figures) or 'nothing'}",
                next="return a dictionary with 'miou', and any other metrics.",
            )
        return figures

    def _finish(self, resumed: int) -> Outcome:
        after = self.measured.get(self.state.step) or self._measure(self.result)
        if self.average is not None:
            restore(_tensors(self.average.module), _tensors(self.net), self.folder)
        network = self.folder / NETWORK
        if self.main:
            _write_network(self.net, network)
        self.accelerator.wait_for_everyone()
        state = self.state
        return Outcome(
            steps=state.step,
            resumed=resumed,
            before=state.before,
            after=after,
            best_step=state.best_step,
            best=state.best,
            network=network,
            best_network=self.folder / BEST if state.best is not None else None,
            checkpoint=self.folder / LAST,
            groups=tuple(group.describe() for group in self.groups),
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by name, including the mask's."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _write_network(net: nn.Module, path: Path) -> None:
    """Write the network: a converted network for `cadsurgery.load`, any other as a state dict."""
    if isinstance(net, Converted):
        # Reports must not call the weights random, even if they were at first.
        if isinstance(net.source, Source):
            net.source = replace(net.source, weights=TRAINED)
        save(net, path)
        return
    write_tensors(path, net.state_dict())


def _make_accelerator(settings: Settings, device: str) -> Any:
    """Create an Accelerator for the settings.

    Raises:
        InvalidInput: the device does not support the precision; or as `world`.
        NotInstalled: a package is, see `check_packages`.
    """
    world()
    check_packages(settings.log)
    import accelerate

    accelerate.state.AcceleratorState._reset_state()  # earlier runs may differ in precision
    if device not in ("auto", "cpu"):
        raise InvalidInput(
            f"training cannot run on device {device!r}.",
            next='use "auto" or "cpu"; choose GPUs with CUDA_VISIBLE_DEVICES or accelerate launch.',
        )
    reason = "its gradients need a scaler, which this device does not support"
    try:
        accelerator = accelerate.Accelerator(mixed_precision=settings.precision, cpu=device == "cpu")
    except (ValueError, RuntimeError) as error:
        accelerator, reason = None, first_line(error)
    if accelerator is None or (settings.precision == "fp16" and accelerator.scaler is None):
        raise InvalidInput(
            f"precision {settings.precision!r} is not available on this device.",
            why=reason,
            next="train in precision no or bf16, or on a GPU.",
        )
    return accelerator
