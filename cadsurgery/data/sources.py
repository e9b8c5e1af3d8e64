"""Open data by a spec: a plain folder, photographs without labels, torchvision datasets, generated street scenes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import normalize

from PIL import Image
from torch import Tensor

from cadsurgery.data.channels import check_bands
from cadsurgery.data.clips import ChosenFrames, is_clip, length_of, pyav
from cadsurgery.data.datasets import (
    IGNORED,
    SegmentationData,
    UnreadPicture,
    identity_table,
    label_table,
    number_classes,
    read_file,
)
from cadsurgery.data.images import (
    SCENE_CLASSES,
    SUFFIXES,
    find_images,
    labelled_scene,
    read_labels,
    spread_bands,
)
from cadsurgery.data.stores import refuse_stream
from cadsurgery.support import files
from cadsurgery.support.errors import (
    CadError,
    FileError,
    InvalidInput,
    UnknownName,
    first_line,
    warn,
)
from cadsurgery.support.folders import NO_PICTURES, visible, warn_of_left_out
from cadsurgery.support.kinds import CLIP, FOLDER, PICTURE, check_kind
from cadsurgery.support.plain import split_options
from cadsurgery.support.provenance import check_unclaimed, find_function

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train"),
    "tvmonitor",
)


@dataclass(frozen=True)
class DataKind:
    """One kind of data, see `data_kind`; `open` is a function from (place, split, options, spec) to the data."""

    open: Opener
    options: Mapping[str, str | None]
    splits: tuple[str, ...]
    where: str
    layout: str


Opener = Callable[[str, str, Mapping[str, str], str], SegmentationData]
KINDS: dict[str, DataKind] = {}


def data_kind(
    name: str, options: Mapping[str, str | None], splits: tuple[str, ...], where: str, layout: str
) -> Callable[[Opener], Opener]:
    """Register a function that opens data as a kind of data, `NAME:PATH,option=value`.

    Args:
        name: name of the kind.
        options: accepted options with their defaults as text; None for a required option.
        splits: accepted names of splits; empty if any name is accepted.
        where: instructions for obtaining the data.
        layout: files that the folder must hold.

    The function gets the place, the split, the options and the whole text, and returns the data.

    Raises:
        ValueError: another function has this name.
    """

    def register(function: Opener) -> Opener:
        check_unclaimed("data kind", name, function, {name: kind.open for name, kind in KINDS.items()})
        KINDS[name] = DataKind(function, options, splits, where, layout)
        return function

    return register


def _find_kind(spec: str) -> tuple[str, str]:
    """Return the name of a kind and what follows it; `module:function:PATH` names a kind of the user's."""
    name, _, rest = spec.partition(":")
    function, colon, place = rest.partition(":")
    if name in KINDS or not (colon and function.isidentifier()) or files.exists(spec):
        return name, rest
    opener = find_function(name, function)
    return next((name for name, kind in KINDS.items() if kind.open is opener), name), place


def missing(kind: DataKind, place: str, why: str) -> FileError:
    """Return the error for a folder that does not hold the expected files."""
    layout = "\n    ".join(kind.layout.splitlines())
    return FileError(
        f"there is no such data in {place}.", why=why, next=f"{kind.where} Expected there:\n    {layout}"
    )


_LOOKED_AT = 32  # label files that are looked at for their values

# -- a plain folder ------------------------------------------------------------------------------------


def _read(
    pictures: Sequence[Path] | ChosenFrames, labels: Sequence[Path], position: int
) -> tuple[UnreadPicture | Image.Image, Tensor | None]:
    """Return a picture and its labels; without files of labels they are None."""
    picture = pictures[position]
    image = partial(read_file, picture) if isinstance(picture, Path) else picture
    return image, read_labels(labels[position]) if labels else None


def labels_of(image: str | Path, folder: Path) -> Path:
    """Return the file of an image's labels in a folder: a PNG of its name, in either form of Unicode (systems write
    accents as marks of their own, or not)."""
    name = f"{Path(image).stem}.png"
    forms = (folder / written for written in (name, normalize("NFC", name), normalize("NFD", name)))
    return next((path for path in forms if path.is_file()), folder / name)


@data_kind(
    "folder",
    {"classes": None, "ignore": "", "values": ""},
    (),
    "Give a folder of images and labels of equal names.",
    "SPLIT/images/NAME.jpg (or .png, ...)\nSPLIT/labels/NAME.png, one channel: class of each pixel (or "
    "values=0/255, the stored values of the classes in their order)\n"
    'or, without splits (split "all"): images/ and labels/',
)
def _folder(place: str, split: str, options: Mapping[str, str], spec: str) -> SegmentationData:
    kind, root = KINDS["folder"], Path(place)
    if not files.is_folder(root):
        raise missing(kind, place, "the folder does not exist.")
    folder = root if split == "all" and not files.is_folder(root / split) else root / split
    if not files.is_folder(folder / "images") or not files.is_folder(folder / "labels"):
        splits = sorted(path.name for path in root.iterdir() if (path / "images").is_dir())
        hint = f"there are the splits {', '.join(splits)}." if splits else "it has no splits."
        if (root / "images").is_dir():
            hint = 'it has no splits: choose split "all".'
        raise missing(kind, place, f"{folder} has no folders images and labels; {hint}")
    inside = visible(folder / "images")
    images = [path for path in inside if path.suffix.lower() in SUFFIXES and not files.is_folder(path)]
    labels = [labels_of(image, folder / "labels") for image in images]
    unlabelled = [image for image, label in zip(images, labels, strict=True) if not label.is_file()]
    if unlabelled:
        raise FileError(
            f"{len(unlabelled)} of {len(images)} images have no labels, first {unlabelled[0]}.",
            why=f"{folder / 'labels' / unlabelled[0].stem}.png does not exist.",
            next="add the missing labels, or take these images out.",
        )
    used = {*images, *labels}
    others = [str(path.relative_to(folder)) for path in inside if path not in used]
    unused = [str(path.relative_to(folder)) for path in visible(folder / "labels") if path not in used]
    warn_of_left_out(folder, {NO_PICTURES: others, "labels without an image": unused})
    classes = class_names(options["classes"])
    table = _table(options, len(classes))
    if (IGNORED, IGNORED) in table and str(IGNORED) not in options["ignore"].split("/"):
        warn_of_two_values(labels, f"folder:{place},classes=2,values=0/255 reads 255 as class 1")
    read = partial(_read, images, labels)
    return SegmentationData(
        spec, split, classes, tuple(map(str, images)), read, table, any_range=True, remedy=_REMEDY
    )


_REMEDY = "raise classes=..., or ignore such pixels: ignore={labels}."


def _table(options: Mapping[str, str], classes: int) -> tuple[tuple[int, int], ...]:
    """Return the label table that the options of a folder state."""
    ignore = label_values("ignore", options["ignore"])
    values = label_values("values", options["values"])
    if not values:
        return identity_table(classes, ignore)
    if len(values) != classes or len({*values, *ignore}) != len(values) + len({*ignore}):
        raise InvalidInput(
            f"values={options['values']} does not name one stored value for each of {classes} classes.",
            why="values are those of the classes in their order; none of them can be ignored.",
            next="write e.g. classes=2,values=0/255.",
        )
    return label_table(values, {*ignore, IGNORED} - {*values})


def warn_of_two_values(labels: Sequence[Path], remedy: str) -> None:
    """Warn of label files that hold 0 and 255 alone, as masks of objects do: 255 would be ignored.

    Reading ends with the first file that has another value, and after a few files.

    Args:
        labels: the label files.
        remedy: what reads 255 as a class, in words.
    """
    stored = set[int]()
    looked_at = labels[:: max(1, len(labels) // _LOOKED_AT)][:_LOOKED_AT]
    for path in looked_at:
        with contextlib.suppress(CadError):  # raised again, by name, when the file is used
            stored |= set(read_labels(path).unique().tolist())
        if not stored <= {0, IGNORED}:
            return
    if stored == {0, IGNORED}:
        warn(
            f"the labels in {labels[0].parent} hold only 0 and 255 ({len(looked_at)} of {len(labels)} files read).\n"
            f"  Why: 255 means ignored, which leaves no class but 0.\n"
            f"  Next: {remedy}; if 255 is to be ignored, say so: ignore=255."
        )


def class_names(text: str) -> tuple[str, ...]:
    """Return class names from their number or from names separated by slashes."""
    if not text.isdecimal():
        return tuple(text.split("/"))
    if not 1 <= int(text) <= IGNORED:
        raise InvalidInput(f"classes={text} is not 1..{IGNORED}.", next="give the number of classes.")
    return number_classes(int(text))


def label_values(option: str, text: str) -> list[int]:
    """Return the label values of an option, which slashes separate."""
    return [_number(option, part) for part in text.split("/") if part]


def _number(option: str, text: str) -> int:
    if not text.isdecimal():
        raise InvalidInput(f"{option}={text} is not a number.", next=f"write e.g. {option}=11.")
    return int(text)


# -- images without labels -----------------------------------------------------------------------------

HELD_OUT = 8  # in a folder without splits, every eighth image is for validation


@data_kind(
    "images",
    {"page": ""},
    (),
    "Give a folder of photographs, without labels.",
    "NAME.jpg (or .png, ...), in folders of any depth: every eighth image is val, the others train; any other "
    "split has all images\nor, with splits: train/, val/, test/\nIn a folder with images/ only that is read.\n"
    "or a picture: FILE.tif,page=N is a page of a TIFF file, from 0 on",
)
def _images(place: str, split: str, options: Mapping[str, str], spec: str) -> SegmentationData:
    if options["page"]:
        return _unlabelled([Path(f"{place},page={_number('page', options['page'])}")], split, spec)
    root = Path(place)
    splits = [name for name in ("train", "val", "test") if files.is_folder(root / name)]
    if splits and split not in (*splits, "all"):
        raise missing(KINDS["images"], place, f"it has no {split}; there are the splits {', '.join(splits)}.")
    folders = [root / name for name in splits if split in (name, "all")] or [root]
    inside = [folder / "images" if files.is_folder(folder / "images") else folder for folder in folders]
    places, failures = find_images(inside)
    images, left_out = list(places), {"folders without images": [failure["image"] for failure in failures]}
    if inside != [root]:
        beside = [path.name for path in visible(root) if path.name not in (*splits, "images", "labels")]
        left_out[f"not in {' or '.join(splits or ['images'])}"] = beside
    warn_of_left_out(root, left_out)
    if not splits and split in ("train", "val") and len(images) > 1:
        held_out = images[::HELD_OUT]
        images = held_out if split == "val" else sorted(set(images) - set(held_out))
    return _unlabelled(images, split, spec)


def _unlabelled(images: Sequence[Path], split: str, spec: str) -> SegmentationData:
    read = partial(_read, images, ())
    return SegmentationData(spec, split, (), tuple(map(str, images)), read, identity_table(0), any_range=True)


# -- clips ---------------------------------------------------------------------------------------------


@data_kind(
    "clip",
    {"every": "", "start": "0", "labels": "", "classes": "", "ignore": "", "values": ""},
    (),
    "Give a clip.",
    "a clip: FILE.mp4 (.mov, .mkv, ...), of which every N-th frame is used (every=N; default: one a second)\n"
    "with labels=FOLDER the frames that have labels: FOLDER/000025.png, named by the number of the frame in six "
    "digits, the first is 000000; one channel, as in folder",
)
def _clip(place: str, split: str, options: Mapping[str, str], spec: str) -> SegmentationData:
    """Open every N-th frame of a clip, or those that have labels.

    A frame is named by the clip and its number in six digits, `drive.mp4/000025`; its labels are `000025.png`.
    """
    pyav()  # refuse first what would be missing anyway
    path = Path(place)
    if not files.is_file(path):
        raise files.absent(path)
    count, rate = length_of(path)
    start = _number("start", options["start"])
    every = _number("every", options["every"]) if options["every"] else 0
    numbers: Sequence[int] = range(start, count, every or (1 if options["labels"] else max(1, round(rate))))
    if options["labels"]:
        numbers = _labelled_frames(path, Path(options["labels"]), numbers, count)
    names = tuple(f"{path}/{number:06d}" for number in numbers)
    labels = [labels_of(name, Path(options["labels"])) for name in names] if options["labels"] else []
    read = partial(_read, ChosenFrames(path, numbers), labels)
    if not options["classes"]:
        if values := [option for option in ("ignore", "values") if options[option]]:
            raise InvalidInput(f"{values[0]}= needs classes=.", next="add classes=11.")
        return SegmentationData(spec, split, (), names, read, None if labels else identity_table(0))
    classes = class_names(options["classes"])
    return SegmentationData(spec, split, classes, names, read, _table(options, len(classes)), remedy=_REMEDY)


def _labelled_frames(path: Path, folder: Path, numbers: Sequence[int], count: int) -> list[int]:
    """Return those frames of a clip whose labels are in a folder; say what else the folder holds.

    Raises:
        FileError: there is no such folder, or the clip has no frame of a number.
    """
    check_kind(folder, FOLDER, what="the folder of labels")
    if not files.is_folder(folder):
        raise files.absent(folder, "folder")
    inside = visible(folder)
    labelled = {int(name.stem): name for name in inside if re.fullmatch(r"\d{6,}\.png", name.name)}
    if beyond := [number for number in sorted(labelled) if number >= count]:
        raise FileError(
            f"{path} has no frame {beyond[0]}, and there are labels of it: {labelled[beyond[0]]}.",
            why=f"it has {count} frames, 0 to {count - 1}.",
            next="name the labels by the numbers of the frames; the first is 000000.png.",
        )
    others = [name.name for name in inside if name not in labelled.values()]
    warn_of_left_out(folder, {"not named by the number of a frame, as 000025.png": others})
    return [number for number in sorted(labelled) if number in numbers]


# -- torchvision ---------------------------------------------------------------------------------------


def of_torchvision(
    make: Callable[[], Any],
    classes: tuple[str, ...],
    table: Mapping[int, int],
    spec: str,
    split: str,
    images: str = "images",
) -> SegmentationData:
    """Return the data that a dataset of torchvision holds, in the order of their names.

    Args:
        make: creates the dataset.
        classes: names of the classes.
        table: class of each stored value.
        spec, split: what was opened.
        images: the dataset's attribute that holds the paths of its images.

    Raises:
        FileError: the dataset finds no files.
    """
    name, rest = _find_kind(spec)
    try:
        dataset = make()
    except (RuntimeError, OSError) as error:
        raise missing(KINDS[name], split_place(rest)[0], first_line(error)) from error
    names = [str(path) for path in getattr(dataset, images)]
    data = SegmentationData(spec, split, classes, tuple(names), dataset.__getitem__, tuple(table.items()))
    return data.at(sorted(range(len(names)), key=names.__getitem__))


@data_kind(
    "cityscapes",
    {},
    ("train", "val", "test"),
    "Get leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip at https://www.cityscapes-dataset.com "
    "(after registration).",
    "leftImg8bit/SPLIT/CITY/*_leftImg8bit.png\ngtFine/SPLIT/CITY/*_gtFine_labelIds.png",
)
def _cityscapes(place: str, split: str, options: Mapping[str, str], spec: str) -> SegmentationData:
    from torchvision.datasets import Cityscapes

    used = {entry.id: entry for entry in Cityscapes.classes if not entry.ignore_in_eval and entry.id >= 0}
    table = {value: used[value].train_id if value in used else IGNORED for value in range(256)}
    classes = tuple(entry.name for entry in used.values())
    make = partial(Cityscapes, place, split, mode="fine", target_type="semantic")
    return of_torchvision(make, classes, table, spec, split)


@data_kind(
    "voc",
    {"year": "2012"},
    ("train", "val", "trainval"),
    "Get VOCtrainval_11-May-2012.tar at http://host.robots.ox.ac.uk/pascal/VOC/voc2012.",
    "VOCdevkit/VOC2012/JPEGImages/*.jpg\nVOCdevkit/VOC2012/SegmentationClass/*.png\n"
    "VOCdevkit/VOC2012/ImageSets/Segmentation/SPLIT.txt",
)
def _voc(place: str, split: str, options: Mapping[str, str], spec: str) -> SegmentationData:
    from torchvision.datasets import VOCSegmentation

    years = [str(year) for year in range(2007, 2013)]
    if options["year"] not in years:
        raise UnknownName("year of data 'voc'", options["year"], years)
    make = partial(VOCSegmentation, place, options["year"], split, download=False)
    return of_torchvision(make, VOC_CLASSES, dict(identity_table(len(VOC_CLASSES))), spec, split)


# -- generated -----------------------------------------------------------------------------------------


def _read_scene(height: int, width: int, first: int, position: int) -> tuple[UnreadPicture, Tensor]:
    colour, labels = labelled_scene(height, width, first + position)
    return lambda source, channels, bands: spread_bands(colour, channels), labels


@data_kind(
    "scene",
    {"height": "96", "width": "128"},
    ("train", "val", "test"),
    "Street scenes are generated: write scene:COUNT.",
    "nothing",
)
def _scene(place: str, split: str, options: Mapping[str, str], spec: str) -> SegmentationData:
    count = _number("scene", place)
    size = (_number("height", options["height"]), _number("width", options["width"]))
    if min(size) < 16:
        raise InvalidInput(
            f"a scene of {size[0]}x{size[1]} pixels is too small.", next="give at least 16x16."
        )
    first = 1_000_000 * KINDS["scene"].splits.index(split)  # no scene is in two splits
    names = tuple(f"scene {first + position}" for position in range(count))
    table = identity_table(len(SCENE_CLASSES))
    return SegmentationData(spec, split, SCENE_CLASSES, names, partial(_read_scene, *size, first), table)


def split_place(text: str) -> tuple[str, str]:
    """Split a path from its options at a comma; the longest part that exists is the path, which may hold commas."""
    parts = text.split(",")
    for count in range(len(parts), 1, -1):
        place = ",".join(parts[:count])
        if files.exists(place.strip()):
            return place, ",".join(parts[count:])
    return parts[0], ",".join(parts[1:])


def open_data(spec: str, split: str = "train", *, bands: Sequence[int] = ()) -> SegmentationData:
    """Open data by a spec `KIND:PATH,option=value,...`: images with labels, or without.

    Kinds: `folder:PATH,classes=11,ignore=11` (slashes separate several ignored values, or class names in place of their
    number; `classes=2,values=0/255` names the values that the classes are stored as), `cityscapes:PATH` (fine
    annotations, the 19 classes of the benchmark), `voc:PATH,year=2012`, `scene:COUNT,height=96,width=128` (generated);
    `module:function:PATH` is a kind of your own (`data_kind`); `images:FOLDER` has no labels, `images:FILE,page=N` is a
    page of a TIFF file. `clip:FILE,every=25` has every 25th frame of a clip (default: one a second), from `start=0` on,
    and `clip:FILE,labels=FOLDER,classes=11` those frames that have labels.
    Nothing is downloaded.

    Args:
        spec: as above.
        split: `"train"`, `"val"`, `"test"` or another split of the kind; `"all"` for a folder without splits.
        bands: which bands of the pictures are read, counted from 1, in their order; default: those of the network, or
            all.

    Raises:
        UnknownName: no such kind, option or split.
        InvalidInput: an option's value cannot be read, or a required option is missing.
        FileError: the data is missing, incomplete or empty; the message says where to get it and its layout.
    """
    name, rest = _find_kind(spec)
    refuse_stream(rest if name in KINDS else spec)
    if name not in KINDS and files.exists(spec):
        check_kind(spec, FOLDER, what="a folder of data")
        raise InvalidInput(
            f"{spec} is a folder, and what it holds is not said.",
            next=f"without labels: images:{spec}; with folders images and labels: folder:{spec},classes=11.",
        )
    if name not in KINDS:
        raise UnknownName("kind of data", name, KINDS, next="write e.g. folder:PATH,classes=11,ignore=11.")
    kind = KINDS[name]
    place, text = split_place(rest)
    if not place.strip():
        raise InvalidInput(f"data {spec!r} names no place.", next=f"write {name}:PATH. {kind.where}")
    if name != "scene":
        expected = {"images": (FOLDER, PICTURE), "clip": (CLIP,)}.get(name, (FOLDER,))
        check_kind(
            place.strip(), *expected, what=f"the {'clip' if name == 'clip' else 'folder'} of {name}:PATH"
        )
    options = {**kind.options, **split_options(text, kind.options, f"data {name!r}")}
    values = {option: value for option, value in options.items() if value is not None}
    if absent := options.keys() - values.keys():
        option = min(absent)
        raise InvalidInput(f"data {name!r} needs {option}=...", next=f"write e.g. {spec},{option}=11.")
    if kind.splits and split not in kind.splits:
        raise UnknownName(f"split of data {name!r}", split, kind.splits)
    return replace(kind.open(place.strip(), split, values, spec), bands=check_bands(bands))


def open_pictures(place: str | Path, split: str = "all", *, bands: Sequence[int] = ()) -> SegmentationData:
    """Open pictures by the path of a folder, a picture or a clip (with options, `drive.mp4,every=25`), or by a spec.

    Args:
        place: see above, and `open_data`.
        split: of data by spec; `all` means `val` where the data has named splits.
        bands: see `open_data`.

    Raises:
        CadError: as `open_data`.
    """
    text = str(place)
    kind = None if files.exists(text) else KINDS.get(_find_kind(text)[0])
    if kind is None:
        refuse_stream(text)
        named = f"{'clip' if is_clip(Path(split_place(text)[0])) else 'images'}:{text}"
        return open_data(named, split, bands=bands)
    has_splits = bool(kind.splits) or (kind is KINDS["folder"] and _is_split(text.partition(":")[2]))
    return open_data(text, "val" if split == "all" and has_splits else split, bands=bands)


def _is_split(text: str) -> bool:
    """True if a folder, with options, has no pictures of its own, and some for validation."""
    root = Path(split_place(text)[0].strip())
    return (root / "val" / "images").is_dir() and not any(
        (root / name).exists() for name in ("images", "all")
    )
