"""`cadsurgery run`: a frame of a clip is predicted as the image alone, and what is written can be read."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import covering
from networks import saved_segmenter
from PIL import Image
from predicting import predict

import cadsurgery as cs
from cadsurgery.data.clips import Clip, open_clip, write_clip
from cadsurgery.data.images import street_scene
from cadsurgery.data.networks import Source, class_names
from cadsurgery.support.errors import CadError
from cadsurgery.tasks import predictor, run
from cadsurgery.tasks.figures import prediction_picture

SIZE = (46, 61)  # odd
FRAMES = 5


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted segmentation network."""
    path = tmp_path_factory.mktemp("run") / "net.safetensors"
    return saved_segmenter(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Frames of a street, which moves."""
    (tmp_path / "frames").mkdir()
    street = street_scene(SIZE[0], SIZE[1] + 4 * FRAMES)
    for number in range(FRAMES):
        save(street[:, :, 4 * number :][:, :, : SIZE[1]], tmp_path / "frames" / f"{number}.png")
    return tmp_path / "frames"


def save(picture: torch.Tensor, path: Path) -> None:
    Image.fromarray((255 * picture.permute(1, 2, 0)).round().byte().numpy()).save(path)


def make_clip(folder: Path, path: Path) -> Path:
    pytest.importorskip("av", reason="PyAV is not installed")
    with write_clip(path, Fraction(10)) as add:
        for image in sorted(folder.iterdir()):
            add(Image.open(image))
    return path


def frames_of(path: Path) -> list[torch.Tensor]:
    with open_clip(path) as clip:
        return list(clip.frames)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor, str]]:
    """The frames of clips, their classes and views, before they are encoded."""
    found = []

    def draw(image: torch.Tensor, classes: torch.Tensor, view: str) -> Image.Image:
        found.append((image, classes, view))
        return prediction_picture(image, classes, view)

    monkeypatch.setattr(predictor, "prediction_picture", draw)
    return found


def test_a_frame_of_a_clip_is_predicted_as_the_image_alone(
    file: Path, folder: Path, tmp_path: Path, shown: list[Any]
) -> None:
    clip = make_clip(folder, tmp_path / "clip.mp4")
    (row,) = predict(file, [clip], tmp_path / "out.mp4").rows
    (tmp_path / "alone").mkdir()
    for number, frame in enumerate(frames_of(clip)):
        save(frame, tmp_path / "alone" / f"{number}.png")
    rows = predict(file, [tmp_path / "alone"], tmp_path / "predictions").rows
    for number, (_, classes, view) in enumerate(shown):
        alone = np.array(Image.open(tmp_path / "predictions" / f"{number}.png"))
        assert view == "overlay" and np.array_equal(classes.numpy(), alone)
    assert row["frames"] == len(rows) == len(shown) == FRAMES
    assert row["active_fraction"] == pytest.approx(sum(one["active_fraction"] for one in rows) / FRAMES)
    height, width = SIZE
    assert {tuple(frame.shape[1:]) for frame in frames_of(tmp_path / "out.mp4")} == {(height, width + 1)}


def test_frames_are_read_one_batch_at_a_time(
    file: Path, folder: Path, tmp_path: Path, shown: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av", reason="PyAV is not installed")
    ahead = []

    @contextmanager
    def open_counted(*arguments: Any) -> Iterator[Clip]:
        with open_clip(*arguments) as clip:

            def timed() -> Iterator[tuple[Fraction, torch.Tensor]]:
                for number, frame in enumerate(clip.timed):
                    ahead.append(number - len(shown))
                    yield frame

            yield replace(clip, timed=timed())

    monkeypatch.setattr(predictor, "open_clip", open_counted)
    predict(file, [folder], tmp_path / "out.mp4", batch=2)
    assert max(ahead) == 1 and len(ahead) == FRAMES


def test_a_batch_gives_what_each_image_gives_alone(file: Path, folder: Path, tmp_path: Path) -> None:
    save(street_scene(40, 52), folder / "2.png")  # of another size, in the middle
    (folder / "4.png").write_bytes(b"no picture")
    one, three = (predict(file, [folder], tmp_path / str(batch), batch=batch) for batch in (1, 3))
    for row, other in zip(one.rows, three.rows, strict=True):
        assert row["image"] == other["image"] and row["active_fraction"] == other["active_fraction"]
        assert Image.open(row["output"]).tobytes() == Image.open(other["output"]).tobytes()
    assert one.failed == three.failed and one.failed[0]["image"].endswith("4.png")


class UNet(torch.nn.Module):
    """A network for sides of multiples of 2**depth alone."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.down = torch.nn.ModuleList(torch.nn.Conv2d(4, 4, 3, 2, 1) for _ in range(depth))
        self.head = torch.nn.Conv2d(4, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = [self.stem(image)]
        for layer in self.down:
            maps.append(layer(maps[-1]).relu())
        value = maps.pop()
        for finer in reversed(maps):
            value = torch.nn.functional.interpolate(value, scale_factor=2.0) + finer
        return self.head(value)


@pytest.mark.parametrize(("depth", "size"), [(3, (61, 64)), (5, (75, 97))])
def test_pictures_of_any_size_are_padded_and_their_results_cut_back(
    depth: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    net = cs.adaptify(UNet(depth).eval(), "edges", coarsest=4, verify_laws=False).eval()
    picture = street_scene(*size)[None]
    one = predictor.Predictor(net, predictor.PredictionSettings("net"))
    ((classes, channels, row),) = one(picture)
    assert channels == 2 and classes.shape == size
    padded = row["padded_to"]
    assert all(long % 2**depth == 0 and long - side < 128 for long, side in zip(padded, size, strict=True))
    images = predictor.normalise(picture, one.source)
    whole = torch.nn.functional.pad(images, (0, padded[1] - size[1], 0, padded[0] - size[0]))
    expected = net(whole, sizes=[size])[..., : size[0], : size[1]].argmax(1)[0]
    assert (classes == expected).float().mean() > 0.999
    ((classes, _, row),) = one(picture[..., :32, :64].repeat(1, 1, 2, 2))
    assert "padded_to" not in row


def test_where_no_padding_helps_the_option_that_resizes_is_named() -> None:
    class OneSize(UNet):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return super().forward(image) + self.grid

    torch.manual_seed(0)
    model = OneSize(2).eval()
    model.grid = torch.nn.Parameter(torch.randn(1, 2, 48, 64))
    net = cs.adaptify(model, "edges", coarsest=4, verify_laws=False, example_input=torch.rand(1, 3, 48, 64))
    one = predictor.Predictor(net.eval(), predictor.PredictionSettings("net"))
    assert len(list(one(street_scene(48, 64)[None]))) == 1
    with pytest.raises(CadError, match="--size"):
        list(one(street_scene(61, 64)[None]))


def test_interrupted_clips_are_whole_up_to_the_last_frame(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command_line: Any
) -> None:
    clips = [make_clip(folder, tmp_path / f"{name}.mp4") for name in ("first", "second")]
    draw, handler = predictor.prediction_picture, signal.getsignal(signal.SIGINT)
    calls = []

    def interrupt(*arguments: Any) -> Image.Image:
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return draw(*arguments)

    monkeypatch.setattr(predictor, "prediction_picture", interrupt)
    done = command_line("run", file, *clips, "-o", tmp_path / "out", "--trust")
    assert done.code == 130 and "interrupted after 3 frames" in done.out
    assert len(frames_of(tmp_path / "out" / "first.mp4")) == 3
    assert not (tmp_path / "out" / "second.mp4").exists()
    assert predict(file, clips, tmp_path / "out", resume=True).skipped == 0
    assert [len(frames_of(tmp_path / "out" / clip.name)) for clip in clips] == [FRAMES, FRAMES]
    assert predict(file, clips, tmp_path / "out", resume=True).skipped == 2
    assert signal.getsignal(signal.SIGINT) is handler


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("output", ["out.mkv", "out"])
def test_a_killed_run_computes_one_clip_again_at_most(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    clips = [make_clip(folder, tmp_path / f"{name}.mp4") for name in ("first", "second")]
    if output != "out":
        clips = clips[:1]
    draw, drawn, last = predictor.prediction_picture, list[int](), len(clips) * FRAMES - 2
    whole = predict(file, clips, tmp_path / f"whole{Path(output).suffix}").rows

    def killed(*arguments: Any) -> Image.Image:
        drawn.append(len(drawn))
        if len(drawn) == last:
            raise Killed
        return draw(*arguments)

    monkeypatch.setattr(predictor, "prediction_picture", killed)
    with pytest.raises(Killed):
        predict(file, clips, tmp_path / output)
    with pytest.raises(cs.InvalidInput, match=r'another run(?s:.)*view: "", now "side"'):
        predict(file, clips, tmp_path / output, view="side", resume=True)
    again = predict(file, clips, tmp_path / output, resume=True)
    assert len(drawn) == last + FRAMES and again.skipped == len(clips) - 1
    same = ("frames", "active_fraction", "levels")
    assert [again.rows[-1].get(name) for name in same] == [whole[-1].get(name) for name in same]
    for one in whole:
        place = tmp_path / output / Path(one["output"]).name if output == "out" else tmp_path / output
        for ours, theirs in zip(frames_of(place), frames_of(Path(one["output"])), strict=True):
            assert torch.equal(ours, theirs)
    assert predict(file, clips, tmp_path / output, resume=True).skipped == len(clips)


def test_smooth_starts_anew_with_each_clip_and_each_folder(file: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "grey").mkdir()
    save(torch.full((3, *SIZE), 0.5), tmp_path / "grey" / "0.png")
    folders = [folder, tmp_path / "grey"]
    clips = [make_clip(one, tmp_path / f"{one.name}.mp4") for one in folders]
    smooth = partial(predict, file, mask="edges:threshold=0.1 | smooth:hold=9")
    for sources in (clips, folders):
        *street, after = smooth(sources, tmp_path / f"out{sources[0].suffix[1:]}").rows
        (alone,) = smooth(sources[1:], tmp_path / f"alone{sources[0].suffix[1:]}").rows
        assert after["active_fraction"] == alone["active_fraction"] < street[-1]["active_fraction"]


def test_the_progress_of_a_clip_tells_frames_per_second(file: Path, folder: Path, tmp_path: Path) -> None:
    clip, told = make_clip(folder, tmp_path / "clip.mp4"), []
    predict(file, [clip], tmp_path / "out.mp4", view="side", step=lambda *step: told.append(step))
    frames = [step for step in told if "frames/s" in step[0]]
    assert [step[1:] for step in frames] == [(number, FRAMES) for number in range(1, FRAMES + 1)]
    assert frames_of(tmp_path / "out.mp4")[0].shape[2] >= 2 * SIZE[1]
    assert frames[0][0].startswith(f"clip.mp4, frame 1 of {FRAMES}, ")


MILLISECONDS = {
    "jumps": (0, 40, 1000, 1040, 1041, 3000, 3500),
    "late": (1400, 1433, 1500, 2900, 2950, 3000, 9000),
    "steady": tuple(range(0, 280, 40)),
}


def times_of(path: Path) -> list[Fraction]:
    with open_clip(path) as clip:
        return [time for time, _ in clip.timed]


@pytest.mark.parametrize(
    ("ending", "source", "name", "base"),
    covering(
        [".mp4", ".mov", ".mkv"], [".mp4", ".mkv"], [*MILLISECONDS], [Fraction(1, 1000), Fraction(1, 90_000)]
    ),
)
def test_predictions_of_a_clip_are_shown_when_its_frames_are(
    file: Path, tmp_path: Path, ending: str, source: str, name: str, base: Fraction
) -> None:
    """Also where the source has frames that are decoded out of order."""
    av = pytest.importorskip("av", reason="PyAV is not installed")
    clip, milliseconds = tmp_path / f"clip{source}", MILLISECONDS[name]
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=64, height=48, pix_fmt="yuv420p")
        stream.codec_context.time_base, stream.codec_context.max_b_frames = base, 2
        for number, shown in enumerate(milliseconds):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 30 * number, np.uint8))
            frame.pts, frame.time_base = round(Fraction(shown, 1000) / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert times_of(clip) == pytest.approx([shown / 1000 for shown in milliseconds], abs=6e-4)
    predict(file, [clip], tmp_path / f"out{ending}")
    assert times_of(tmp_path / f"out{ending}") == pytest.approx(times_of(clip), abs=6e-4)


def test_classes_with_names_have_shares_and_a_legend(
    file: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels = cs.load(file, trust=True)(torch.rand(1, 3, 64, 64)).shape[1]
    names = tuple(f"class {number}" for number in range(channels))
    for module in (predictor, run):
        monkeypatch.setattr(module, "class_names", lambda source: names)
    rows = predict(file, [folder], tmp_path / "out").rows
    for row in rows:
        classes = np.array(Image.open(row["output"]))
        shares = {names[index]: float((classes == index).mean()) for index in np.unique(classes)}
        assert row["classes"] == pytest.approx(shares)
    assert Image.open(tmp_path / "out" / "classes.legend.png").size[1] > 20
    for module in (predictor, run):
        monkeypatch.setattr(module, "class_names", lambda source: ())
    assert "classes" not in predict(file, [folder], tmp_path / "none").rows[0]
    assert not (tmp_path / "none" / "classes.legend.png").exists()


def test_names_of_classes_are_those_of_the_weights() -> None:
    named = Source("torchvision:fcn_resnet50", weights="COCO_WITH_VOC_LABELS_V1")
    assert class_names(named)[:2] == ("__background__", "aeroplane") and len(class_names(named)) == 21
    for source in (Source("torchvision:fcn_resnet50"), Source("timm:resnet18"), Source("usernets:net")):
        assert class_names(source) == ()


@pytest.mark.parametrize(
    ("sources", "options", "hint"),
    [
        (["clip.mp4", "frames"], {"output": "out.mp4"}, "one clip"),
        (["clip.mp4"], {"output": "clip.mp4"}, "its source"),
        (["clip.mp4", "other/clip.mov"], {}, "another clip"),
        (["missing.mp4"], {}, "no file"),
        (["frames/0.png"], {"output": "out.png"}, "--output out"),
        (["clip.mp4"], {"output": "out.avi"}, ".mp4, .mov, .mkv"),
        (["9"], {"output": "seen.mp4", "resume": True}, "--resume for a camera"),
        (["text.mp4"], {}, "cannot be read as a clip"),
        (["sound.mp4"], {}, "holds no pictures"),
        (["mixed"], {"output": "out.mp4"}, "--size"),
        (["frames"], {"view": "overlaid"}, "overlay"),
        (["frames"], {"batch": 2, "mask": "edges | smooth"}, "--batch"),
    ],
)
def test_what_cannot_be_run_is_refused(
    file: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: list[str],
    options: dict[str, Any],
    hint: str,
) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    monkeypatch.chdir(tmp_path)
    make_clip(folder, tmp_path / "clip.mp4")
    (tmp_path / "text.mp4").write_text("no clip")
    with av.open("sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    (tmp_path / "mixed").mkdir()
    for number, size in enumerate([(40, 52), (40, 53)]):
        save(street_scene(*size), tmp_path / "mixed" / f"{number}.png")
    options = {"output": "out", **options}
    there = {*tmp_path.iterdir(), tmp_path / "out"}
    try:
        report = predict(file, [Path(one) for one in sources], Path(options.pop("output")), **options)
        told = str(report.failed)
        assert report.failed
    except CadError as error:
        told = str(error)
    assert hint in told
    assert {*tmp_path.iterdir()} <= there  # neither out.mp4 nor a folder of that name


@pytest.mark.parametrize(
    ("source", "output", "there"),
    [
        ("clip.mp4", "mine.mp4", "mine.mp4"),
        ("9", "mine.mov", "mine.mov"),
        ("frames", "out", "out/classes.legend.png"),
    ],
)
def test_no_run_replaces_a_file_that_none_has_written(
    file: Path, folder: Path, tmp_path: Path, source: str, output: str, there: str
) -> None:
    if source == "clip.mp4":
        pytest.importorskip("av", reason="PyAV is not installed")
        make_clip(folder, tmp_path / source)
    mine = tmp_path / there
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("a recording of last year")
    path = {"frames": folder, "9": Path("9")}.get(source, tmp_path / source)
    with pytest.raises(cs.InvalidInput, match=r"would replace a file[\s\S]*--output") as refusal:
        predict(file, [path], tmp_path / output)
    assert there in str(refusal.value)
    assert mine.read_text() == "a recording of last year"
    assert {*mine.parent.iterdir()} <= {mine, folder, tmp_path / "clip.mp4"}  # nothing else was written


def test_a_clip_of_an_earlier_run_is_replaced_and_one_of_ones_own_is_not(
    file: Path, folder: Path, tmp_path: Path
) -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed")
    output = tmp_path / "out.mov"
    for mask in ("none", "all"):
        (row,) = predict(file, [folder], output, mask=mask, fps=5).rows
        assert row["active_fraction"] == (mask == "all")
    with open_clip(output) as clip:
        assert clip.rate == 5
    with av.open(str(output)) as ours, av.open(str(tmp_path / "mine.mov"), "w") as mine:
        stream = mine.add_stream_from_template(ours.streams.video[0])
        for packet in ours.demux(ours.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                mine.mux(packet)
    with pytest.raises(cs.InvalidInput, match="would replace a file that no run has written"):
        predict(file, [folder], tmp_path / "mine.mov")
