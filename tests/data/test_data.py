"""Labelled data: what each kind yields, what is refused and how, augmentation by its seed, and data of one's own."""

from __future__ import annotations

import re
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

import numpy as np
import pytest
import torch
from conftest import some
from networks import Segmenter, made_once, seeded
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import cadsurgery as cs
from cadsurgery.data import IGNORED, Augment, SegmentationData, as_data, open_pictures, sample_of
from cadsurgery.data.images import SCENE_CLASSES, normalise
from cadsurgery.data.networks import IMAGENET_MEAN, Source
from cadsurgery.data.samples import pictures_of
from cadsurgery.data.sources import KINDS
from cadsurgery.finetune import Settings, fit
from cadsurgery.finetune.objectives import cross_entropy
from cadsurgery.masks.context import labels_of
from cadsurgery.support.errors import LeftOut
from cadsurgery.tasks.measuring import MIOU
from cadsurgery.tasks.recommend import recommend
from cadsurgery.tasks.segmentation.metrics import SegmentationMetrics

SIZE = (13, 22)


def write(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)


def some_labels(high: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, size, dtype=np.uint8)


def some_image(size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two splits of two images with labels 0..3, where 3 is meant to be ignored."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            write(tmp_path / split / "images" / f"{name}.png", some_image())
            write(tmp_path / split / "labels" / f"{name}.png", some_labels(4))
    return tmp_path


def spec(folder: Path, options: str = "classes=3,ignore=3") -> str:
    return f"folder:{folder},{options}"


def assert_is_item(data: SegmentationData, position: int = 0) -> tuple[Tensor, Tensor]:
    """Types, ranges and sizes that training relies on."""
    image, labels = data[position]
    assert image.dtype == torch.float32 and image.shape[0] == 3 and labels.dtype == torch.int64
    assert image.shape[1:] == labels.shape and image.min() >= 0 and image.max() <= 1
    assert set(labels.unique().tolist()) <= {*range(len(data.classes)), IGNORED}
    return image, labels


# -- a plain folder ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
def test_a_folder_gives_images_in_order_and_labels_with_ignored_ones_as_255(folder: Path) -> None:
    data = cs.open_data(spec(folder), "test")
    assert len(data) == 2 and [Path(name).name for name in data.names] == ["a.png", "b.png"]
    assert data.classes == ("class 0", "class 1", "class 2") and data.split == "test"
    image, labels = assert_is_item(data)
    stored = torch.from_numpy(some_labels(4).astype(np.int64))
    assert torch.equal(labels, torch.where(stored == 3, IGNORED, stored)) and (labels == IGNORED).any()
    assert torch.equal(image, torch.from_numpy(some_image()).permute(2, 0, 1).float() / 255)


def test_a_path_may_hold_commas(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "sites, 2026" / "a,classes=9"
    place.parent.mkdir()
    (folder / "train").rename(place)
    for text, split in ((spec(place), "all"), (f"images:{place}/images", "all")):
        assert len(cs.open_data(text, split)) == 2
    assert cs.open_data(spec(place), "all").classes == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_labels_have_the_name_of_their_image_in_either_form_of_unicode(
    tmp_path: Path, forms: tuple[Literal["NFC", "NFD"], Literal["NFC", "NFD"]]
) -> None:
    image, labels = (normalize(form, "Z\u00fcrich \u00c5") for form in forms)
    write(tmp_path / "images" / f"{image}.png", some_image())
    write(tmp_path / "labels" / f"{labels}.png", some_labels(3))
    data = cs.open_data(spec(tmp_path), "all")
    assert torch.equal(data[0][1], torch.from_numpy(some_labels(3).astype(np.int64)))


def test_pictures_of_split_all_are_those_for_validation_where_there_are_splits(folder: Path) -> None:
    assert len(cs.open_data(spec(folder / "train"), "all")) == len(open_pictures(spec(folder / "train"))) == 2
    shutil.copytree(folder / "train", folder / "val")
    found = open_pictures(spec(folder))
    assert found.split == "val" and len(found) == len(cs.open_data(spec(folder), "val"))


@pytest.mark.parametrize("wide", [False, True])
def test_labels_may_be_palette_or_wide_pictures(folder: Path, wide: bool) -> None:
    before = cs.open_data(spec(folder))[0][1]
    stored = Image.fromarray(some_labels(4).astype(np.uint16) if wide else some_labels(4))
    if not wide:
        stored.putpalette(list(range(256)) * 3)
    stored.save(folder / "train" / "labels" / "a.png")
    assert torch.equal(cs.open_data(spec(folder))[0][1], before)


# -- torchvision ---------------------------------------------------------------------------------------


def test_cityscapes_has_the_19_classes_of_the_benchmark(tmp_path: Path) -> None:
    ids = np.arange(34, dtype=np.uint8).reshape(2, 17).repeat(4, 0)
    for city in ("b", "a"):
        write(tmp_path / f"leftImg8bit/val/{city}/{city}_1_leftImg8bit.png", some_image((8, 17)))
        write(tmp_path / f"gtFine/val/{city}/{city}_1_gtFine_labelIds.png", ids)
    data = cs.open_data(f"cityscapes:{tmp_path}", "val")
    assert len(data.classes) == 19 and data.classes[0] == "road" and data.classes[-1] == "bicycle"
    assert [Path(name).parent.name for name in data.names] == ["a", "b"]
    labels = assert_is_item(data)[1]
    assert labels[0, 7] == 0 and labels[4, 33 - 17] == 18 and labels[0, 0] == IGNORED
    assert set(labels.unique().tolist()) == {*range(19), IGNORED}


def test_voc_keeps_its_void_ignored(tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2012"
    labels = some_labels(21)
    labels[0] = 255
    write(root / "JPEGImages" / "x.jpg", some_image())
    write(root / "SegmentationClass" / "x.png", labels)
    listed = root / "ImageSets" / "Segmentation" / "train.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("x\n")
    data = cs.open_data(f"voc:{tmp_path}", "train")
    assert len(data.classes) == 21
    assert torch.equal(assert_is_item(data)[1], torch.from_numpy(labels.astype(np.int64)))


MORE = "recipes.voc_deeplab.more_data"


@pytest.fixture
def scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that reads the labels of any Matlab file."""
    answer = {"GTcls": [{"Segmentation": [some_labels(21)]}]}
    reader = types.ModuleType("scipy.io")
    vars(reader).update(loadmat=lambda path: answer)
    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", reader)


@pytest.mark.usefixtures("scipy")
def test_sbd_reads_its_matlab_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "img" / "x.jpg", some_image())
    (tmp_path / "cls").mkdir()
    (tmp_path / "train.txt").write_text("x\n")
    data = cs.open_data(f"{MORE}:sbd:{tmp_path}", "train")
    assert torch.equal(assert_is_item(data)[1], torch.from_numpy(some_labels(21).astype(np.int64)))
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(cs.CadError, match="pip install scipy"):
        cs.open_data(f"{MORE}:sbd:{tmp_path}")


def test_pets_have_three_classes(tmp_path: Path) -> None:
    root = tmp_path / "oxford-iiit-pet"
    write(root / "images" / "cat_1.jpg", some_image())
    write(root / "annotations" / "trimaps" / "cat_1.png", some_labels(3) + 1)
    for split in ("trainval", "test"):
        (root / "annotations" / f"{split}.txt").write_text("cat_1 1 1 1\n")
    for split in ("train", "trainval", "test"):
        data = cs.open_data(f"{MORE}:pets:{tmp_path}", split)
        labels = assert_is_item(data)[1]
        assert data.classes == ("pet", "background", "border")
        assert torch.equal(labels, torch.from_numpy(some_labels(3).astype(np.int64)))


@pytest.mark.usefixtures("scipy")
@pytest.mark.parametrize("kind", ["cityscapes", "voc", "sbd", "pets", "folder"])
def test_missing_data_says_where_to_get_it_and_what_is_expected(kind: str, tmp_path: Path) -> None:
    module = f"{MORE}:" if kind in ("sbd", "pets") else ""
    given = f"{module}{kind}:{tmp_path}/no" + (",classes=3" if kind == "folder" else "")
    with pytest.raises(cs.FileError) as refusal:
        cs.open_data(given, "train")
    assert str(tmp_path) in str(refusal.value)
    for line in (KINDS[kind].where, *KINDS[kind].layout.splitlines()):
        assert line in refusal.value.next


# -- generated scenes ----------------------------------------------------------------------------------


def test_scenes_are_the_same_every_time_and_differ_between_splits() -> None:
    data = cs.open_data("scene:3,height=40,width=64", "train")
    image, labels = assert_is_item(data, 2)
    assert len(data) == 3 and data.classes == SCENE_CLASSES and labels.shape == (40, 64)
    assert torch.equal(image, cs.open_data("scene:3,height=40,width=64", "train")[2][0])
    others = [cs.open_data("scene:3,height=40,width=64", split)[2][0] for split in ("val", "test")]
    assert not any(torch.equal(image, other) for other in (*others, data[1][0]))


# -- refusals ------------------------------------------------------------------------------------------


NAMED = "one stored value for each of 2 classes"


@pytest.mark.parametrize(
    ("given", "split", "error", "said"),
    [
        ("foldr:x", "train", cs.UnknownName, "folder"),
        ("folder:x", "train", cs.InvalidInput, "classes="),
        ("folder:x,clases=3", "train", cs.UnknownName, "classes"),
        ("folder:HERE,classes=256", "train", cs.InvalidInput, "classes="),
        ("folder:HERE,classes=3,ignore=void", "train", cs.InvalidInput, "ignore="),
        ("folder:HERE,classes=2,values=0", "train", cs.InvalidInput, NAMED),
        ("folder:HERE,classes=2,values=0/3,ignore=3", "train", cs.InvalidInput, NAMED),
        ("folder:HERE,classes=3", "train", cs.InvalidInput, "(?s)a.png.*label 3.*3 classes.*ignore=3"),
        ("folder:HERE/train,classes=3,ignore=3", "test", cs.FileError, 'choose split "all"'),
        ("voc:x,year=1999", "train", cs.UnknownName, "2012"),
        ("nowhere:pets:x", "val", cs.UnknownName, "nowhere"),
        (f"{MORE}:dogs:x", "val", cs.UnknownName, "pets"),
        (f"{MORE}:VOC_CLASSES:x", "val", cs.UnknownName, "kind of data"),
        ("scene:2,height=2", "train", cs.InvalidInput, "too small"),
        ("scene:0", "train", cs.FileError, "no images"),
    ],
)
def test_wrong_specs_are_refused(
    folder: Path, given: str, split: str, error: type[cs.CadError], said: str
) -> None:
    with pytest.raises(error, match=said):
        cs.open_data(given.replace("HERE", str(folder)), split)[0]


def test_images_without_labels_are_named_and_counted(folder: Path) -> None:
    (folder / "train" / "labels" / "b.png").unlink()
    with pytest.raises(cs.FileError, match=r"1 of 2 images have no labels, first .*b\.png"):
        cs.open_data(spec(folder))


def test_labels_are_turned_as_their_pictures_and_turned_ones_are_said_to_be(folder: Path) -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    for kind, pixels in (("images", some_image()), ("labels", some_labels(4))):
        Image.fromarray(pixels).save(folder / "train" / kind / "a.png", exif=orientation)
    _, labels = assert_is_item(cs.open_data(spec(folder)))
    stored = torch.from_numpy(some_labels(4).astype(np.int64)).rot90(-1)
    assert torch.equal(labels, torch.where(stored == 3, IGNORED, stored))
    write(folder / "train" / "labels" / "a.png", some_labels(4))
    with pytest.raises(cs.InvalidInput, match="22x13 pixels and its labels have 13x22") as refusal:
        cs.open_data(spec(folder))[0]
    assert "turned by 90 degrees" in refusal.value.why and "resize" not in refusal.value.next


def binary(folder: Path, *values: int) -> None:
    """Labels of the split `train` hold these values alone."""
    for name in ("a", "b"):
        labels = np.array(values, dtype=np.uint8)[some_labels(len(values))]
        write(folder / "train" / "labels" / f"{name}.png", labels)


def test_labels_of_0_and_255_alone_are_said_when_opened_and_read_as_two_classes(folder: Path) -> None:
    binary(folder, 0, 255)
    with pytest.warns(cs.CadWarning, match="only 0 and 255") as warned:
        ignored = cs.open_data(spec(folder, "classes=2"))
    assert f"folder:{folder},classes=2,values=0/255" in str(warned[0].message)
    assert set(ignored[0][1].unique().tolist()) == {0, IGNORED}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = cs.open_data(spec(folder, "classes=2,values=0/255"))
        cs.open_data(spec(folder, "classes=1,ignore=255"))
    assert torch.equal(data[0][1], torch.from_numpy(some_labels(2).astype(np.int64)))


def test_classes_are_stored_as_the_values_that_are_named(folder: Path) -> None:
    binary(folder, 7, 70, 9)
    labels = cs.open_data(spec(folder, "classes=sky/road,values=70/7,ignore=9"))[0][1]
    assert torch.equal(labels, torch.tensor([1, 0, IGNORED])[torch.from_numpy(some_labels(3)).long()])
    with pytest.raises(cs.InvalidInput, match="label 9") as refusal:
        cs.open_data(spec(folder, "classes=2,values=70/7"))[0]
    assert "labels 70, 7" in refusal.value.why


def test_what_a_labelled_folder_holds_besides_is_named(folder: Path) -> None:
    for name in ("images/._a.png", "images/notes.txt", "labels/._a.png", "labels/Thumbs.db"):
        (folder / "train" / name).touch()
    write(folder / "train" / "labels" / "c.png", some_labels(3))
    with pytest.warns(LeftOut) as warned:
        assert len(cs.open_data(spec(folder))) == 2
    assert [str(one.message) for one in warned] == [
        f"left out of {folder / 'train'}: no pictures: images/notes.txt; labels without an image: labels/c.png."
    ]


# -- augmentation --------------------------------------------------------------------------------------


def pair(height: int = 30, width: int = 41) -> tuple[Tensor, Tensor]:
    return torch.rand(3, height, width), torch.randint(5, (height, width))


@pytest.mark.parametrize("scale", [None, (0.5, 2.0)])
@pytest.mark.parametrize("crop", [16, (50, 20), None])
def test_augmentation_depends_on_its_seed_alone(
    crop: int | tuple[int, int] | None, scale: tuple[float, float] | None
) -> None:
    image, labels = pair()
    kept = image.clone()
    augment = Augment(crop, scale=scale)
    state = torch.get_rng_state()
    first = augment(image, labels, 7)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(image, kept)
    torch.rand(3)
    again, other = augment(image, labels, 7), augment(image, labels, 8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert other[0].shape != first[0].shape or not torch.equal(other[0], first[0])
    assert type(first[0]) is type(first[1]) is Tensor and first[1].dtype == torch.int64
    if augment.size is not None:
        assert first[0].shape[1:] == first[1].shape == augment.size
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = [augment(image, labels, generator)[0] for generator in generators]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("seed", range(5))
def test_image_and_labels_are_moved_together(seed: int) -> None:
    """An image that shows its labels does so afterwards, padding apart."""
    _, labels = pair()
    image = (labels / 10).expand(3, -1, -1)
    moved, on = Augment((40, 24), jitter=0)(image, labels, seed)
    inside = on != IGNORED
    assert torch.allclose(moved[:, inside], (on[inside] / 10).expand(3, -1))
    padding = moved[:, ~inside]
    assert padding.numel() and torch.allclose(padding, torch.tensor(IMAGENET_MEAN)[:, None])


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_bands_are_padded_by_their_mean_and_jitter_keeps_their_order(channels: int) -> None:
    image, labels = torch.rand(channels, 30, 41), torch.randint(5, (30, 41))
    padded, on = Augment((40, 60), flip=0, jitter=0)(image, labels, 0)
    padding = padded[:, on == IGNORED]
    assert torch.allclose(padding, image.mean((1, 2))[:, None])
    jittered, _ = Augment(None, flip=0)(image, labels, 1)
    rising = jittered.flatten()[image.flatten().argsort()].diff()
    assert rising.min() > -1e-6 and rising.max() > 0


def test_scaling_makes_up_no_labels() -> None:
    image, labels = pair()
    sizes = set()
    for seed in range(4):
        scaled, on = Augment(None, scale=(0.5, 2.0))(image, 2 * labels, seed)
        assert scaled.shape[1:] == on.shape and set(on.unique().tolist()) <= {0, 2, 4, 6, 8}
        assert scaled.min() >= 0 and scaled.max() <= 1
        sizes.add(tuple(on.shape))
    assert len(sizes) > 1


@pytest.mark.parametrize(
    "options",
    [
        *({"crop": 0}, {"crop": (4, -1)}, {"flip": 1.5}, {"jitter": -0.1}),
        *({"scale": (2.0, 0.5)}, {"scale": (0.0, 1.0)}),
    ],
)
def test_impossible_augmentation_is_refused(options: dict) -> None:
    with pytest.raises(cs.InvalidInput, match=r"e\.g\."):
        Augment(**options)
    with pytest.raises(cs.InvalidInput, match="3 values, and the picture has 6 channels"):
        Augment(40, fill=(0.1, 0.2, 0.3))(torch.rand(6, 8, 8), torch.zeros(8, 8, dtype=torch.int64), 0)


NOT_SCALED: dict[str, Any] = {
    "bytes": torch.full((3, 5, 7), 200, dtype=torch.uint8),
    "a batch of bytes": torch.full((2, 3, 5, 7), 200, dtype=torch.uint8),
    "16 bits": torch.full((3, 5, 7), 200, dtype=torch.int16),
    "a truth value": torch.ones(1, 5, 7, dtype=torch.bool),
    "a frame": np.full((5, 7, 3), 200, dtype=np.uint8),
    "a frame of 16 bits": np.full((5, 7, 3), 200, dtype=">u2"),
    "frames": np.full((2, 5, 7, 3), 200, dtype=np.uint8),
    "a grey frame": np.full((5, 7), 200, dtype=np.uint8),
    "a frame of numbers": np.full((5, 7, 3), 0.5),
    "a picture": Image.new("RGB", (7, 5)),
    "a plane": torch.rand(5, 7),
}


@pytest.mark.parametrize("source", [None, Source("x")], ids=["no source", "a source"])
@pytest.mark.parametrize("image", NOT_SCALED.values(), ids=NOT_SCALED)
def test_what_is_no_image_in_0_to_1_is_not_normalised(image: Any, source: Source | None) -> None:
    """Mean and deviation of a picture in 0..1 would give values up to a thousand in silence."""
    with pytest.raises(cs.InvalidInput, match=r"0\.\.1, channels first") as caught:
        normalise(image, source)
    if getattr(image, "dtype", None) in (torch.uint8, np.uint8):
        assert "/ 255" in caught.value.next


# -- data of one's own: one protocol, and errors that name the sample ----------------------------------


SCENES = cs.open_data("scene:10,height=48,width=64")
QUICK = Settings(steps=1, batch=2, workers=0, crop=0)
Change = Callable[[Tensor, Tensor], Any]


class Mine:
    """Anything with a length and items; those from the position `at` on are changed."""

    def __init__(self, change: Change = lambda *pair: pair, at: int = 0, count: int = 4) -> None:
        self.change, self.at, self.count = change, at, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        image, labels = SCENES[index]
        return self.change(image, labels) if index >= self.at else (image, labels)


@pytest.mark.parametrize(("most", "taken"), [(1, 1), (4, 4), (6, 6), (10, 10), (99, 10)])
def test_pictures_are_spread_over_all_of_them_and_as_many_as_asked_for(most: int, taken: int) -> None:
    shown = [*pictures_of(SCENES, most)(None)]
    places = [next(at for at, (image, _) in enumerate(SCENES) if torch.equal(image, one)) for one in shown]
    steps = {after - before for before, after in pairwise(places)}
    assert len(places) == taken and places[0] == 0 and (not steps or max(steps) - min(steps) <= 1)


@made_once
def adapted() -> cs.AdaptiveModel:
    return cs.adaptify(seeded(Segmenter, torch.float32), "edges", verify_laws=False)


def of_fit(data: Any, folder: Path) -> Any:
    return fit(adapted(), data, QUICK, output=folder, device="cpu")


def of_evaluate(data: Any, folder: Path) -> Any:
    return cs.evaluate(adapted(), data, rounds=0)


def of_recommend(data: Any, folder: Path) -> Any:
    return recommend(
        seeded(Segmenter, torch.float32), data, limit=3, options={"output_stride": (4, 16)}, output=folder
    )


def normalised(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return cs.images.normalise(image, None), labels


def in_bytes(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return 255 * image, labels


TASKS = pytest.mark.parametrize("task", [of_fit, of_evaluate, of_recommend])


@TASKS
@pytest.mark.parametrize(
    ("change", "words"), [(normalised, "looks normalised already"), (in_bytes, r"looks like 0\.\.255")]
)
def test_images_outside_0_to_1_are_refused_with_what_they_look_like(
    task: Any, change: Change, words: str, tmp_path: Path
) -> None:
    with pytest.raises(cs.InvalidInput, match=words) as refusal:
        task(Mine(change, count=10), tmp_path)
    assert "sample " in refusal.value.where
    assert "any_range = True" in refusal.value.next


def test_images_that_are_meant_to_be_outside_0_to_1_are_read_as_they_are() -> None:
    data = Mine(normalised)
    data.any_range = True  # type: ignore[attr-defined]
    expected, _ = normalised(*SCENES[1])
    assert torch.equal(sample_of(data, 1)[0], expected)
    assert torch.equal(as_data(data)[1][0], expected)


def test_data_of_ones_own_are_evaluated_as_the_same_data_opened_by_name() -> None:
    ours, theirs = (cs.evaluate(adapted(), data, rounds=0) for data in (Mine(), SCENES.first(4)))
    assert [row.miou for row in ours.rows] == [row.miou for row in theirs.rows]
    assert ours.rows[0].miou is not None


@pytest.mark.slow
@pytest.mark.usefixtures("not_compiled")
def test_settings_are_recommended_on_data_of_ones_own(tmp_path: Path) -> None:
    assert of_recommend(Mine(), tmp_path).measure == MIOU


@TASKS
def test_a_loader_is_refused_with_what_to_give(task: Any, tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match=r"loader\.dataset"):
        task(DataLoader(Mine()), tmp_path)  # type: ignore[arg-type]


def by_to_tensor(labels: Tensor) -> Tensor:
    return labels.float() / 255


LABELS_GO_TO: dict[str, Callable[[Tensor], Any]] = {
    "a sample": lambda labels: sample_of([(SCENES[0][0], labels)], 0)[1],
    "data": lambda labels: replace(SCENES, read=lambda place: (SCENES[0][0], labels.numpy()))[0][1],
    "metrics": lambda labels: metrics_of(SCENES[0][1][None], labels[None]),
    "predictions": lambda labels: metrics_of(labels[None], SCENES[0][1][None]),
    "the labels of a mask": lambda labels: provided(labels[None]),
    "boundaries": lambda labels: cs.resampling.boundaries(labels),
    "the loss": lambda labels: cross_entropy(LOGITS, labels[None]),
}
LOGITS = torch.randn(1, 6, 24, 32, generator=torch.Generator().manual_seed(0))


def metrics_of(prediction: Tensor, labels: Tensor) -> Tensor:
    metrics = SegmentationMetrics(6)
    metrics.update(prediction, labels)
    return metrics.counts()["all"]


def provided(labels: Tensor) -> Tensor:
    with cs.masks.labelled(labels):
        return labels_of(labels[:, None], "mask")


@pytest.mark.parametrize("place", LABELS_GO_TO)
def test_labels_that_are_no_whole_numbers_are_refused_and_whole_ones_are_classes(place: str) -> None:
    """Truncated to class 0, everything would agree with everything."""
    labels, take = SCENES[0][1], LABELS_GO_TO[place]
    with pytest.raises(cs.InvalidInput, match=r"no class[\s\S]*ToTensor[\s\S]*PILToTensor"):
        take(by_to_tensor(labels))
    for strange in (torch.nan, torch.inf):
        with pytest.raises(cs.InvalidInput, match=f"{strange}, which is no class"):
            take(torch.full(labels.shape, strange))
    expected = take(labels)
    for dtype in (torch.float32, torch.float64, torch.uint8, torch.int16):
        assert torch.equal(take(labels.to(dtype)), expected)


def unreadable(image: Tensor, labels: Tensor) -> Any:
    raise OSError("image file is truncated")


def with_nan(image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    image = image.clone()
    image[1, 5, 7] = torch.nan
    return image, labels


BAD: dict[str, tuple[Change, str]] = {
    "three parts": (lambda image, labels: (image, labels, "a.png"), "a sample is a tuple of 3"),
    "none": (lambda image, labels: None, "a sample is NoneType None"),
    "labels are none": (lambda image, labels: (image, None), "labels NoneType None"),
    "transparency": (
        lambda image, labels: (torch.cat((image, image[:1])), labels),
        "an image has 4 bands, and the network reads 3 channels",
    ),
    "size of labels": (lambda image, labels: (image, labels[:-1]), "48x64 pixels and its labels have 47x64"),
    "labels by ToTensor": (
        lambda image, labels: (image, labels / 255),
        "labels hold 0.00392157, which is no class",
    ),
    "bytes": (lambda image, labels: ((255 * image).byte(), labels), "a sample is a uint8 tensor"),
    "unreadable": (unreadable, "cannot be read"),
    "nan": (with_nan, "an image holds nan in channel 1, row 5, column 7"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sample_that_cannot_be_trained_on_is_named(case: str, tmp_path: Path) -> None:
    change, words = BAD[case]
    data = Mine(change, at=2, count=3)
    data.names = ["a.png", "b.png", "c.png"]  # type: ignore[attr-defined]
    with pytest.raises(cs.CadError, match=words) as refusal:
        fit(adapted(), data, Settings(steps=2, batch=3, workers=0, crop=0), output=tmp_path, device="cpu")
    assert re.search(r"sample 2 of the data \(c\.png\)", str(refusal.value))


@pytest.mark.parametrize("case", some(BAD, every=4))
def test_a_sample_that_cannot_be_evaluated_is_reported_and_the_others_count(case: str) -> None:
    report = cs.evaluate(adapted(), Mine(BAD[case][0], at=3), rounds=0)
    assert report.images == 3
    assert [row["image"] for row in report.failed] == ["sample 3"]
