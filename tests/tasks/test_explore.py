"""`cadsurgery explore`: it shows what the network returns, and its code gives the same."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import slow, some
from PIL import Image
from torch import nn

import cadsurgery as cs
from cadsurgery.data.images import normalise, read_image, street_scene
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import CadError
from cadsurgery.tasks import explore_page, explorer
from cadsurgery.tasks.commands import ExploreOptions
from cadsurgery.tasks.explorer import BUDGET, THRESHOLD, WRITTEN, PageSettings, Subject, explore, open_subject

NAME = "networks:segmenter"
SETTINGS = [
    PageSettings(),
    PageSettings("edges:dilation=5", THRESHOLD, 0.2, (8, 16), "nearest"),
    PageSettings("gradient", BUDGET, 0.25, (8, 16), "guided"),
]


@pytest.fixture(autouse=True)
def small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explorer, "_SAMPLE_SIZE", (97, 161))


@pytest.fixture(scope="module")
def subject() -> Subject:
    return open_subject(NAME)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted file with a mask of its own."""
    path = tmp_path_factory.mktemp("explore") / "net.safetensors"
    cs.save(
        cs.adaptify(cs.build_model(NAME), "gradient:threshold=0.2", output_stride=(8, 16), verify_laws=False),
        path,
    )
    return path


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture in the current folder, too large to be shown whole."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explorer, "_LONGEST", 80)
    Image.fromarray((255 * street_scene(61, 101).permute(1, 2, 0)).byte().numpy()).save("a photo.png")
    return tmp_path / "a photo.png"


@pytest.mark.parametrize("setting", some(SETTINGS, every=3))
def test_outputs_are_those_of_the_network(subject: Subject, setting: PageSettings) -> None:
    found = explore(subject, 1, setting, rounds=0)
    net = cs.adaptify(
        cs.build_model(NAME),
        setting.spec("edges"),
        output_stride=setting.output_stride,
        fill=setting.fill or "linear",
        normalisation=(subject.source.mean, subject.source.std),
        verify_laws=False,
    )
    batch = normalise(street_scene(97, 161, 1), subject.source).unsqueeze(0)
    assert torch.equal(found.output, net.optimize()(batch))
    names: dict[str, Any] = {}
    exec(found.python, names)
    torch.testing.assert_close(names["output"], found.output, rtol=1e-4, atol=1e-5)
    counted = net.macs(batch)
    assert (found.levels == 0).double().mean().item() == pytest.approx(counted.active_fraction)
    assert [row.macs for row in found.rows] == [counted.given, counted.high, counted.mask]
    for picture in (found.level_map, found.lattice, found.prediction, found.dense):
        assert picture is not None and picture.size == (161, 97)


@pytest.mark.parametrize("setting", some(SETTINGS[1:]))
def test_code_that_is_copied_gives_the_same(
    subject: Subject, photo: Path, setting: PageSettings, command_line: Any
) -> None:
    found = explore(subject, photo, setting, rounds=0)
    names: dict[str, Any] = {}
    exec(found.python, names)
    assert found.levels.shape == (1, 6, 10)
    torch.testing.assert_close(names["output"], found.output, rtol=1e-4, atol=1e-5)
    program, *arguments = shlex.split(found.command)
    done = command_line(*arguments, "--rounds", 0, "-o", "net.safetensors")
    assert program == "cadsurgery" and done.code == 0, done.err
    net, batch = (
        cs.load("net.safetensors", trust=True),
        normalise(read_image(photo, (48, 80)), subject.source),
    )
    torch.testing.assert_close(net(batch[None]), found.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", [slow(PageSettings()), PageSettings("edges", BUDGET, 0.5)])
def test_a_file_is_explored_as_it_is(
    file: Path, photo: Path, setting: PageSettings, command_line: Any
) -> None:
    subject = open_subject(str(file), trust=True)
    assert (subject.strides, subject.fills) == (((8, 16),), ("linear",))
    found = explore(subject, photo, setting, rounds=0)
    names: dict[str, Any] = {}
    exec(found.python, names)
    torch.testing.assert_close(names["output"], found.output, rtol=1e-4, atol=1e-5)
    done = command_line(*shlex.split(found.command)[1:], "-o", "predictions")
    assert done.code == 0, done.err
    classes = np.array(Image.open("predictions/a photo.png"))
    assert (classes == found.output[0].argmax(0).numpy()).mean() > 0.999  # ties of rounding apart


def test_work_and_time_of_the_whole_network_are_measured(subject: Subject) -> None:
    rows = explore(subject, 0, PageSettings("none"), rounds=1).rows
    assert [row.side for row in rows] == ["as given", "everything high", "none"]
    assert rows[0].macs == rows[2].macs < rows[1].macs and all(row.milliseconds > 0 for row in rows)


def classifier() -> nn.Module:
    layers = [layer for _ in range(4) for layer in (nn.LazyConv2d(4, 3, 2, 1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9))
    model(torch.rand(1, 3, 32, 32))
    return model.eval()


def test_a_classifier_is_shown_in_words() -> None:
    found = explore(open_subject("test_explore:classifier"), 0, PageSettings("all"), rounds=0)
    assert found.prediction is None and found.dense is None and tensors_of(found.output)[0].shape == (1, 9)
    first, second = (line.partition(": ")[2] for line in found.lines[-2:])
    assert first == second and first.count("class ") == 3  # everything is high on both sides


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        (PageSettings("edgs"), "edges"),
        (PageSettings(limit="share"), WRITTEN),
        (PageSettings("edges:function=x", BUDGET, 2.0), "edges"),
        (PageSettings(limit=BUDGET, value=2.0), "0..1"),
        (PageSettings("random", THRESHOLD, 0.5), "threshold"),
        (PageSettings(output_stride=(3, 5)), "(8, 16)"),
        (PageSettings(fill="linea"), "linear"),
    ],
)
def test_settings_that_are_impossible_are_refused(subject: Subject, setting: PageSettings, hint: str) -> None:
    with pytest.raises(CadError) as refused:
        explore(subject, 0, setting, rounds=0)
    assert hint in str(refused.value)


def test_what_is_no_image_is_refused(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_text("no image")
    with pytest.raises(cs.FileError, match=r"photo.png cannot be read as an image"):
        explore(subject, tmp_path / "photo.png", PageSettings(), rounds=0)


def test_a_learned_mask_is_explored_as_it_is_stored(tmp_path: Path) -> None:
    net = cs.adaptify(
        cs.build_model(NAME), "learned:channels=8/6/4", output_stride=(8, 16), verify_laws=False
    )
    cs.save(net, tmp_path / "net.safetensors")
    subject = open_subject(str(tmp_path / "net.safetensors"), trust=True)
    assert "mask=" not in explore(subject, 0, PageSettings(), rounds=0).python
    with pytest.raises(cs.InvalidInput, match="as it is stored"):
        explore(subject, 0, PageSettings(limit=BUDGET, value=0.5), rounds=0)


def test_networks_of_other_methods_are_refused(tmp_path: Path) -> None:
    net = cs.anytime(cs.build_model(NAME), exits="auto")
    cs.save(net, tmp_path / "exits.safetensors")
    with pytest.raises(cs.InvalidInput, match="another method"):
        open_subject(str(tmp_path / "exits.safetensors"), trust=True)


def test_the_command_tells_the_address_and_ends_at_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, command_line: Any
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    asked = dict[str, Any]()

    def serve(model: str, options: ExploreOptions, **_: Any) -> str:
        asked.update(vars(options), model=model)
        return "http://127.0.0.1:7860/"

    monkeypatch.setattr(explore_page, "serve", serve)
    monkeypatch.setattr("time.sleep", interrupt)
    done = command_line("explore", NAME, "--weights", "none")
    assert done.code == 130 and "http://127.0.0.1:7860/" in done.out
    assert asked["model"] == NAME and asked["weights"] == "none"


@pytest.mark.parametrize("mask", ["{}:score", "edges + keypoints:detector={}:score"])
@pytest.mark.parametrize("limit", [WRITTEN, BUDGET])
def test_a_mask_of_the_page_imports_and_calls_nothing(
    subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mask: str, limit: str
) -> None:
    (tmp_path / "of_a_stranger.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("of_a_stranger", "os"):
        with pytest.raises(cs.InvalidInput, match="cannot name a function") as caught:
            explore(subject, 0, PageSettings(mask.format(module), limit, 0.3), rounds=0)
        assert module in caught.value.where and "cadsurgery mask" in caught.value.next
    assert explore(subject, 0, PageSettings("detail", limit, 0.3), rounds=0).levels.numel() > 0
