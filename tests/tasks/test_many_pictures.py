"""Many pictures by workers and Ray: each one is done once, whatever is killed, and as one process does it."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, thorough
from networks import saved_segmenter
from PIL import Image
from predicting import predict

import cadsurgery as cs
from cadsurgery.data import stores
from cadsurgery.data.images import street_scene
from cadsurgery.tasks import predictor
from cadsurgery.tasks.commands import RunOptions
from cadsurgery.tasks.journal import Item
from cadsurgery.tasks.predictor import PredictionSettings, Predictor
from cadsurgery.tasks.workers import share

SIZES = [(24, 32), (32, 24), (33, 41), (40, 40)]
DIFFERENT = 100  # pictures; the others are links to them
DAMAGED = 50  # which of them is none
COUNT = 3_000
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small converted segmentation network."""
    path = tmp_path_factory.mktemp("many") / "net.safetensors"
    return saved_segmenter(path)


@pytest.fixture(scope="session")
def different(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of four sizes, of which one is damaged."""
    folder = tmp_path_factory.mktemp("different")
    for number in range(DIFFERENT):
        pixels = 255 * street_scene(*SIZES[number % 4], number).permute(1, 2, 0)
        Image.fromarray(pixels.round().byte().numpy()).save(folder / f"{number}.png")
    content = (folder / f"{DAMAGED}.png").read_bytes()
    (folder / f"{DAMAGED}.png").write_bytes(content[: len(content) // 2])
    return folder


@pytest.fixture(scope="session")
def expected(file: Path, different: Path) -> dict[str, bytes]:
    """The predictions of one process."""
    report = predict(file, [different], different.parent / "expected")
    assert len(report.rows) == DIFFERENT - 1 and len(report.failed) == 1
    return {path.name: path.read_bytes() for path in (different.parent / "expected").glob("*.png")}


@pytest.fixture
def many(different: Path, tmp_path: Path) -> Path:
    """Three thousand pictures in thirty folders."""
    for number in range(COUNT):
        folder = tmp_path / "photos" / f"{number // DIFFERENT:03}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(different / f"{number % DIFFERENT}.png", folder / f"{number % DIFFERENT}.png")
    return tmp_path / "photos"


def check(output: Path, expected: dict[str, bytes]) -> None:
    """Every picture but the damaged ones was done once, as one process does it."""
    files = sorted(output.glob("manifest*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()[1:]]
    done = [row["output"] for row in rows if "output" in row]
    assert len(done) == len(set(done)) == COUNT // DIFFERENT * (DIFFERENT - 1)
    assert {Path(row["path"]).name for row in rows if "output" not in row} == {f"{DAMAGED}.png"}
    for place in done:
        assert (output / place).read_bytes() == expected[Path(place).name], place


@pytest.mark.thorough
def test_workers_do_every_picture_once_though_one_of_them_is_killed(
    file: Path, many: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    killed = []

    def step(text: str, done: float | None = None, *more: Any) -> None:
        if done == COUNT // 4 and not killed:
            killed.append(multiprocessing.active_children()[0])
            killed[0].kill()

    report = predict(file, [many], tmp_path / "out", workers=2, step=step)
    assert killed and report.counts == (COUNT // DIFFERENT * (DIFFERENT - 1), COUNT // DIFFERENT)
    assert len(report.rows) == 1000 and "1970 more" in report.text
    check(tmp_path / "out", expected)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """Two machines of Ray with a core each, played by this one."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'cadsurgery[scale]'")
    from ray.cluster_utils import Cluster

    machine = {"num_cpus": 1, "object_store_memory": 100 << 20, "env_vars": ENVIRONMENT}
    checks = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {**machine, "_system_config": checks, "include_dashboard": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
        made = Cluster(initialize_head=True, head_node_args=head)
        made.other = made.add_node(**machine)
        ray.init(address=made.address, log_to_driver=False)
        yield made
        ray.shutdown()
        made.shutdown()


@pytest.mark.slow
def test_ray_does_every_picture_once_though_a_machine_is_lost(
    file: Path, many: Path, expected: dict[str, bytes], tmp_path: Path, cluster: Any
) -> None:
    lost = []

    def step(text: str, done: float | None = None, *more: Any) -> None:
        if done == COUNT // 4 and not lost:
            lost.append(cluster.other)
            cluster.remove_node(cluster.other, allow_graceful=False)

    report = predict(file, [many], tmp_path / "out", ray=cluster.address, workers=None, step=step)
    assert lost and report.counts == (COUNT // DIFFERENT * (DIFFERENT - 1), COUNT // DIFFERENT)
    check(tmp_path / "out", expected)


# -- sources -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_are_named_by_a_list_or_on_standard_input(
    file: Path, different: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(different.parent)
    lines = [f"{different.name}/{number}.png" for number in (3, 1, DAMAGED)]
    text = "\n".join([*lines, "", "missing.png", ""])
    (tmp_path / "list.txt").write_text(text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    for source in (f"@{tmp_path / 'list.txt'}", "-"):
        output = tmp_path / f"out{len(source)}"
        report = predict(file, [source], output, workers=None)
        assert [row["image"] for row in report.rows] == lines[:2] and report.counts == (2, 2)
        assert {failure["image"] for failure in report.failed} == {lines[2], "missing.png"}
        for line in lines[:2]:
            assert (output / line).read_bytes() == expected[Path(line).name]


@pytest.mark.parametrize("text", ["", None], ids=["empty", "missing"])
def test_a_list_without_pictures_is_refused(file: Path, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(cs.FileError, match="no images" if text is not None else r"the list @.*list\.txt"):
        predict(file, [f"@{tmp_path / 'list.txt'}"], tmp_path / "out")


def test_standard_input_without_pictures_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, told in (("", "no images were given"), ("missing.png", "no file or folder missing.png")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        with pytest.raises(cs.FileError, match=told):
            predict(file, ["-"], tmp_path / told)


# -- workers -------------------------------------------------------------------------------------------


class Fatal(PredictionSettings):
    """Settings whose predictor kills its process at one of the pictures."""

    def with_one_thread(self) -> Predictor:
        predictor = super().with_one_thread()
        read = predictor._read

        def fatal(item: Item) -> Any:
            if item.source.endswith("/2.png"):
                os.kill(os.getpid(), signal.SIGKILL)
            return read(item)

        predictor._read = fatal  # type: ignore[method-assign]
        return predictor


@pytest.mark.slow
def test_a_picture_that_ends_its_process_is_a_failure_and_its_neighbours_are_done(
    file: Path, different: Path, tmp_path: Path
) -> None:
    items = (Item(at, str(different / f"{at}.png"), str(tmp_path / f"{at}.png")) for at in range(8))
    answers = dict(
        share(items, Fatal(str(file), RunOptions(trust=True)).predicting, 1, predictor.lost, size=16)
    )
    assert {at for at, row in answers.items() if "output" not in row} == {2}
    assert "ended at this image" in answers[2]["what"] and len(answers) == 8


@pytest.mark.parametrize(("options", "told"), [({"mask": "edges | smooth"}, "a mask with smooth")])
def test_workers_are_refused_where_pictures_follow_each_other(
    file: Path, different: Path, tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(cs.InvalidInput, match=f"--workers for {told}"):
        predict(file, [different], tmp_path / "out", workers=2, **options)
    with pytest.raises(cs.InvalidInput, match=f"--ray for {told}"):
        predict(file, [different], tmp_path / "out", ray="local", **options)


# -- Ray and object storage ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["png", "array"])
def test_columns_of_bytes_and_of_arrays_are_predicted_as_run_does(
    file: Path, different: Path, expected: dict[str, bytes], form: str
) -> None:
    names = ["0.png", "1.png", f"{DAMAGED}.png", "5.png"]
    files = [(different / name).read_bytes() for name in names]
    predict_batch = cs.ray.Predict(str(file), prediction=form, trust=True)
    found = predict_batch({"bytes": np.array(files, object), "name": np.array(names)})
    assert list(found["name"]) == names and set(found) == {"name", "prediction", "active_fraction", "error"}
    for name, prediction, active, error in zip(names, *list(found.values())[1:], strict=True):
        if name == f"{DAMAGED}.png":
            assert prediction is None and np.isnan(active) and "cannot be read" in error
            continue
        classes = np.array(Image.open(io.BytesIO(expected[name])))
        assert prediction == expected[name] if form == "png" else np.array_equal(prediction, classes)
        assert error is None and 0 <= active <= 1
    arrays = [np.array(Image.open(different / name).convert("RGB")) for name in ("0.png", "4.png")]
    of_arrays = predict_batch({"image": np.stack(arrays)})["prediction"]
    assert np.array_equal(of_arrays[0], found["prediction"][0]) or of_arrays[0] == found["prediction"][0]


def test_what_is_no_picture_of_a_column_is_an_error_of_its_row(file: Path) -> None:
    predict_batch = cs.ray.Predict(str(file), trust=True)
    found = predict_batch({"image": np.zeros((2, 8, 8), np.uint8)})
    assert all("cannot be read" in error for error in found["error"])
    with pytest.raises(cs.InvalidInput, match="no column bytes or image among other"):
        predict_batch({"other": np.zeros(2)})
    with pytest.raises(cs.CadError, match="form of predictions"):
        cs.ray.Predict(str(file), prediction="jpg", trust=True)


@pytest.fixture
def bucket(different: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a bucket in a server of moto, with the pictures."""
    server = pytest.importorskip(
        "moto.server", reason="moto is not installed: pip install 'cadsurgery[slow]'"
    )
    fs = pytest.importorskip("pyarrow.fs", reason="pyarrow is not installed: pip install 'cadsurgery[scale]'")
    running = server.ThreadedMotoServer(port=0)
    running.start()
    host, port = running.get_host_and_port()
    access = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    for name, value in {**access, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(name, value)
    files, path = fs.FileSystem.from_uri(f"s3://cadsurgery-{port}/?allow_bucket_creation=true")
    files.create_dir(path)
    for number in (0, 1, 2, DAMAGED):
        with files.open_output_stream(f"{path}/photos/a/{number}.png") as stream:
            stream.write((different / f"{number}.png").read_bytes())
    yield f"s3://{path}"
    running.stop()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"workers": 2}, thorough({"ray": "local", "workers": 1})], ids=str)
def test_pictures_are_read_from_object_storage_and_predictions_written_there(
    file: Path,
    bucket: str,
    expected: dict[str, bytes],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "ray" in options:
        ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'cadsurgery[scale]'")
        monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    photos, output = f"{bucket}/photos", f"{bucket}/out"
    report = predict(file, [photos], output, **options)
    assert report.counts == (3, 1)
    for number in range(3):
        assert stores.read_bytes(f"{bucket}/out/a/{number}.png") == expected[f"{number}.png"]
    rows = stores.read_bytes(f"{bucket}/out/manifest.jsonl").decode().splitlines()[1:]
    assert sorted(json.loads(row).get("output", "") for row in rows) == ["", "a/0.png", "a/1.png", "a/2.png"]
    again = predict(file, [photos], output, resume=True, **options)
    assert again.skipped == 3 and len(again.failed) == 1
    if "ray" in options:
        ray.shutdown()


@pytest.mark.slow
def test_an_address_that_cannot_be_reached_is_refused(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow.fs", reason="pyarrow is not installed: pip install 'cadsurgery[scale]'")
    with pytest.raises(cs.FileError, match=r"nowhere://bucket/photos cannot be listed"):
        predict(file, ["nowhere://bucket/photos"], tmp_path / "out")


@pytest.mark.parametrize("as_source", [True, False])
def test_an_address_with_options_is_refused_without_repeating_them(
    file: Path, different: Path, as_source: bool
) -> None:
    address = "s3://bucket/photos?secret_key=hidden"
    images, output = ([address], "out") if as_source else ([different], address)
    with pytest.raises(cs.FileError, match="AWS_ENDPOINT_URL") as refusal:
        predict(file, images, output)
    assert "hidden" not in str(refusal.value)
