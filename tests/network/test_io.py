"""Files: what is saved comes back bit for bit, whole or not at all, without pickle."""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import images, some
from networks import Composed, PooledSegmenter, adapted, randomise, unverified
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import cadsurgery as cs
import cadsurgery.network.storage
from cadsurgery.data.networks import Source
from cadsurgery.masks import Budget, EdgeMask, FixedMask
from cadsurgery.network.storage import read_metadata
from cadsurgery.surgery.plan import Plan


def segmenter(**options: Any) -> nn.Module:
    return randomise(PooledSegmenter(**options))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"fill": "nearest"},
    {"anchor": "center", "fill": "nearest"},
    {"pool": "drop"},
    {"patch": "block"},
    {"statistics": "element"},
    {"region": "backbone"},
    {"outputs": "native"},
    {"coarsest": 16},
    {"region": ["backbone", "classifier"]},
    {"output_stride": (8, 16)},
    {"output_stride": (4, 32), "anchor": "center", "fill": "nearest", "pool": "drop", "patch": "block"},
]


# -- round trips ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", some(OPTIONS), ids=lambda options: ",".join(options) or "defaults")
def test_a_saved_network_comes_back_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    net, image = adapted(**options), images(2, 97, 129)
    cs.save(net, tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors", model=segmenter())
    assert again.plan == net.plan and again.geometry == net.geometry
    named = {"outputs": "returned", "coarsest": "floors"}
    for name, value in options.items():
        field = named.get(name, name)
        stored = getattr(again.geometry, field, None) or getattr(again.plan, field)
        assert stored == (tuple(value) if isinstance(value, list) else value) or name == "coarsest"
    assert again.mask.spec() == net.mask.spec()
    assert not again.training
    assert torch.equal(again(image)["out"], net(image)["out"])
    assert torch.equal(again.levels, net.levels)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "options", "dtype"),
    [
        ("torchvision:resnet18", {"num_classes": 7}, torch.float32),
        ("timm:test_resnet", {}, torch.float32),
        *(("test_io:segmenter", {}, dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)),
    ],
)
def test_a_network_built_by_name_comes_back_without_the_model(
    tmp_path: Path, name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    model = randomise(cs.build_model(name, "none", **options)).to(dtype)
    net, image = unverified(model, "edges"), images(2, 65, 97, dtype)
    cs.save(net, tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors", trust=(is_own := name.startswith("test_io")))
    assert again.source == net.source and again.source.name == name and is_own != bool(again.source.untrusted)
    assert again.state_dict().keys() == net.state_dict().keys()
    for key, value in net.state_dict().items():
        assert again.state_dict()[key].dtype == value.dtype and torch.equal(again.state_dict()[key], value)
    for mask in (None, "none"):
        found, expected = (tree_leaves(side(image, mask=mask)) for side in (again, net))
        assert found and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_file_given_as_weights_is_remembered_by_its_name_and_not_where_it_lay(tmp_path: Path) -> None:
    torch.save(segmenter().state_dict(), tmp_path / "weights.pth")
    model = cs.build_model("test_io:segmenter", str(tmp_path / "weights.pth"))
    cs.save(unverified(model, "none"), tmp_path / "net.safetensors")
    net = cs.load(tmp_path / "net.safetensors", trust=True)
    assert net.source.weights == "weights.pth" and net.source.note == "weights from weights.pth"
    assert str(tmp_path).encode() not in (tmp_path / "net.safetensors").read_bytes()


def headed(classes: int, middle: int = 6) -> nn.Module:
    body = nn.Conv2d(3, middle, 3, 2, 1), nn.ReLU(), nn.Conv2d(middle, 8, 3, 2, 1), nn.ReLU()
    head = nn.Conv2d(8, classes, 1)
    return Composed(lambda net, x: net.head(net.body(x)), body=nn.Sequential(*body), head=head).eval()


def test_a_new_classifier_comes_back_into_a_network_that_has_it(tmp_path: Path) -> None:
    path, image = tmp_path / "net.safetensors", images(1, 64, 96)
    net = cs.adaptify(headed(19), "edges", example_input=images(1, 64, 64))
    net.source = Source("package:headed")
    net.head = nn.Conv2d(8, 5, 1)
    cs.save(net, path)
    again = cs.load(path, headed(5))
    assert torch.equal(again(image), net(image))
    expected = unverified(headed(5), "edges", example_input=images(1, 64, 64)).plan
    assert again.plan == expected
    assert (
        read_metadata(path)["source"] is None
    )  # the function would build the classifier that was there at first
    with pytest.raises(cs.FileError, match="another plan"):
        cs.load(path, headed(19))


def test_channels_changed_inside_come_back(tmp_path: Path) -> None:
    path, image = tmp_path / "net.safetensors", images(1, 64, 96)
    net = unverified(headed(3), "edges", example_input=images(1, 64, 64))
    net.body[0], net.body[2] = nn.Conv2d(3, 7, 3, 2, 1), nn.Conv2d(7, 8, 3, 2, 1)
    cs.save(net, path)
    assert torch.equal(cs.load(path, headed(3, middle=7))(image), net(image))


def test_saving_what_was_loaded_writes_the_same_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    cs.save(unverified(cs.build_model("test_io:segmenter", "none")), first)
    cs.save(cs.load(first, trust=True), second)
    assert first.read_bytes() == second.read_bytes()


# -- masks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask",
    some(
        [
            torch.randint(0, 2, (2, 12, 16)).bool(),
            Budget("edges:threshold=0.15,dilation=7", 0.4, per_batch=True),
            torch.randint(0, 2, (2, 12, 16)).to(torch.int8),
            Budget(torch.randint(0, 2, (1, 12, 16)), 0.4, per_batch=True),
            torch.randint(0, 2, (2, 12, 16)),
            *(Budget(mask, 0.4, per_batch=True) for mask in ("random:seed=1", "none | budget")),
        ]
    ),
    ids=lambda mask: f"{mask.dtype} levels" if isinstance(mask, Tensor) else str(mask),
)
def test_tensors_and_wrappers_of_masks_come_back(tmp_path: Path, mask: Any) -> None:
    net, image = adapted(mask), images(2, 97, 129)
    cs.save(net, tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors", segmenter())
    assert again.mask.spec() == net.mask.spec()
    if isinstance(mask, Tensor):
        assert isinstance(again.mask, FixedMask)
        assert again.mask.levels.dtype == mask.dtype and torch.equal(again.mask.levels, mask)
    else:
        assert isinstance(again.mask, Budget)
    assert torch.equal(again(image)["out"], net(image)["out"])
    assert torch.equal(again.levels, net.levels) and 0 < again.active_fraction < 1


def test_a_wrapper_of_a_function_is_as_little_stored_as_the_function(tmp_path: Path) -> None:
    cs.save(adapted(Budget(lambda image: image[:, 0, ::8, ::8] > 0, 0.4)), tmp_path / "net.safetensors")
    with pytest.raises(cs.FileError, match="a function or provider of your own"):
        cs.load(tmp_path / "net.safetensors", segmenter())


@pytest.mark.parametrize(
    "stored", some(["none", torch.zeros(12, 16, dtype=torch.long), lambda image: None], every=3)
)
def test_a_mask_given_to_load_replaces_the_stored_one(tmp_path: Path, stored: object) -> None:
    cs.save(adapted(stored), tmp_path / "net.safetensors")
    again = cs.load(tmp_path / "net.safetensors", segmenter(), mask=EdgeMask(0.5, 3))
    assert again.mask.spec() == "edges:threshold=0.5,dilation=3"
    again(images(1, 65, 65))
    assert again.levels.shape == (1, 8, 8)


def test_a_mask_given_to_one_call_is_not_saved(tmp_path: Path) -> None:
    net = adapted("none")
    net(images(1, 65, 65), mask="all")
    cs.save(net, tmp_path / "net.safetensors")
    assert cs.load(tmp_path / "net.safetensors", segmenter()).mask.spec() == "none"


# -- the file ------------------------------------------------------------------------------------------


def test_a_file_is_a_json_header_and_tensors_and_nothing_else(tmp_path: Path) -> None:
    net = adapted()
    cs.save(net, tmp_path / "net.safetensors")
    data = (tmp_path / "net.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    metadata = json.loads(header.pop("__metadata__")["cadsurgery"])
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and spans[-1][1] == len(data) - 8 - length
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    assert header.keys() == net.state_dict().keys()
    assert metadata["format"] == 3
    assert metadata["mask"] == net.mask.spec() and metadata["source"] is None
    assert {"cadsurgery", "torch"} <= metadata["versions"].keys()
    assert Plan.from_json(metadata["plan"]) == net.plan


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_write_that_fails_leaves_the_folder_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, existing: bool
) -> None:
    path = tmp_path / "net.safetensors"
    if existing:
        cs.save(adapted("none"), path)
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}

    def broken(tensors: object, file: str, metadata: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise failure

    monkeypatch.setattr(cadsurgery.network.storage, "save_file", broken)
    with pytest.raises(cs.FileError if isinstance(failure, OSError) else KeyboardInterrupt):
        cs.save(adapted("all"), path)
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_a_name_alone_is_a_new_file_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").write_bytes(b"")
    cs.save(adapted(), "net.safetensors")
    assert oct(Path("net.safetensors").stat().st_mode) == oct(Path("other").stat().st_mode)
    assert cs.load("net.safetensors", segmenter()).plan == adapted().plan


# -- weights in and out --------------------------------------------------------------------------------


def test_a_checkpoint_of_the_converted_network_is_a_weights_file(tmp_path: Path) -> None:
    net = adapted()
    cs.save(net, tmp_path / "net.safetensors")
    model = cs.build_model("test_io:segmenter", str(tmp_path / "net.safetensors"))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in model.state_dict().items())


# -- copies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("mask", ["edges:threshold=0.5,dilation=3", torch.zeros(12, 16, dtype=torch.long)])
def test_a_copy_is_the_same_network_and_shares_nothing(duplicate: Any, mask: object) -> None:
    net, image = adapted(mask), images(2, 97, 129)
    expected = net(image)["out"]
    levels = net.levels.clone()
    twin = duplicate(net)
    assert twin.plan == net.plan and twin.geometry == net.geometry
    assert twin.program.net is twin and net.program.net is net
    assert torch.equal(twin(image)["out"], expected)
    twin(image, mask="all")
    assert torch.equal(net.levels, levels)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.mask = "none"
    assert torch.equal(net(image)["out"], expected)
    for training in (True, False):
        assert all(module.training == training for module in duplicate(net.train(training)).modules())


def pooled(net: Any, x: torch.Tensor) -> Any:
    return net.body(nn.functional.max_pool2d(x, 3, 1, 1))


def test_a_network_that_pools_its_image_by_a_function_is_pickled() -> None:
    """torch's `max_pool2d` says another place than its own, by which pickle does not find it."""
    net, image = unverified(Composed(pooled, body=nn.Conv2d(3, 8, 3, 2, 1)), "edges"), images(2, 70, 90)
    for each in (net, net.optimize()):
        assert torch.equal(pickle.loads(pickle.dumps(each))(image), each(image))
