"""Clips as data: every N-th frame or those that have labels, as `run` decodes them; and clips that cannot be read."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, covering
from networks import saved_segmenter
from PIL import Image

import cadsurgery as cs
from cadsurgery.data import IGNORED, open_pictures
from cadsurgery.data.clips import _decode, length_of, open_clip, write_clip
from cadsurgery.data.stores import refuse_stream
from cadsurgery.support.errors import CadError, LeftOut

pytest.importorskip("av", reason="PyAV is not installed")
SIZE, FRAMES, RATE = (48, 64), 12, 4


def written(path: Path, count: int = FRAMES) -> Path:
    """A clip whose frames get brighter."""
    with write_clip(path, Fraction(RATE)) as add:
        for number in range(count):
            add(Image.new("RGB", SIZE[::-1], (20 * number, 100, 255 - 20 * number)))
    return path


def labelled(folder: Path, *numbers: int) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        Image.fromarray(np.full(SIZE, number % 4, np.uint8)).save(folder / f"{number:06d}.png")
    return folder


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return written(tmp_path / "drive.mp4")


@pytest.mark.parametrize(
    ("ending", "options", "numbers"),
    [
        (".mp4", "", range(0, FRAMES, RATE)),  # one a second
        (".mkv", ",every=5,start=4", range(4, FRAMES, 5)),
    ],
)
def test_every_nth_frame_is_that_of_the_decoder_of_run(
    tmp_path: Path, ending: str, options: str, numbers: range
) -> None:
    clip = written(tmp_path / f"drive{ending}")
    with open_clip(clip) as opened:
        frames = list(opened.frames)
    data = cs.open_data(f"clip:{clip}{options}", "all")
    assert length_of(clip) == (FRAMES, RATE) and not data.is_labelled
    assert [Path(name).name for name in data.names] == [f"{number:06d}" for number in numbers]
    for position, number in enumerate(numbers):
        assert torch.equal(data[position][0], frames[number])


TURNS = {  # by the matrix that shows a pixel (x, y) at (a x + c y, b x + d y)
    (1, 0, 0, 1): lambda pixels: pixels,
    (-1, 0, 0, 1): lambda pixels: pixels[:, ::-1],
    (1, 0, 0, -1): lambda pixels: pixels[::-1],
    (-1, 0, 0, -1): lambda pixels: pixels[::-1, ::-1],
    (0, 1, 1, 0): lambda pixels: pixels.swapaxes(0, 1),
    (0, 1, -1, 0): lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    (0, -1, 1, 0): lambda pixels: pixels.swapaxes(0, 1)[::-1],
    (0, -1, -1, 0): lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
}


@pytest.mark.parametrize(
    ("matrix", "unit", "ending"), covering([*TURNS], [1 << 16, 1 << 15, 3 << 16], [".mp4", ".mov"])
)
def test_frames_are_turned_and_mirrored_as_players_show_them(
    tmp_path: Path, ending: str, unit: int, matrix: tuple[int, int, int, int]
) -> None:
    """The matrix of a track stands behind 40 bytes of its header (ISO/IEC 14496-12, 8.3.2)."""
    pixels = np.full((*SIZE, 3), 30, np.uint8)
    pixels[:24, :32], pixels[:24, 32:], pixels[24:, :32] = (220, 60, 60), (60, 220, 60), (60, 60, 220)
    clip = tmp_path / f"turned{ending}"
    with write_clip(clip, Fraction(RATE)) as add:
        add(Image.fromarray(pixels))
    content = bytearray(clip.read_bytes())
    a, b, c, d = (unit * value for value in matrix)
    at = content.index(b"tkhd") + 44
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    clip.write_bytes(content)
    expected = TURNS[matrix](pixels).astype(np.float32) / 255
    with open_clip(clip) as opened:
        (frame,) = opened.frames
    chosen = cs.open_data(f"clip:{clip},every=1", "all")[0][0]
    assert torch.equal(chosen, frame) and frame.shape[1:] == expected.shape[:2]
    assert abs(frame.permute(1, 2, 0).numpy() - expected).mean() < 0.02


def test_a_clip_that_is_turned_by_another_angle_is_rotated(tmp_path: Path) -> None:
    clip = written(tmp_path / "oblique.mp4", 1)
    content = bytearray(clip.read_bytes())
    at = content.index(b"tkhd") + 44
    turn = round((1 << 16) * 0.5**0.5)
    for flip in (1, -1):  # mirrored, too
        content[at : at + 36] = struct.pack(">9i", flip * turn, flip * turn, 0, -turn, turn, 0, 0, 0, 1 << 30)
        clip.write_bytes(content)
        with open_clip(clip) as opened:
            (frame,) = opened.frames
        assert min(frame.shape[1:]) > max(SIZE) and frame[:, 0, 0].sum() == 0  # a corner is empty


def test_times_rise_where_a_clip_states_none_or_falls_back(tmp_path: Path) -> None:
    class Stated:
        """A stream whose frames have these times in seconds."""

        time_base, name = Fraction(1, 1000), "stated"

        def decode(self, stream: object) -> Iterator[Any]:
            for seconds in (Fraction(1), None, Fraction("1.2"), Fraction("1.2"), Fraction(0), Fraction(5)):
                pts = None if seconds is None else int(seconds * 1000)
                picture = Image.new("RGB", (8, 8))
                yield SimpleNamespace(
                    pts=pts, time_base=self.time_base, to_image=lambda picture=picture: picture, side_data={}
                )

    times = [time for time, _ in _decode(Stated(), Stated(), None, Fraction(10))]
    assert times == [1, Fraction("1.1"), Fraction("1.2"), Fraction("1.201"), Fraction("1.301"), 5]
    camera = [time for time, _ in _decode(Stated(), Stated(), None, Fraction(10), from_zero=True)]
    assert camera == [time - 1 for time in times]


def test_frames_are_read_in_any_order_and_in_other_processes(clip: Path) -> None:
    data = cs.open_data(f"clip:{clip},every=1", "all")
    frames = [data[position][0] for position in range(FRAMES)]
    for position in (7, 3, 3, 11, 0):
        assert torch.equal(data[position][0], frames[position])
    assert torch.equal(pickle.loads(pickle.dumps(data))[2][0], frames[2])


def test_labels_are_named_by_the_number_of_their_frame(clip: Path, tmp_path: Path) -> None:
    folder = labelled(tmp_path / "labels", 0, 5, 11)
    (folder / "5.png").write_bytes(b"not six digits")
    with pytest.warns(LeftOut, match=r"000025\.png: 5\.png"):
        data = cs.open_data(f"clip:{clip},labels={folder},classes=4,ignore=3", "test")
    frames = cs.open_data(f"clip:{clip},every=1", "all")
    assert data.is_labelled and [Path(name).name for name in data.names] == ["000000", "000005", "000011"]
    for position, number in enumerate((0, 5, 11)):
        image, labels = data[position]
        expected = IGNORED if number % 4 == 3 else number % 4
        assert torch.equal(image, frames[number][0]) and labels.unique().tolist() == [expected]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (",start=99", "has no images"),
        (",labels=late,classes=4", f"has no frame {FRAMES}"),
        (",labels=labels,ignore=3", "classes=11"),
    ],
)
def test_what_no_clip_has_is_refused(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    labelled(tmp_path / "labels", 0)
    labelled(tmp_path / "late", FRAMES)
    with pytest.raises(CadError, match=said):
        cs.open_data(f"clip:{clip}{options}", "all")


@pytest.mark.parametrize("ending", [".mp4", ".mkv", ".avi"])
def test_a_clip_that_was_cut_short_says_so_before_any_work(tmp_path: Path, ending: str) -> None:
    whole = written(tmp_path / "drive.mp4" if ending == ".avi" else tmp_path / f"drive{ending}")
    content = whole.read_bytes()
    if ending == ".avi":
        content = b"RIFF" + (2000).to_bytes(4, "little") + b"AVI " + bytes(1988)
    cut = tmp_path / f"cut{ending}"
    cut.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(cs.FileError, match=r"was cut short[\s\S]*missing: at least [\d,]+ bytes"):
        length_of(cut)
    with pytest.raises(cs.FileError, match="was cut short"), open_clip(cut):
        pass


@pytest.mark.parametrize(
    "address",
    ["rtsp://user:secret@10.0.0.5:554/live", "HTTP://a/b.png"],
)
def test_streams_and_addresses_of_the_web_are_refused_by_name_in_every_place(
    address: str, command_line: Run, tmp_path: Path
) -> None:
    for place in (f"images:{address}", f"clip:{address}", address):
        with pytest.raises(cs.InvalidInput, match=r"://") as refusal:
            open_pictures(place)
        assert "secret" not in str(refusal.value) and "ADDRESS" in str(refusal.value)
    net = saved_segmenter(tmp_path / "net.safetensors")
    for words in (("run", net, address, "-o", "out.mp4"), ("run", net, address), ("mask", address)):
        done = command_line(*words)
        assert done.code == 1 and "ADDRESS" in done.err and not (tmp_path / "out.mp4").exists()
    refuse_stream("s3://bucket/photos")
    refuse_stream(tmp_path)


def test_commands_take_a_clip(clip: Path, command_line: Run, tmp_path: Path) -> None:
    net = saved_segmenter(tmp_path / "net.safetensors")
    done = command_line("eval", net, "--trust", "--data", f"clip:{clip},every=6", "--rounds", 0, "--json")
    assert done.code == 0 and done.json["images"] == 2
    masked = ("mask", f"{clip},every=6", "--output-stride", "2,8", "--json", "-o")
    one, two = command_line(*masked, "mask.png"), command_line(*masked, "mask.mp4")
    assert one.json["file"] == "mask.png" and two.json["frames"] == 2 and length_of(Path("mask.mp4"))[0] == 2
    with open_clip(Path("mask.mp4")) as drawn:  # the first of both is that of the picture
        frame, (first, second) = Image.open("mask.png").size, islice(drawn.frames, 2)
        assert abs(first.shape[2] - frame[0]) <= 1 and not torch.equal(first, second)
    refused = command_line("mask", clip, "--compare", "-o", "mask.mp4")
    assert refused.code == 1 and "comparison" in refused.err
    refused = command_line("finetune", net, "--trust", "--data", f"clip:{clip}", "-o", "run")
    assert refused.code == 1 and "frames/%06d.png" in refused.err
