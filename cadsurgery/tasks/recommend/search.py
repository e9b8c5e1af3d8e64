"""Recommend a setting: run all settings on the same pictures in turn, drop those that cannot win, choose one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.data import Samples, SegmentationData, as_data, open_data, sample_of
from cadsurgery.data.channels import check_bands
from cadsurgery.data.datasets import identity_table, number_classes
from cadsurgery.data.images import check_size, normalise, read_labels, resized
from cadsurgery.data.networks import Source
from cadsurgery.data.samples import pictures_of
from cadsurgery.data.sources import (
    class_names,
    label_values,
    labels_of,
    open_pictures,
    split_place,
    warn_of_two_values,
)
from cadsurgery.kernels import isa
from cadsurgery.methods.side import Side
from cadsurgery.network.adaptify import adaptify, copy_network
from cadsurgery.network.export import INT8
from cadsurgery.network.export.engine import check_packages
from cadsurgery.network.export.engines import ENGINES
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.storage import checksum, load
from cadsurgery.support import files
from cadsurgery.support.divergence import maps_of
from cadsurgery.support.errors import (
    CadError,
    FileError,
    InvalidInput,
    NotInstalled,
    as_refusal,
    check_name,
    first_line,
    warn,
)
from cadsurgery.support.files import make_folder
from cadsurgery.support.folders import visible, warn_of_left_out
from cadsurgery.support.kinds import FOLDER, check_kind
from cadsurgery.support.memory import free_memory, in_mebibytes
from cadsurgery.support.plain import split_options
from cadsurgery.support.progress import Step, counted, silent, time_in_words
from cadsurgery.tasks.journal import NAME, Identity, Journal, digest_of
from cadsurgery.tasks.judging import FEW, FOUND, Judgement, in_rows, kind_to_judge
from cadsurgery.tasks.large import SMALL, memory_of_whole
from cadsurgery.tasks.measuring import (
    ERROR,
    FIDELITY,
    MIOU,
    Kind,
    PictureBatch,
    Quality,
    measure,
    refuse_images,
)
from cadsurgery.tasks.open import (
    is_file,
    normalised_by,
    open_any,
    original,
    provenance,
    unconverted,
    with_statistics,
)
from cadsurgery.tasks.recommend.calls import PRECISIONS, Calls
from cadsurgery.tasks.recommend.choice import LOOK_EVERY, Chosen, choose, is_beaten, rows_of
from cadsurgery.tasks.recommend.report import Recommendation, Requirement
from cadsurgery.tasks.recommend.settings import Candidates, find_candidates, in_turn
from cadsurgery.tasks.sides.engine_sides import TORCH, engine_for

RUNTIMES = (TORCH, *ENGINES)
FEWEST = 3  # pictures after which time may end a run
_MOST_TURNS = 5  # in which a picture is timed
_CALIBRATED_BY = 32  # pictures at most
_LOOKED_AT = 100  # pictures whose labels are checked first; later ones are reported as failed
_MOST_WORK = 2.0  # of the network as given: what multiplies more is not tried
_COMPILING = 60.0  # seconds that torch.compile may take, which nothing foretells


def recommend(
    network: str | nn.Module,
    images: str | Path | Samples,
    *,
    labels: str | Path | None = None,
    keep: float | None = None,
    at_most: float | None = None,
    runtime: str = TORCH,
    precision: str = "float32",
    size: tuple[int, int] | None = None,
    limit: int | None = None,
    minutes: float = 10.0,
    split: str = "all",
    weights: str = "auto",
    options: Mapping[str, Any] | None = None,
    bands: Sequence[int] = (),
    output: Path | None = None,
    step: Step = silent,
    trust: bool = False,
) -> Recommendation:
    """Recommend how to run a network on pictures like these, on this machine.

    Compared are the network as given, the same on pictures of other sizes (with the scores scaled back), dense networks
    at other output strides, and conversions by `adaptify` under several masks. Each picture is run through all of them
    in turn, which gives the time of each, and its quality: against labels if there are some, else fidelity to the
    network as given. Settings that others beat for sure in both are dropped on the way.

    An interrupted run keeps what it has measured and resumes when it is called again with the same arguments.

    Args:
        network: a name or `module:function`, or a module; it is not changed. Of a converted network, or its file, the
            network before the conversion is taken, with the weights that it has now.
        images: a folder of photos, a clip, the spec of data (see `open_data`), or data of your own, see
            `cadsurgery.data.samples.Samples`.
        labels: folder with a PNG of the same name for each photo: the class number of each pixel, 255 ignored (of a
            clip those frames are used that have labels, `000025.png`); or
            `folder:PATH,ignore=11`, where further values are ignored (slashes separate several), and `classes=` is the
            number of classes or their names, by default one for each output.
        keep: the least share of the quality of the network as given; the fastest setting that keeps it is
            recommended. Default: .99, unless `at_most` is given.
        at_most: milliseconds of a picture; the best setting that takes no more is recommended.
        runtime: `torch`, or the engine that all settings are exported to, a name of
            `cadsurgery.support.defaults.ENGINES`.
        precision: `float32`, `bfloat16`, or `int8`: in an engine, by default `onnx-kernels`, calibrated by the
            pictures.
        size: (height, width) that pictures are resized to; default: the size of the first.
        limit: the first so many pictures only.
        minutes: for all of it. Settings for whose preparation no time is left are not tried, and measuring ends with
            the pictures that are done, three at least.
        split: of data by spec; `all` means `val` where the data has named splits.
        weights: of a network by name; see `build_model`.
        options: `output_stride` (only that pair is tried), `region` or `normalisation` of `adaptify`; the latter also
            tells how pictures are normalised for the network, instead of what its weights state.
        bands: which bands of the pictures the network reads, counted from 1, in their order; default: those of the
            data, or all.
        output: folder of the run; default: the network's name with `-recommended`. It gets `report.json`, `curve.png`.
        step: called with what is being done.
        trust: run code that a converted file names; see `cadsurgery.load`.

    Raises:
        InvalidInput: an option is out of range, the folder holds another run, the network is of another method, does
            not run on the pictures or returns no maps.
        FileError: no picture can be read with its labels, or the folder cannot be written.
        NotInstalled: the runtime is not installed.
    """
    deadline = time.perf_counter() + 60 * minutes
    runtime = engine_for(runtime, precision)
    _check_options(keep, at_most, runtime, precision, minutes, limit)
    check_size(size)
    labels_folder = None if labels is None else _split_labels(labels)[0]
    photos = _open(images, split, bands, labels_folder)
    data = photos.first(limit)
    if labels_folder is not None:
        _look_into_labels(photos, labels_folder)
    step("building the network")
    model, source = _as_given(network, weights, trust, bands)
    options = {name: value for name, value in (options or {}).items() if value is not None}
    options = with_statistics(options, source, pictures_of(data))
    source = normalised_by(source, options.get("normalisation"))
    pictures = _Pictures(data.read_for(source), source, size)
    first = pictures.readable(1)[0]
    refuse_what_does_not_fit(model, first)
    pictures.data = _with_labels(pictures.data, labels, _output_of(model, first))
    _check_labels(pictures.data, step)
    folder = make_folder(output or Path(f"{_short_name(source)}-recommended"))
    step("finding settings")
    candidates = find_candidates(
        model,
        first,
        options,
        has_labels=pictures.data.is_labelled,
        few=runtime != TORCH,
    )
    calls = Calls(
        model,
        first,
        {name: value for name, value in options.items() if name != "output_stride"},
        max((1, *(low for setting in candidates.settings for low in setting.pair or ()))),
        runtime,
        precision,
        pictures.readable(_CALIBRATED_BY) if precision == INT8 else [],
        folder,
    )
    identity = _identity_of(calls, candidates, source, data, labels)
    run = _MeasuringRun(candidates, calls, pictures, folder, identity, step, minutes, deadline)
    try:
        run.measure()
    except KeyboardInterrupt:  # which ends it with the pictures that are done, if there are any
        if not run.done:
            raise
        run.end = "interrupted"
    request = Requirement(keep if keep is not None or at_most is not None else 0.99, at_most)
    name, typed_weights = network if isinstance(network, str) else "", weights
    if is_file(network):  # which is converted anew by the name of its network, with its weights
        name, typed_weights = source.name, name
    typed: dict[str, Any] = {} if typed_weights == "auto" else {"weights": typed_weights}
    typed |= {"bands": ",".join(map(str, bands))} if bands else {}
    measured_by = run.measured_by
    rows = rows_of(candidates, run.judged, run.macs, measured_by)
    if len(rows) == 1 and run.late:
        choice = Chosen(rows[0], (run.too_little,), is_decided=False)
    else:
        choice = choose(rows, request, measured_by, candidates.refusal)
    report = Recommendation(
        network=name,
        options={**typed, **calls.options},
        data=pictures.data.name,
        images=run.done,
        of_images=len(pictures.data),
        image=tuple(first.shape[1:]),
        resized=pictures.is_resized,
        measure=measured_by,
        request=request,
        runtime=runtime,
        precision=precision,
        rows=rows,
        chosen=choice.row,
        reasons=(*choice.reasons, *_on_precision(precision)),
        images_needed=choice.images_needed,
        end=run.end,
        refused=run.refused,
        folder=folder,
        failed=tuple(run.failed),
        is_decided=choice.is_decided,
        **provenance(network, source, torch.device("cpu")),
    )
    report.write(folder / "report.json", folder / "curve.png")
    return report


def _identity_of(
    calls: Calls, candidates: Candidates, source: Source, data: SegmentationData, labels: str | Path | None
) -> Identity:
    """Return what must be the same when the run is continued."""
    listed = [setting.to_dict() for setting in candidates.settings]
    folder = None if labels is None else _split_labels(labels)[0]
    return {
        "network": source.name,
        "weights": checksum(dict(calls.model.state_dict())),
        "images": list(data.names),
        "labels": str(labels or ""),
        "files": digest_of([*data.names, *(labels_of(name, folder) for name in data.names if folder)]),
        "options": {name: str(value) for name, value in sorted(calls.options.items())},
        "normalisation": [list(source.mean), list(source.std)],
        "bands": list(data.bands),
        "size": list(calls.image.shape[2:]),
        "settings": listed,
        "runtime": calls.runtime,
        "precision": calls.precision,
    }


def _on_precision(precision: str) -> tuple[str, ...]:
    """Advise another precision where float32 is not what this processor is built for."""
    if precision != "float32" or isa.used() != "amx":
        return ()
    return (
        "This processor multiplies bfloat16 and int8 in tiles (AMX), several times as fast as float32: try "
        "--precision bfloat16, or int8.",
    )


def _check_options(
    keep: float | None, at_most: float | None, runtime: str, precision: str, minutes: float, limit: int | None
) -> None:
    check_name("runtime", runtime, RUNTIMES)
    check_name("precision", precision, PRECISIONS)
    if runtime != TORCH:
        check_packages(ENGINES[runtime])
    if runtime != TORCH and precision == "bfloat16":
        raise InvalidInput(
            "settings are not exported in bfloat16.",
            next='use precision="float32" or "int8", or runtime="torch".',
        )
    if keep is not None and at_most is not None:
        raise InvalidInput(
            f"keep={keep:g} and at_most={at_most:g} cannot be combined.",
            why="one asks for the fastest setting that is good enough, the other for the best that is fast enough.",
            next="give one of them.",
        )
    in_range = (keep is None or 0 < keep <= 1) and (at_most is None or at_most > 0)
    if not in_range or minutes <= 0 or (limit is not None and limit < 1):
        raise InvalidInput(
            f"keep={keep}, at_most={at_most}, minutes={minutes}, limit={limit}.",
            next="give keep in 0..1, milliseconds and minutes above 0, and at least one picture.",
        )


def _open(
    images: str | Path | Samples, split: str, bands: Sequence[int], labels: Path | None
) -> SegmentationData:
    if not isinstance(images, (str, Path)):
        data = as_data(images)
        return replace(data, bands=check_bands(bands)) if bands else data
    photos = open_pictures(images, split, bands=bands)
    if photos.name.startswith("clip:") and labels is not None and ",labels=" not in photos.name:
        # the frames that have labels
        return open_data(f"{photos.name},labels={labels}", split, bands=bands)
    return photos


def _as_given(
    network: str | nn.Module, weights: str, trust: bool, bands: Sequence[int]
) -> tuple[nn.Module, Source]:
    """Return a copy of the network that the user has, in evaluation mode and channels_last memory.

    Of a converted network it is the network before the conversion, with the weights that it has now.
    """
    if open_any(network, trust) is not None:
        raise InvalidInput(
            f"{network if isinstance(network, str) else type(network).__name__} is a network of another method.",
            why="recommended are settings of adaptify.",
            next="give the network that it was made from.",
        )
    if is_file(network):
        network = load(network, trust=trust)  # type: ignore[arg-type]
    if isinstance(network, AdaptiveModel):
        if network.adapters:
            warn("The adapters of the converted network are left out: they are fitted to its own levels.")
        network = unconverted(network)
    model, source = original(network, weights, bands=bands)
    return copy_network(model).eval().to(memory_format=torch.channels_last), source


def _short_name(source: Source) -> str:
    name = source.name.rpartition(":")[2] or source.name
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name) or "network"


def _output_of(model: nn.Module, image: Tensor) -> int:
    """Return the number of channels of the map that the network computes for a picture."""
    # The network decides what it takes.
    with as_refusal(lambda error: refuse_images(error, image.shape[2:])), torch.inference_mode():
        return maps_of(model(image))[0].shape[1]


def refuse_what_does_not_fit(model: nn.Module, image: Tensor) -> None:
    """Refuse pictures (1, C, H, W) whose maps take more memory than is free, and name what computes them.

    Raises:
        InvalidInput: they do.
    """
    free, (_, channels, height, width) = free_memory(), image.shape
    if height * width < SMALL or free is None:
        return
    example = image[..., :256, :256].contiguous()
    try:
        net = adaptify(model, "all", coarsest=32, example_input=example, verify_laws=False)
    except CadError:  # what cannot be planned is tried
        return
    if (needed := memory_of_whole(net, channels, (height, width))) > free:
        raise InvalidInput(
            f"the maps of the network do not fit into memory for a picture of {height}x{width}.",
            why=f"they take up to {in_mebibytes(needed, free)}, and {in_mebibytes(free, needed)} are free.",
            next='compute it in bands of rows: net.optimize(memory="1.5GiB") or cadsurgery run --memory 1.5GiB; '
            "or compare settings on smaller pictures: --size HxW.",
        )


# -- pictures ------------------------------------------------------------------------------------------


@dataclass
class _Pictures:
    """Pictures of one size (that of the first, if none is given), normalised for the network, and their labels."""

    data: SegmentationData
    source: Source
    size: tuple[int, int] | None
    is_resized: bool = False

    def read(self, at: int) -> tuple[Tensor, Tensor | None]:
        """Read a picture (1, C, H, W) and its labels (1, H, W), if there are any, and resize both."""
        image, labels = sample_of(self.data, at)
        own = (image.shape[1], image.shape[2])
        self.size = self.size or own
        if own != self.size:
            self.is_resized = True
            image = resized(image, self.size)
            labels = F.interpolate(labels[None, None].double(), self.size, mode="nearest")[0, 0].long()
        image = normalise(image, self.source).unsqueeze(0)
        return image, labels.unsqueeze(0) if self.data.is_labelled else None

    def readable(self, count: int) -> list[Tensor]:
        """Return the first pictures that can be read, so many at most.

        Raises:
            CadError: there are none.
        """
        images, first = list[Tensor](), CadError("there are no pictures.")
        for at in range(len(self.data)):
            if len(images) == count:
                break
            try:
                images.append(self.read(at)[0])
            except CadError as error:
                first = first if at else error
        if not images:
            raise first
        return images


def _with_labels(data: SegmentationData, spec: str | Path | None, outputs: int) -> SegmentationData:
    """Return photos with labels from a folder, a PNG of the same name for each photo, or with their own; see
    `recommend`.

    Raises:
        InvalidInput: an option has another form, or there are more classes than outputs.
    """
    if spec is None:
        return data.with_outputs(outputs)
    folder, options = _split_labels(spec)
    classes = class_names(options["classes"]) if "classes" in options else number_classes(outputs)
    if len(classes) > outputs:
        raise InvalidInput(
            f"labels {spec} have {len(classes)} classes and the network has {outputs} outputs.",
            next=f"give classes={outputs}, or none.",
        )
    paths = [labels_of(name, folder) for name in data.names]

    def read(position: int) -> tuple[Any, Any]:
        return data.read(position)[0], read_labels(paths[position]).numpy()

    table = identity_table(len(classes), label_values("ignore", options.get("ignore", "")))
    remedy = (
        f"ignore such pixels: --labels folder:{folder},ignore={{labels}}, or use a network of more outputs."
    )
    return replace(data, classes=classes, read=read, table=table, remedy=remedy)


def _check_labels(data: SegmentationData, step: Step) -> None:
    """Refuse labels that do not fit, before settings are prepared; files that cannot be read are reported later.

    Raises:
        InvalidInput: labels of the first pictures, so many at most, are out of range or of another size.
    """
    places = range(min(len(data), _LOOKED_AT) if data.is_labelled else 0)
    for place in counted(places, step, "checking labels, picture", name=str):
        with suppress(FileError):
            sample_of(data, place)


def _split_labels(spec: str | Path) -> tuple[Path, dict[str, str]]:
    """Return the folder and the options of labels, see `recommend`.

    Raises:
        InvalidInput: an option has another form.
    """
    text = str(spec)
    place, rest = ("", "") if files.exists(text) else split_place(text.removeprefix("folder:"))
    return Path(place or text), split_options(rest, dict.fromkeys(("classes", "ignore")), "labels")


def _look_into_labels(photos: SegmentationData, folder: Path) -> None:
    """Warn of labels that hold 0 and 255 alone, and of those that belong to none of the photos.

    Raises:
        FileError: there is no such folder.
    """
    check_kind(folder, FOLDER)
    if not files.is_folder(folder):
        raise files.absent(folder, "folder")
    labels = {labels_of(name, folder) for name in photos.names}
    remedy = (
        "--images folder:PATH,classes=2,values=0/255 reads 255 as class 1, with the photos in PATH/images and the "
        "labels in PATH/labels"
    )
    warn_of_two_values(sorted(path for path in labels if files.is_file(path)), remedy)
    others = [path.name for path in visible(folder) if path not in labels]
    warn_of_left_out(folder, {"no labels of these photos": others})


# -- measuring -----------------------------------------------------------------------------------------


@dataclass
class _MeasuringRun:
    """A run, whose measurements are written to the journal of its folder after each picture.

    By the name of a setting are its judgements, on the first pictures that could be read, its MACs on the first
    picture, and why it is not run; `failed` are pictures that cannot be used, `end` is why measuring ended early.
    `minutes` are what the user gave, up to `deadline` by `time.perf_counter`; `late` are the names of settings for
    which they did not suffice, and `taken` are the seconds after which the first of them was left out. `running` are
    the settings that run on the next picture.
    """

    candidates: Candidates
    calls: Calls
    pictures: _Pictures
    folder: Path
    identity: Identity
    step: Step
    minutes: float
    deadline: float
    judged: dict[str, list[Judgement]] = field(default_factory=dict)
    macs: dict[str, int] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: list[dict[str, str]] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    taken: float = 0.0
    end: str = ""
    running: list[Side] = field(default_factory=list)
    kind: Kind = "auto"

    def __post_init__(self) -> None:
        """Resume the run that the folder holds."""
        self.journal = Journal(self.folder / NAME, self.identity)
        rows = self.journal.rows
        *_, known = [{}, *(row["known"] for row in rows if "known" in row)]
        self.macs, self.kind = known.get("macs", {}), known.get("kind", self.kind)
        if known.get("late") and self.minutes > known["minutes"]:
            self.journal.remove()  # all settings are to be run on the same pictures
            return
        self.late = known.get("late", [])
        self.failed = [row["error"] for row in rows if "error" in row]
        for row in rows:
            for name, judgement in row.get("judged", {}).items():
                self.judged.setdefault(name, []).append(Judgement.from_dict(judgement))

    @property
    def _given(self) -> str:
        return self.candidates.settings[0].name

    @property
    def done(self) -> int:
        """Number of pictures that were measured."""
        return len(self.judged.get(self._given, ()))

    @property
    def measured_by(self) -> str:
        """The measure of quality."""
        if self.pictures.data.is_labelled:
            return MIOU
        return {"values": ERROR, "found": FOUND}.get(self.kind, FIDELITY)

    @property
    def left(self) -> float:
        """Seconds up to the deadline."""
        return self.deadline - time.perf_counter()

    @property
    def too_little(self) -> str:
        """A sentence for a run whose time did not suffice for any setting but the network as given."""
        return (
            f"--minutes {self.minutes:g} was too little to try a setting besides the network as given. Reading, "
            f"planning and preparing that took {time_in_words(self.taken)}: give --minutes "
            f"{max(1, math.ceil(self.taken / 15))} or more."
        )

    def measure(self) -> None:
        """Run all settings on the pictures, one after the other."""
        sides = self._prepare()

        def metrics() -> list[Quality]:
            of_labels = [Quality(of_labels=True)] if self.pictures.data.is_labelled else []
            return [Quality(self.kind), *of_labels]

        measured = measure(
            lambda: self.running,
            self._pictures(sides),
            metrics,
            self._is_late,
            turns=self._turns,
            read=lambda output: maps_of(output)[0],
        )
        for picture, tallies in measured:
            if isinstance(tallies, CadError):
                raise tallies
            each = zip(self.running, tallies, strict=True)
            judged = {side.name: Judgement.of(tally) for side, tally in each}
            for name, judgement in judged.items():
                self.judged.setdefault(name, []).append(judgement)
            plain = {name: judgement.to_dict() for name, judgement in judged.items()}
            self.journal.add({"path": self.pictures.data.names[picture.places[0]], "judged": plain})
        if not self.done:
            raise CadError.from_dict(self.failed[0])

    def _is_late(self) -> bool:
        if self.done >= FEWEST and self.left < 0:
            self.end = f"after {self.minutes:g} minutes"
        return bool(self.end)

    def _pictures(self, sides: Mapping[str, Side]) -> Iterator[PictureBatch]:
        """Yield the pictures that are left, and choose the settings that run on each."""
        data = self.pictures.data
        for at in range(self.done + len(self.failed), len(data)):
            self.running = self._chosen(sides)
            text = f"picture {at + 1} of {len(data)}, {len(self.running)} settings"
            self.step(text, at, len(data), max(0.0, self.left))
            try:
                image, labels = self.pictures.read(at)
            except CadError as error:
                self.failed.append({"image": data.names[at], **error.to_dict()})
                self.journal.add({"path": data.names[at], "error": self.failed[-1]})
                continue
            yield PictureBatch(image, (image.shape[2], image.shape[3]), labels, (at,))

    def _prepare(self) -> dict[str, Side]:
        """Return the sides of all settings that can be run, as far as time suffices to prepare them and to measure
        some pictures; each has run once, to be warm when it is timed."""
        sides: dict[str, Side] = {}
        image, settings = self.calls.image, in_turn(self.candidates.settings)
        taken = {"compiled": _COMPILING}  # seconds that the last setting of a kind took
        measuring = 0.0  # seconds of the pictures that are measured in any case
        given: Any = None
        for setting in counted(settings, self.step, "preparing setting", name=lambda setting: setting.name):
            if self.done and len(self.judged.get(setting.name, ())) < self.done:
                continue  # dropped, or not tried, before the run was interrupted
            if sides and self.left < taken.get(setting.kind, 0.0) + measuring:
                self.taken = self.taken or 60 * self.minutes - self.left
                self.late.append(setting.name)
                continue
            begin = self.left
            try:
                macs = self.macs[setting.name] = self.calls.macs(setting)
                of_given = macs / max(1, self.macs[self._given])
                if of_given > _MOST_WORK:
                    self.refused[setting.name] = f"{of_given:.1f} times the work of the network as given."
                    continue
                call = self.calls.make(setting)
                made = self.left
                with torch.inference_mode():
                    output = call(image)
                given = output if setting.kind == "given" else given
                if rows := in_rows(given, output, (image.shape[2], image.shape[3]), setting.scale != 1):
                    self.refused[setting.name] = f"nothing tells its quality: {rows}."
                    continue
                taken[setting.kind] = begin - self.left
                measuring += min(FEWEST, len(self.pictures.data)) * self._turns * (made - self.left)
            except CadError as error:
                if setting.kind == "given" or isinstance(error, NotInstalled):
                    raise
                self.refused[setting.name] = first_line(error)
                continue
            if setting.kind == "given" and self.kind == "auto":
                # Labels are compared with classes, also of scores that have no negative value.
                self.kind = "classes" if self.pictures.data.is_labelled else kind_to_judge(output)
            sides[setting.name] = Side(setting.name, call, macs)
        if self.late:
            self.refused["; ".join(self.late)] = f"--minutes {self.minutes:g} left no time to prepare that."
        known = {"kind": self.kind, "macs": self.macs, "late": self.late, "minutes": self.minutes}
        self.journal.begin()
        self.journal.add({"known": known})
        return sides

    def _chosen(self, sides: Mapping[str, Side]) -> list[Side]:
        """Return the settings that are not dropped: the network as given first, the others in rotating order."""
        given = self._given
        others = [name for name in sides if name != given and len(self.judged.get(name, ())) == self.done]
        if self.done and self.done % LOOK_EVERY == 0:
            judged = {name: self.judged[name] for name in (given, *others)}
            measure = self.measured_by
            others = [name for name in others if not is_beaten(judged[name], judged.values(), measure)]
        turn = self.done % max(1, len(others))
        return [sides[name] for name in (given, *others[turn:], *others[:turn])]

    @property
    def _turns(self) -> int:
        """Number of times that a picture is run by each setting.

        Few pictures are run several times, all settings in turn, and the best time counts: among few, one call that
        another program disturbs is an error that cannot be told from a difference between pictures.
        """
        return min(_MOST_TURNS, math.ceil(FEW / len(self.pictures.data)))
