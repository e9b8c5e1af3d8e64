"""Commands on pictures of one channel and of six bands; the page on both runs as it stands."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from conftest import Run, some
from PIL import Image

import cadsurgery as cs
from cadsurgery.data import open_pictures
from cadsurgery.data.channels import as_channels
from cadsurgery.data.clips import write_clip
from cadsurgery.data.images import normalise, read_image
from cadsurgery.network.calibration import images_to_calibrate
from cadsurgery.tasks.open import pictures_like

NETWORKS = """
import torch
from torch import nn


def network(channels):
    torch.manual_seed(0)
    widths = (channels, 8, 8, 8)
    layers = [layer for pair in zip(widths, widths[1:]) for layer in (nn.Conv2d(*pair, 3, 2, 1), nn.ReLU())]
    return nn.Sequential(*layers, nn.Conv2d(8, 3, 1), nn.UpsamplingBilinear2d(scale_factor=8)).eval()


def grey():
    return network(1)


def colour():
    return network(3)


def bands():
    return network(6)
"""


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A grey slice of 16 bits, a colour picture, and a tile of six bands."""
    random = np.random.default_rng(0)
    (tmp_path / "usernets.py").write_text(NETWORKS)
    Image.fromarray(random.integers(0, 65536, (32, 48), np.uint16)).save(tmp_path / "slice.png")
    Image.fromarray(random.integers(0, 256, (32, 48, 3), np.uint8)).save(tmp_path / "photo.png")
    tile = random.uniform(0, 1.5, (6, 32, 48)).astype(np.float32)
    tifffile.imwrite(tmp_path / "tile.tif", tile, photometric="minisblack", planarconfig="separate")
    return tmp_path


CASES = {
    "grey": ("slice.png", 1, ()),
    "grey, colour picture": ("photo.png", 1, ()),
    "colour, grey picture": ("slice.png", 3, ()),
    "bands": ("tile.tif", 6, ()),
    "colour, three of six bands": ("tile.tif", 3, (3, 2, 1)),
    "grey, one of six bands": ("tile.tif", 1, (5,)),
}


@pytest.mark.parametrize("case", some(CASES))
def test_a_converted_file_reads_pictures_as_it_was_said(command_line: Run, pictures: Path, case: str) -> None:
    name, channels, bands = CASES[case]
    options = ("--bands", ",".join(map(str, bands))) if bands else ()
    code, _, err = command_line(
        *("convert", f"usernets:{case.partition(',')[0]}", "--image", name, *options, "--rounds", "0"),
        *("--normalisation", "bands", "--output", "net.safetensors"),
    )
    assert code == 0, err
    net = cs.load(pictures / "net.safetensors", trust=True)
    image = read_image(pictures / name, channels=channels, bands=bands)
    assert net.source.bands == bands and net.source.channels == channels
    prepared = normalise(image, net.source)
    torch.testing.assert_close(prepared.mean((1, 2)), torch.zeros(channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(prepared.std((1, 2), correction=0), torch.ones(channels), rtol=0, atol=1e-4)
    code, _, err = command_line("run", "net.safetensors", name, "--trust", "--workers", "1")
    assert code == 0, err
    (drawn,) = (pictures / "predictions").glob("*.png")
    with torch.inference_mode():
        expected = net.optimize()(prepared[None])[0].argmax(0)
    assert np.array_equal(np.array(Image.open(drawn)), expected.numpy())


def test_run_reads_other_bands_and_another_normalisation_where_it_is_said(
    command_line: Run, pictures: Path
) -> None:
    command = ("convert", "usernets:colour", "--rounds", "0", "--size", "32x48")
    assert command_line(*command, "--output", "net.safetensors")[0] == 0
    options = ("--bands", "2,4,6", "--set", "normalisation=none", "--workers", "1")
    code, _, err = command_line("run", "net.safetensors", "tile.tif", "--trust", *options)
    assert code == 0, err
    image = read_image(pictures / "tile.tif", bands=(2, 4, 6))
    net = cs.load(pictures / "net.safetensors", trust=True)
    net.normalisation = "none"
    with torch.inference_mode():
        expected = net.optimize()(image[None])[0].argmax(0)
    assert np.array_equal(np.array(Image.open(pictures / "predictions" / "tile.png")), expected.numpy())
    stated = json.loads((pictures / "predictions" / "manifest.jsonl").read_text().splitlines()[0])
    assert "2" in json.dumps(stated) and "none" in json.dumps(stated)


@pytest.mark.parametrize("words", ["0", "3,x", "-1", "1.5"])
def test_what_is_no_list_of_bands_is_refused_before_any_work(command_line: Run, words: str) -> None:
    code, _, err = command_line("convert", "no.module:here", "--bands", words)
    assert code == 2 and "counted from 1" in err


FRAMES = 6


@pytest.fixture
def clip(pictures: Path) -> str:
    """A clip in colour, in the folder of the networks."""
    pytest.importorskip("av", reason="PyAV is not installed")
    random = np.random.default_rng(0)
    with write_clip(pictures / "drive.mp4", Fraction(2)) as add:
        for level in range(40, 40 + 30 * FRAMES, 30):
            blocks = random.integers(0, level, (4, 6, 3), np.uint8)
            add(Image.fromarray(blocks).resize((48, 32), Image.Resampling.NEAREST))
    return "drive.mp4"


@pytest.fixture
def grey_file(command_line: Run, pictures: Path) -> str:
    """A converted network of one channel."""
    words = ("convert", "usernets:grey", "--image", "slice.png", "--rounds", "0")
    code, _, err = command_line(*words, "--normalisation", "bands", "--output", "grey.safetensors")
    assert code == 0, err
    return "grey.safetensors"


@pytest.mark.slow
def test_a_grey_network_gets_the_grey_of_every_frame_of_a_clip(
    command_line: Run, pictures: Path, grey_file: str, clip: str
) -> None:
    net = cs.load(pictures / grey_file, trust=True)
    frames = [as_channels(image, 1) for image, _ in cs.open_data(f"clip:{clip},every=1", "all")]
    batches = [normalise(frame, net.source)[None] for frame in frames]
    shares = []
    with torch.inference_mode():
        for batch in batches:
            net(batch)
            shares.append(net.active_fraction)
    done = command_line("run", grey_file, clip, "--trust", "--workers", "1", "--json")
    assert done.code == 0, done.err
    assert done.json["images"][0]["active_fraction"] == pytest.approx(sum(shares) / FRAMES, abs=1e-6)
    for words, image in ((("mask.png",), shares[0]), (("mask.mp4",), sum(shares[::3]) / 2)):
        done = command_line("mask", f"{clip},every=3", "-m", grey_file, "--trust", "--json", "-o", *words)
        assert done.code == 0, done.err
        assert done.json["active_fraction"] == pytest.approx(image, abs=1e-6)
    for given, expected in (
        (images_to_calibrate(net, f"{clip},every=1"), batches),
        (pictures_like(open_pictures(f"{clip},every=2"), (32, 48), net.source), batches[::2]),
    ):
        assert [batch.shape for batch in given] == [batch.shape for batch in expected]
        for batch, other in zip(given, expected, strict=True):
            torch.testing.assert_close(batch, other, rtol=0, atol=1e-5)
    done = command_line(
        "eval", grey_file, "--trust", "--data", f"clip:{clip},every=2", "--rounds", "0", "--json"
    )
    assert done.code == 0 and done.json["images"] == 3, done.err


@pytest.mark.slow
def test_a_network_of_six_bands_refuses_a_clip_with_both_numbers(
    command_line: Run, pictures: Path, clip: str
) -> None:
    made = ("convert", "usernets:bands", "--image", "tile.tif", "--normalisation", "bands", "--rounds", "0")
    assert command_line(*made, "--output", "net.safetensors").code == 0
    for words in (
        ("run", "net.safetensors", clip, "--trust", "--workers", "1"),
        ("mask", clip, "--model", "net.safetensors", "--trust"),
        ("mask", clip, "--model", "net.safetensors", "--trust", "--output", "mask.mp4"),
        ("eval", "net.safetensors", "--trust", "--data", f"clip:{clip}"),
        ("recommend", "usernets:bands", "--images", clip),
        ("bench", "usernets:bands", "--images", clip, "--size", "32x48"),
    ):
        done = command_line(*words)
        assert done.code == 1 and "3 bands" in done.err + done.out, words
        assert "6 channels" in done.err + done.out, words
    with pytest.raises(cs.InvalidInput, match=r"3 bands[\s\S]*6 channels"):
        images_to_calibrate(cs.load(pictures / "net.safetensors", trust=True), clip)
