"""The manifest of `cadsurgery run`: a run that was killed is resumed, and gives what an uninterrupted run gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run, thorough
from PIL import Image
from predicting import predict

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.support.progress import silent
from cadsurgery.tasks import predictor, run
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.predictor import DEPTH

COUNT = 6
# Runs the command with a function of `cadsurgery.tasks.MODULE` that kills the process in its third call.
KILLED = """
import os, signal, sys
import cadsurgery.tasks.{module} as module
from cadsurgery.cli.main import main
whole, calls = module.{function}, []
def killed(*arguments):
    calls.append(arguments)
    if len(calls) == 3:
        {last_words}
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments)
module.{function} = killed
main()
"""


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted segmentation network."""
    path = tmp_path_factory.mktemp("manifest") / "net.safetensors"
    model = cs.build_model("networks:segmenter").eval()
    mask = "edges | budget:fraction=0.3"
    cs.save(cs.adaptify(model, mask, output_stride=(8, 16), normalisation="raw", verify_laws=False), path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Small pictures of two sizes in two folders."""
    for number in range(COUNT):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path, number)
    return tmp_path / "photos"


def draw(path: Path, number: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = 255 * street_scene(46, 61 + number % 2, number)
    Image.fromarray(pixels.permute(1, 2, 0).round().byte().numpy()).save(path)


def predictions(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("[!.]*.png"))}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of the manifest, without its first line and times."""
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()[1:]]
    return sorted(({**row, "milliseconds": 0} for row in rows), key=lambda row: str(row["path"]))


@pytest.fixture
def whole(file: Path, photos: Path, tmp_path: Path) -> Path:
    """The folder of an uninterrupted run."""
    assert len(predict(file, photos, tmp_path / "whole").rows) == COUNT
    return tmp_path / "whole"


def test_a_row_tells_what_was_computed_for_a_picture(whole: Path, photos: Path) -> None:
    for row in rows_of(whole):
        number = int(Path(row["path"]).stem)
        assert row["path"] == str(photos / row["output"]) and row["size"] == [46, 61 + number % 2]
        assert sum(row["levels"]) == pytest.approx(1) and row["levels"][0] == row["active_fraction"]
        assert 0.1 < row["active_fraction"] < 0.5
    assert len(rows_of(whole)) == COUNT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "function", "last_words", "fewest"),
    [
        ("predictor", "write_picture", "pass", 0),
        ("journal", "append_line", "arguments[0].open('a').write(arguments[1][:40])", 1),
    ],
    ids=["before a prediction", "within a row"],
)
def test_a_run_that_was_killed_is_resumed_and_equals_an_uninterrupted_one(
    file: Path, photos: Path, whole: Path, module: str, function: str, last_words: str, fewest: int
) -> None:
    output = photos.parent / "out"
    script = KILLED.format(module=module, function=function, last_words=last_words)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    arguments = ("run", str(file), str(photos), "-o", str(output), "--trust")
    killed = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    recorded = (output / "manifest.jsonl").read_text().count("\n") - 1
    assert (
        recorded <= len(predictions(output)) <= recorded + DEPTH + 1
    )  # at most the pictures in flight are lost
    assert recorded >= fewest
    resumed = predict(file, photos, output, resume=True)
    assert len(resumed.rows) == COUNT - recorded and resumed.skipped == recorded and not resumed.failed
    assert predictions(output) == predictions(whole) and rows_of(output) == rows_of(whole)


@pytest.mark.parametrize("torn", [40, "first line"])
def test_a_torn_last_line_is_as_if_it_were_not_there(
    file: Path, photos: Path, whole: Path, torn: int | str
) -> None:
    manifest = whole / "manifest.jsonl"
    lines, before = manifest.read_bytes().splitlines(keepends=True), predictions(whole)
    kept = 0 if torn == "first line" else COUNT
    length = torn if isinstance(torn, int) else len(lines[kept]) - 1
    manifest.write_bytes(b"".join(lines[:kept]) + lines[kept][:length])
    resumed = predict(file, photos, whole, resume=True)
    assert resumed.skipped == max(kept - 1, 0) and len(resumed.rows) == COUNT - resumed.skipped
    assert len(rows_of(whole)) == COUNT and predictions(whole) == before
    assert predict(file, photos, whole, resume=True).skipped == COUNT


def other_network(file: Path, folder: Path) -> Path:
    net = cs.load(file, trust=True)
    next(net.parameters()).data.add_(0.1)
    cs.save(net, folder / file.name)  # of the same name
    return folder / file.name


@pytest.mark.parametrize(
    ("options", "told"),
    [({"size": (32, 48)}, r"size: null, now \[32, 48\]"), ({"file": other_network}, r'network: "\w+')],
    ids=["size", "network"],
)
def test_predictions_of_another_run_are_refused_with_what_differs(
    file: Path, photos: Path, whole: Path, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    change: Callable[[Path, Path], Path] | None = options.pop("file", None)
    before = predictions(whole), (whole / "manifest.jsonl").read_bytes()
    with pytest.raises(cs.InvalidInput, match=f"whole holds another run(?s:.)*{told}"):
        predict(change(file, tmp_path) if change else file, photos, whole, resume=True, **options)
    assert (predictions(whole), (whole / "manifest.jsonl").read_bytes()) == before


def test_pictures_that_failed_are_in_the_manifest_and_tried_again(
    file: Path, photos: Path, tmp_path: Path, command_line: Run
) -> None:
    (photos / "a" / "0.png").write_bytes(b"no picture")
    command = ("run", file, photos, "-o", "out", "--trust")
    first = command_line(*command)
    assert first.code == 1 and f"{COUNT - 1} done, 1 failed" in first.out
    failed = rows_of(tmp_path / "out")[0]
    assert failed["path"] == str(photos / "a" / "0.png") and "output" not in failed
    assert failed["error"]["error"] == "FileError" and "cannot be read" in failed["error"]["what"]
    again = command_line(*command, "--resume")
    assert again.code == 1 and f"0 done, {COUNT - 1} skipped, 1 failed" in again.out
    draw(photos / "a" / "0.png", 0)
    mended = command_line(*command, "--resume", "--json")
    assert mended.code == 0 and mended.json["skipped"] == COUNT - 1 and not mended.json["failed"]
    assert [row["image"] for row in mended.json["images"]] == [str(photos / "a" / "0.png")]
    assert predict(file, photos, tmp_path / "out", resume=True).skipped == COUNT


def test_a_network_that_fails_on_a_batch_fails_on_each_of_its_pictures(
    file: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(output: Any) -> Any:
        raise cs.InvalidInput("no map.", next="another network.")

    monkeypatch.setattr(predictor, "_first_tensor", refuse)
    assert len(predict(file, photos / "a", tmp_path / "out", batch=3).failed) == COUNT // 2
    assert len(rows_of(tmp_path / "out")) == COUNT // 2


def test_a_folder_with_a_manifest_is_not_overwritten_without_resume(
    file: Path, photos: Path, whole: Path
) -> None:
    before = predictions(whole), (whole / "manifest.jsonl").read_bytes()
    with pytest.raises(cs.InvalidInput, match=r"(?s)earlier run.*--resume; or .*--output"):
        predict(file, photos, whole)
    assert (predictions(whole), (whole / "manifest.jsonl").read_bytes()) == before


def test_what_is_missing_or_new_is_predicted(file: Path, photos: Path, whole: Path) -> None:
    before = predictions(whole)
    (whole / "a" / "2.png").unlink()
    draw(photos / "new.png", 9)
    resumed = predict(file, photos, whole, resume=True)
    assert {Path(row["image"]).name for row in resumed.rows} == {"2.png", "new.png"}
    assert {**before, "new.png": (whole / "new.png").read_bytes()} == predictions(whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["size", thorough("time"), "while it was predicted"])
def test_a_picture_that_was_replaced_is_predicted_again(
    file: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    changed, out = photos / "a" / "2.png", tmp_path / "out"
    before = changed.stat()

    def replace() -> None:
        draw(changed, 9)
        os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns + (how != "size")))

    if how == "while it was predicted":
        write = predictor.write_picture

        def replaced(drawn: Image.Image, target: str) -> None:
            write(drawn, target)
            if target.endswith("2.png"):
                replace()

        monkeypatch.setattr(predictor, "write_picture", replaced)
    predict(file, photos, out)
    monkeypatch.undo()
    if how != "while it was predicted":
        replace()
    again = predict(file, photos, out, resume=True)
    assert again.skipped == COUNT - 1 and [row["image"] for row in again.rows] == [str(changed)]
    predict(file, photos, tmp_path / "new")
    assert predictions(out) == predictions(tmp_path / "new")
    assert predict(file, photos, out, resume=True).skipped == COUNT


def test_a_prediction_is_not_replaced_by_that_of_another_picture(
    file: Path, photos: Path, whole: Path
) -> None:
    with pytest.raises(cs.InvalidInput, match=r"photos/a/0\.jpg would replace that of .*photos/a/0\.png"):
        draw(photos / "a" / "0.jpg", 9)  # takes the name 0.png, because it comes first
        predict(file, photos, whole, resume=True)


@pytest.mark.parametrize(
    ("sources", "output", "told"),
    [
        (["."], ".", r"among the pictures in .*photos\.(?s:.)*--output .*photos/predictions"),
        (["a/0.png", "b/1.png"], "a", r"a/0\.png would replace a file that no run has written"),
        (["a/0.jpg"], "a", r"a/0\.jpg would replace a file that no run has written"),
    ],
)
def test_pictures_are_not_replaced_by_predictions(
    file: Path, photos: Path, sources: list[str], output: str, told: str
) -> None:
    draw(photos / "a" / "0.jpg", 9)
    draw(photos / "a" / "b" / "1.png", 9)
    before = {path: path.read_bytes() for path in photos.parent.rglob("*.*g")}
    with pytest.raises(cs.InvalidInput, match=told):
        names = [str(photos / source) for source in sources]
        run.predict(file, names, RunOptions(output=str(photos / output), trust=True), step=silent)
    assert {path: path.read_bytes() for path in photos.parent.rglob("*.*[gl]")} == before


def test_a_damaged_manifest_is_refused_with_its_line(file: Path, photos: Path, whole: Path) -> None:
    manifest = whole / "manifest.jsonl"
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join([*lines[:2], "{", *lines[2:], ""]))
    with pytest.raises(cs.FileError, match=r"(?s)manifest\.jsonl.*line 3.*another output folder"):
        predict(file, photos, whole, resume=True)


def test_frames_that_follow_each_other_are_not_gone_on_with(file: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(cs.InvalidInput, match="smooth"):
        predict(file, photos, tmp_path / "out", resume=True, mask="edges | smooth")
    assert not (tmp_path / "out").exists()
