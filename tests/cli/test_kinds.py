"""Files of every kind, given to every command: each says what the file is, and which command and option take it."""

from __future__ import annotations

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from commands import own_commands
from conftest import Run
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import cadsurgery as cs
from cadsurgery.support.kinds import kind_of_file
from cadsurgery.tasks import explore_page

CLIP = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"  # the start of an MP4 file
ONNX = b"\x08\x08\x12\x07pytorch\x1a\x052.0.0"  # version of the format, and the producer
# Names of files, and of their kinds in words; some endings say something else, and some say nothing.
KINDS = {
    "photo.jpg": "a picture",
    "picture.pth": "a picture",
    "photos": "a folder",
    "clip.mp4": "a clip",
    "weights.pth": "a file of weights",
    "old.pt": "a file of weights",
    "weights.safetensors": "a file of weights",
    "weights": "a file of weights",
    "net.safetensors": "a converted network",
    "converted.pt": "a converted network",
    "net.pt2": "a program exported by torch",
    "script.pt": "a TorchScript program",
    "net.onnx": "an ONNX file",
    "onnx": "an ONNX file",
    "net.xml": "an OpenVINO file",
    "net.bin": "an OpenVINO file",
    "settings.json": "a JSON file",
    "usernets.py": "a Python file",
}
FEW = {words: name for name, words in reversed(KINDS.items())}  # a file of each kind
N = "networks:strided"
FILE_OF_ONNX = "an ONNX file"
IMAGES = ("a picture", "a folder")
QUICK = ("--size", "32x32", "--rounds", "0")
# A command and an option, and the kinds that it takes; FILE stands for the file.
PLACES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("convert", "FILE"): (FILE_OF_ONNX,),
    ("convert", N, "--weights", "FILE"): ("a file of weights", "a converted network"),
    ("convert", N, "--image", "FILE", *QUICK): ("a picture",),
    ("plan", "FILE"): ("a converted network", FILE_OF_ONNX),
    ("mask", "FILE"): ("a picture", "a clip"),
    ("mask", "-m", "FILE"): ("a converted network", FILE_OF_ONNX),
    ("mask", "photo.jpg", "--labels", "FILE"): ("a picture",),
    ("mask", "-m", N, "--set", "weights=FILE"): ("a file of weights", "a converted network"),
    ("run", "FILE"): ("a converted network",),
    ("run", "FILE", "photo.jpg"): ("a converted network",),
    ("run", "net.safetensors", "FILE", "--trust"): ("a picture", "a folder", "a clip"),
    ("macs", "FILE"): ("a converted network", FILE_OF_ONNX),
    ("macs", "FILE", "--set", "dense=true"): ("a converted network", FILE_OF_ONNX),
    ("macs", N, "--image", "FILE"): ("a picture",),
    ("bench", "FILE"): ("a converted network", FILE_OF_ONNX),
    ("bench", N, "--size", "32x32", "--dtype", "int8", "--set", "calibration=FILE"): IMAGES,
    ("eval", "FILE", "--data", "scene:1"): ("a converted network", FILE_OF_ONNX),
    ("eval", N, "--data", "FILE"): ("a folder",),
    ("eval", N, "--data", "folder:FILE,classes=2"): ("a folder",),
    ("eval", N, "--data", "voc:FILE"): ("a folder",),
    ("eval", N, "--data", "images:FILE"): IMAGES,
    ("eval", N, "--data", "scene:1", "--weights", "FILE"): ("a file of weights", "a converted network"),
    ("export", "FILE"): ("a converted network", FILE_OF_ONNX),
    (
        "export",
        N,
        "--size",
        "32x32",
        "-o",
        "new.onnx",
        "--precision",
        "int8",
        "--calibration",
        "FILE",
    ): IMAGES,
    ("explore", "FILE"): ("a converted network", FILE_OF_ONNX),
    ("finetune", "FILE", "--data", "scene:1", "-o", "run"): ("a converted network", FILE_OF_ONNX),
    ("finetune", N, "--data", "FILE", "-o", "run"): ("a folder",),
    ("finetune", N, "--data", "scene:1", "-o", "run", "--config", "FILE"): ("a JSON file",),
    ("recommend", "FILE", "--images", "photos"): ("a converted network", FILE_OF_ONNX),
    ("recommend", N, "--images", "FILE"): IMAGES,
    ("recommend", N, "--images", "photos", "--labels", "FILE"): ("a folder",),
    ("keypoints extract", "FILE", "photos"): ("a converted network", FILE_OF_ONNX),
    ("keypoints extract", N, "FILE"): IMAGES,
}


@functools.cache
def _files() -> dict[str, bytes]:
    """Content of the files by name; `photos` is made apart."""
    with TemporaryDirectory() as folder:
        place = Path(folder)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU()).eval()
        Image.effect_noise((64, 48), 60).convert("RGB").save(place / "photo.jpg")
        torch.save(model.state_dict(), place / "weights.pth")
        torch.save(model.state_dict(), place / "old.pt", _use_new_zipfile_serialization=False)
        save_file(model.state_dict(), place / "weights.safetensors")
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 8, 8)), place / "script.pt")
        torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 8, 8),)), place / "net.pt2")
        (place / "clip.mp4").write_bytes(CLIP)
        (place / "net.onnx").write_bytes(ONNX)
        (place / "net.xml").write_text('<?xml version="1.0"?>\n<net name="net" version="11"></net>\n')
        (place / "net.bin").write_bytes(bytes(64))
        (place / "settings.json").write_text("{}")
        cs.save(cs.adaptify(cs.build_model(N), "edges", verify_laws=False), place / "net.safetensors")
        copies = {"picture.pth": "photo.jpg", "weights": "weights.pth", "onnx": "net.onnx"}
        for copy, name in {**copies, "converted.pt": "net.safetensors"}.items():
            (place / copy).write_bytes((place / name).read_bytes())
        return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.fixture
def run(tmp_path: Path, command_line: Run) -> Run:
    """Runs a command in a folder with a file of each kind."""
    (tmp_path / "usernets.py").write_text("")
    for name, content in _files().items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.jpg").write_bytes(_files()["photo.jpg"])
    return command_line


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("name", KINDS)
def test_the_kind_of_a_file_is_told_by_its_content_or_else_its_ending(tmp_path: Path, name: str) -> None:
    kind = kind_of_file(tmp_path / name)
    assert kind is not None and kind.words == KINDS[name]


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_a_command_says_what_a_file_of_another_kind_is_and_where_it_belongs(
    run: Run, place: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third of the kinds at each place, others at the next."""
    monkeypatch.setattr(
        explore_page, "_gradio", lambda: None
    )  # which serves the page once the network is open
    uses = {name: kind_of_file(name).use.format(path=name) for name in FEW.values()}  # type: ignore[union-attr]
    for number, (words, name) in enumerate(FEW.items(), [*PLACES].index(place)):
        if words not in PLACES[place] and number % 3 == 0:
            command, *arguments = (part.replace("FILE", name) for part in place)
            as_json = () if command == "explore" else ("--json",)
            result = run(*command.split(), *arguments, *as_json)
            if as_json:  # of the command, or of the only thing that it was given to work on
                told = " ".join(
                    (result.json if "error" in result.json else result.json["failed"][0]).values()
                )
            else:
                told = " ".join(result.err.split())
            if (
                words == "a TorchScript program" and "--weights" in place
            ):  # which holds weights: how to take them out
                assert "torch.save(model.state_dict()" in told
            else:
                assert f"{name} is {words}, not " in told and uses[name] in told
            assert result.code == 1


def test_the_places_are_all_commands_that_take_files() -> None:
    assert {"list", *(place[0] for place in PLACES)} == {
        name.removeprefix("cadsurgery ") for name in own_commands()
    }
