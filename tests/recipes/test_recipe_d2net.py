"""The D2-Net recipe: the published networks and their cost, released weights, published settings, heads.

K1, K3 and K5 of the specification, with the published options: windows start at the middle of a cell, cells are read as
they are, and pools leave alone what they do not downsample.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, relative_error, slow, some
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import made_once
from safetensors.torch import save_file
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.data.networks import source_of
from cadsurgery.masks import keypoints_at
from recipes.d2net_vgg import heads, recipe
from recipes.d2net_vgg.network import BUILDER, PREFIX, Trunk, load_released, released_state
from recipes.d2net_vgg.recipe import PUBLISHED, RUNS

QUICK = settings(max_examples=30, deadline=None, derandomize=True)
SIZE = (24, 40)
DOUBLE = torch.float64
PIXEL_MACS = {8: 278_208, 4: 554_688, 2: 1_937_088, 1: 7_632_576}  # specification, 2.5


def trunk(dtype: torch.dtype = torch.float32, output_stride: int = 8, seed: int = 0) -> Trunk:
    """With random weights that keep the size of values."""
    torch.manual_seed(seed)
    net = Trunk(output_stride).eval()
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight)
            nn.init.normal_(conv.bias, 0.0, 0.1)  # type: ignore[arg-type]
    return net.to(dtype)


@made_once
def adapted(high: int, dtype: torch.dtype = torch.float32, **options: Any) -> cs.AdaptiveModel:
    """A trunk with the published options."""
    example = torch.zeros(1, 3, 16, 16, dtype=dtype)
    chosen = {**PUBLISHED, "output_stride": (high, 8), "example_input": example, **options}
    return cs.adaptify(trunk(dtype), "none", verify_laws=False, **chosen)


def images(batch: int = 2, size: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, *size, dtype=dtype)


def written_down(net: Trunk, image: Tensor, output_stride: int) -> Tensor:
    """The published regular network: pools kept from the first, what follows a deleted one dilated."""
    kept = {8: 3, 4: 2, 2: 1, 1: 0}[output_stride]
    convs = [layer for layer in net.model if isinstance(layer, nn.Conv2d)]
    x, dilation = image[:, [2, 1, 0]], 1
    for number, conv in enumerate(convs):
        if number in (2, 4, 7):
            pool = (2, 4, 7).index(number)
            if pool < kept:
                x = F.max_pool2d(x, 2)
            else:
                dilation *= 2
        x = F.relu(F.conv2d(x, conv.weight, conv.bias, padding=dilation, dilation=dilation))
    return x


@pytest.mark.parametrize("output_stride", [8, 4, 2, slow(1)])
@torch.no_grad()
def test_the_trunk_is_the_published_regular_network(output_stride: int) -> None:
    net, x = trunk(DOUBLE, output_stride), images(dtype=DOUBLE)
    expected = written_down(net, x, output_stride)
    assert expected.shape == (2, 512, SIZE[0] // output_stride, SIZE[1] // output_stride)
    assert_same(net(x), expected)
    convs = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64, 64, 128, 128, *[256] * 3, *[512] * 3]
    assert (net(x) >= 0).all()  # the last activation is there


@pytest.mark.parametrize("output_stride", [16, 0, 3])
def test_another_output_stride_is_refused_with_the_possible_ones(output_stride: int) -> None:
    with pytest.raises(cs.InvalidInput) as caught:
        Trunk(output_stride)
    assert "8, 4, 2, 1" in caught.value.next


def test_it_sees_pixels_less_caffes_means_blue_first() -> None:
    net = cs.build_model(BUILDER, "none")
    source = source_of(net)
    shown = normalise(torch.tensor([1.0, 0.5, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8), source)
    wanted = torch.tensor([255 - 123.68, 127.5 - 116.779, -103.939])
    assert torch.allclose(shown[0, :, 0, 0], wanted, atol=1e-4)
    seen: list[Tensor] = []
    net.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    net(shown)
    assert torch.allclose(seen[0][0, :, 0, 0], wanted.flip(0), atol=1e-4)


@pytest.mark.parametrize(("high", "dtype"), some(covering([4, 2, 1], [torch.float32, DOUBLE]), rows=True))
@torch.no_grad()
def test_everything_high_is_the_regular_network_and_everything_low_the_original_repeated(
    high: int, dtype: torch.dtype
) -> None:
    """K1, element by element, and K3: no window, all cells of output stride 8."""
    net, x, times = adapted(high, dtype), images(dtype=dtype), 8 // high
    tolerance = {torch.float32: 1e-5, DOUBLE: 1e-12}[dtype]
    fine, low = trunk(dtype, high)(x), net(x, mask="none")
    assert_same(net(x, mask="all"), fine, tolerance)
    assert relative_error(low, fine) > 0.1, "the map matters"
    expected = trunk(dtype)(x).repeat_interleave(times, 2).repeat_interleave(times, 3)
    assert_same(low, expected, tolerance)
    sides = "/".join("0" * int(math.log2(times)))
    with keypoints_at([torch.tensor([[9.0, 9.0]]), torch.empty(0, 2)]):
        assert_same(net(x, mask=f"keypoints:detector=given,dilations={sides}"), expected, tolerance)
    assert (net.levels == net.plan.max_level).all()


def test_the_regular_networks_cost_what_is_published() -> None:
    """K5, exactly."""
    assert recipe.macs_per_pixel() == PIXEL_MACS


def released(seed: int = 1) -> dict[str, Tensor]:
    """The tensors of a file as D2-Net's code writes it."""
    torch.manual_seed(seed)
    state, channels = {}, 3
    indices = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)
    for index, wider in zip(indices, (64, 64, 128, 128, 256, 256, 256, 512, 512, 512), strict=True):
        name = f"dense_feature_extraction.model.{index}"
        state[f"{name}.weight"] = torch.randn(wider, channels, 3, 3) / (9 * channels / 2) ** 0.5
        state[f"{name}.bias"], channels = torch.randn(wider) / 10, wider
    return state


@torch.no_grad()
def test_a_released_state_is_loaded_and_written_back_bit_for_bit() -> None:
    state, net, x = released(), trunk(), images(1)
    load_released(net, state)
    back = released_state(net)
    assert list(back) == list(state)
    assert all(torch.equal(back[name], value) for name, value in state.items())
    other = trunk(seed=5)
    assert not torch.equal(other(x), net(x))
    load_released(other, back)
    assert torch.equal(other(x), net(x))


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:weights from")
def test_every_way_to_load_a_released_file_gives_the_same(tmp_path: Path) -> None:
    """By the recipe, strictly into a trunk, by name, into a converted network, from each kind of file."""
    state, x, net = released(), images(1, (16, 24)), trunk()
    load_released(net, state)
    expected = net(x)
    torch.save({"model": state, "min_validation_loss": torch.tensor(0.5)}, tmp_path / "d2_tf.pth")
    torch.save(state, tmp_path / "plain.pth")
    save_file(state, tmp_path / "d2.safetensors")
    for file in ("d2_tf.pth", "plain.pth"):
        other = trunk()
        load_released(other, tmp_path / file)
        assert torch.equal(other(x), expected)
        assert torch.equal(cs.build_model(BUILDER, str(tmp_path / file))(x), expected)
    assert torch.equal(cs.build_model(BUILDER, str(tmp_path / "d2.safetensors"))(x), expected)
    strict = trunk()
    strict.load_state_dict(dict(state))
    assert torch.equal(strict(x), expected)
    inside = nn.Sequential(trunk())
    inside.load_state_dict({f"0.{name}": value for name, value in state.items()})
    assert torch.equal(inside(x), expected)
    converted = adapted(4)
    load_released(converted, tmp_path / "d2_tf.pth")
    twice = expected.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert_same(converted(x, mask="none"), twice, 1e-5)
    whole = recipe.adapted(RUNS["os8"], tmp_path / "d2_tf.pth", verify_laws=False)
    assert all(torch.equal(whole.state_dict()[name], value) for name, value in net.state_dict().items())


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FIRST, LAST = f"{PREFIX}0.weight", f"{PREFIX}21.bias"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda state: dict(reversed(state.items())), "order"),
        (lambda state: {name: value for name, value in state.items() if name != LAST}, "21.bias"),
        (lambda state: {**state, f"{PREFIX}24.weight": torch.zeros(1)}, "24.weight"),
        (lambda state: {}, "0.bias"),
    ],
)
def test_what_is_not_a_released_file_is_refused(change: Change, word: str) -> None:
    net = trunk()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(cs.FileError, match="no released D2-Net file") as caught:
        load_released(net, change(released()))
    assert word in caught.value.where and "20" in caught.value.why and "d2_tf.pth" in caught.value.next
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_settings_are_the_published_ones() -> None:
    """Their mean matching accuracy as in the specification, 2.5; they say so in their mask."""
    assert {name: run.mma3 for name, run in RUNS.items()} == {
        **{"os8": 0.5500, "0-0-5": 0.5750, "0-0-11": 0.6084, "0-0-21": 0.6372, "0-0-31": 0.6463},
        **{"0-19-35": 0.6627, "0-27-37": 0.6682, "19-41-41": 0.6743, "25-51-51": 0.6781, "os1": 0.6765},
    }
    assert PUBLISHED == {"anchor": "center", "fill": "nearest", "pool": "drop"}
    for name, run in RUNS.items():
        assert len(run.dilations) == math.log2(8 // run.output_stride)
        sides = run.mask.partition("dilations=")[2]
        assert run.mask.startswith("keypoints:detector=given,count=512,")
        if name[0].isdigit():
            assert ["0"] * (3 - len(run.dilations)) + sides.split("/") == name.split("-")
    assert RUNS["os8"].mask.endswith("=0/0/0") and RUNS["os1"].mask.endswith("=inf/inf/inf")


@pytest.mark.parametrize("name", some(RUNS, every=5))
@torch.no_grad()
def test_every_setting_is_planned_and_runs(name: str) -> None:
    """Of two images with different numbers of keypoints, with everything and with what is needed only."""
    run, x = RUNS[name], images(2, (16, 24))
    net = recipe.adapted(run, example_input=torch.zeros(1, 3, 16, 16), verify_laws=False)
    assert net.plan.output_stride == (run.output_stride, 8)
    assert net.plan.max_level == len(run.dilations) and net.mask.spec() == run.mask
    geometry = net.geometry
    assert (geometry.anchor, geometry.fill, geometry.pool) == ("center", "nearest", "drop")
    points = [torch.tensor([[3.0, 4.0], [20.0, 11.0]]), torch.empty(0, 2)]
    rows = recipe.describe(net, x, points, published=True)
    assert [tuple(part.shape) for part in rows] == [(2, 512), (0, 512)]
    lowest = {"os1": 0}.get(name, net.plan.max_level)
    assert (net.levels[1] == lowest).all(), "no keypoints, nothing kept"
    assert net.active_fraction > 0 if run.dilations[0] else net.active_fraction == 0
    needed = recipe.describe(net, x, points, published=True, reach="receptive")
    assert_same(needed[0], rows[0], 1e-5)


@torch.no_grad()
def test_descriptors_are_normalised_unless_published() -> None:
    """Published: as they are, at round(y (h - 1) / (H - 1))."""
    net, x = adapted(2), images(1)
    points = [torch.tensor([[0.0, 0.0], [39.0, 23.0], [13.0, 9.0], [26.0, 14.0]])]
    mask = RUNS["0-19-35"].mask
    with keypoints_at(points):
        dense = net(x, mask=mask)[0]
    places = [(round(y * 11 / 23), round(x * 19 / 39)) for x, y in points[0].tolist()]
    expected = torch.stack([dense[:, y, x] for y, x in places])
    (published,) = recipe.describe(net, x, points, published=True, mask=mask)
    assert torch.equal(published, expected)
    (ours,) = recipe.describe(net, x, points, mask=mask)
    expected = torch.stack([dense[:, int(y) // 2, int(x) // 2] for x, y in points[0].tolist()])
    assert_same(ours, F.normalize(expected, dim=1), 1e-6)
    assert torch.allclose(ours.norm(dim=1), torch.ones(4))


def test_the_published_grey_swaps_red_and_blue_and_cuts_off() -> None:
    image = torch.zeros(3, 2, 4)
    for channel in range(3):
        image[channel, :, channel] = 1.0
    assert recipe.grey(image).tolist() == [[29, 149, 76, 0]] * 2  # 255 times .114, .587, .299


@pytest.mark.slow
def test_the_recipe_prints_and_writes_its_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without timing; from another folder too."""
    monkeypatch.chdir(tmp_path)
    names = ["os8", "0-0-31", "25-51-51", "os1"]
    arguments = ["--rounds", "0", "--size", "48x64", "--runs", *names, "--output", "results.json"]
    monkeypatch.setattr(sys, "argv", ["recipe.py", *arguments])
    recipe.main()
    printed = capsys.readouterr().out
    for stride, macs in PIXEL_MACS.items():
        assert f"output stride {stride}: {macs:,} MACs per pixel" in printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1 and len(table) == 2 + len(names)
    document = json.loads(Path("results.json").read_text())
    assert document["size"] == [48, 64] and document["weights"] == "random" and document["published"]
    rows = {row["run"]: row for row in document["rows"]}
    assert list(rows) == names
    assert rows["os8"]["macs_per_pixel"] == PIXEL_MACS[8] and rows["os8"]["active_fraction"] == 0
    assert rows["os1"]["macs_per_pixel"] == PIXEL_MACS[1] and rows["os1"]["active_fraction"] == 1
    for name, row in rows.items():
        assert row["output_stride"] == [RUNS[name].output_stride, 8]
        assert row["keypoints"] == rows["os8"]["keypoints"] > 10
        assert 0 < row["receptive_macs_per_pixel"] <= row["macs_per_pixel"] <= PIXEL_MACS[1]
        assert row["elements"][1] <= row["elements"][0]
        assert not any(key.endswith("_ms") for key in row)
        (line,) = (line for line in table if line.startswith(f"| {name} |"))
        assert f"{row['macs_per_pixel']:,.0f}" in line and f"{RUNS[name].mma3:.4f}" in line


def hill(
    place: tuple[float, float], curved: tuple[float, float, float], size: tuple[int, int] = (11, 13)
) -> Tensor:
    """100 less half the quadratic form of (down, across, mixed) curvatures around a place."""
    y = torch.arange(size[0], dtype=DOUBLE)[:, None] - place[0]
    x = torch.arange(size[1], dtype=DOUBLE)[None] - place[1]
    down, across, mixed = curved
    return 100 - 0.5 * (down * y.square() + across * x.square() + 2 * mixed * y * x)


def channels(*maps: Tensor) -> Tensor:
    return torch.stack(maps).unsqueeze(0)


def detected(*maps: Tensor) -> list[list[int]]:
    """Channel, y and x of what is found inside the border."""
    found = heads.detect(channels(*maps))
    assert found.dtype == torch.bool and found.shape == (1, len(maps), *maps[0].shape)
    inner = torch.zeros_like(found)
    inner[..., 1:-1, 1:-1] = found[..., 1:-1, 1:-1]
    return inner.nonzero()[:, 1:].tolist()


def test_a_blob_is_found_once_in_its_channel() -> None:
    blob, flat = hill((4, 7), (1, 1, 0)), torch.zeros(11, 13, dtype=DOUBLE)
    assert detected(flat, blob, flat) == [[1, 4, 7]]
    both = torch.maximum(blob, hill((8, 2), (3, 3, 0)))
    assert detected(flat, both) == [[1, 4, 7], [1, 8, 2]]


@QUICK
@given(
    place=st.tuples(st.floats(0, 10), st.floats(0, 12)),
    down=st.floats(0.5, 4),
    across=st.floats(0.5, 4),
    tilt=st.floats(-0.9, 0.9),
)
def test_the_top_of_a_parabola_is_found_exactly(
    place: tuple[float, float], down: float, across: float, tilt: float
) -> None:
    """From every sample inside the border."""
    curved = (down, across, tilt * math.sqrt(down * across))
    step = heads.localise(channels(hill(place, curved)))
    assert step.shape == (1, 2, 1, 11, 13)
    y, x = torch.meshgrid(torch.arange(11.0), torch.arange(13.0), indexing="ij")
    assert torch.allclose((y + step[0, 0, 0])[1:-1, 1:-1], torch.tensor(place[0], dtype=DOUBLE), atol=1e-6)
    assert torch.allclose((x + step[0, 1, 0])[1:-1, 1:-1], torch.tensor(place[1], dtype=DOUBLE), atol=1e-6)


def test_keypoints_lie_between_samples_and_are_described_there() -> None:
    """Two tops; x and y in pixels, the middle of a sample's pixels; the strongest first."""
    size = (15, 30)
    low = (hill((5.25, 7.75), (1, 1.5, 0.25), size) - 90).clamp(min=0)
    high = (hill((8.4, 21.2), (2, 1, 0), size) - 88).clamp(min=0)
    beside = -torch.arange(450, dtype=DOUBLE).view(size)
    features = channels(beside, low + high)
    points, scores, rows = heads.keypoints(features, 4)
    wanted = torch.tensor([[21.2, 8.4], [7.75, 5.25]], dtype=DOUBLE) * 4 + 1.5
    assert torch.allclose(points, wanted)
    assert scores.tolist() == [features[0, 1, 8, 21], features[0, 1, 5, 8]]
    for row, y, x, down, across in zip(rows, (8, 5), (21, 7), (0.4, 0.25), (0.2, 0.75), strict=True):
        box = features[0, :, y : y + 2, x : x + 2]
        above, below = (1 - across) * box[..., 0, 0] + across * box[..., 0, 1], box[..., 1, :]
        below = (1 - across) * below[..., 0] + across * below[..., 1]
        assert torch.allclose(row, F.normalize((1 - down) * above + down * below, dim=0))


def test_keypoints_of_several_images_at_once_are_refused() -> None:
    with pytest.raises(cs.InvalidInput, match="2 maps at once") as caught:
        heads.keypoints(torch.zeros(2, 4, 9, 9), 8)
    assert "one map" in caught.value.next
