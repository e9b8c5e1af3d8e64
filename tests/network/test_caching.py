"""Stems run once: the body on their outputs is the network, and training it is training the network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import images, relative_error, slow
from networks import Segmenter, Undecided, build, randomise, strided, unverified
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from training import SIZE, Scenes, adaptive

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.finetune import Settings, evaluate, fit

STEM = Settings(steps=4, batch=2, lr=0.05, workers=0, save_every=4, freeze="stem")


class Inplace(nn.Module):
    """The region begins with a map that is changed in place, and holds a constant tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2, 1)
        self.one, self.two = nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.side = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        low = self.two(self.one(x).relu_()) * torch.tensor([0.5])
        up = torch.nn.functional.interpolate(low, size=x.shape[-2:])
        return up + self.side(x)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, dict[str, Any]]] = {
    "basic blocks": (lambda: build("resnet18", by=4), "edges", {}),
    "dilated, a mask that looks ahead": (lambda: build("fcn_resnet50", by=4), "confidence", {}),
    "channels last": (lambda: randomise(timm.create_model("convnext_atto", num_classes=5)), "edges", {}),
    "several maps": (lambda: randomise(timm.create_model("regnety_002")), "random:seed=3", {}),
    "in place": (Inplace, "edges", {"output_stride": (2, 8)}),
}


@pytest.mark.parametrize(
    "name", [name if name in ("basic blocks", "in place") else slow(name) for name in NETWORKS]
)
def test_the_body_of_the_stems_outputs_is_the_network(name: str) -> None:
    """Bit for bit, under any mask, as often as one likes; its levels and its optimised copy too."""
    make, mask, options = NETWORKS[name]
    x = images(2, 65, 97)
    net = unverified(make().eval(), mask, example_input=x[:1], **options)
    body, values = cs.body_of(net), cs.stem_outputs(net, x)
    kept = [value.clone() for value in values]
    with torch.no_grad():
        net(x)
        levels = torch.randint(net.geometry.max_level + 1, net.levels.shape)
        for chosen in (None, "all", "none", levels, None):
            expected, found = net(x, mask=chosen), body(*values, mask=chosen)
            pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
            assert type(found) is type(expected) and all(torch.equal(*pair) for pair in pairs)
            assert torch.equal(body.levels, net.levels)
        fast = body.optimize()(*values)
        assert all(
            relative_error(*pair) < 1e-4 for pair in zip(tree_leaves(fast), tree_leaves(net(x)), strict=True)
        )
    assert all(torch.equal(*pair) for pair in zip(kept, values, strict=True))


def test_a_body_has_the_tensors_of_the_network_and_is_saved_as_it(tmp_path: Path) -> None:
    net = adaptive()
    body = cs.body_of(net)
    assert {name: id(p) for name, p in body.named_parameters()} == {
        name: id(p) for name, p in net.named_parameters()
    }
    with torch.no_grad():
        body.classifier[1].bias += 1.0
    cs.save(body, tmp_path / "body.safetensors")
    again = cs.load(tmp_path / "body.safetensors", model=Segmenter())
    x = images(1, *SIZE)
    with torch.no_grad():
        assert torch.equal(again(x), net.eval()(x))
    copied = copy.deepcopy(body).eval()
    assert torch.equal(copied(*cs.stem_outputs(net, x)), body.eval()(*cs.stem_outputs(net, x)))


def test_the_work_of_a_body_is_that_of_the_network_without_the_stem() -> None:
    net, x = adaptive().eval(), images(1, *SIZE)
    stem = net.macs(x).mask - cs.body_of(net).macs(*cs.stem_outputs(net, x)).mask
    nodes = [decision.node for decision in net.plan.decisions]
    before = nodes[: nodes.index(net.plan.chosen("enter")[0].node) + 1]
    assert stem == sum(layer.mask for layer in net.macs(x).layers if layer.layer in before)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


@pytest.mark.parametrize("changes", [{}, {"objective": "any-budget"}, slow({"ema": 0.5})], ids=str)
def test_training_the_body_is_training_the_network_with_a_fixed_stem(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings, data = replace(STEM, **changes), Scenes()
    whole, parted = adaptive().train(), adaptive().train()
    fit(whole, data, settings, output=tmp_path / "whole", validation=data, device="cpu")
    cached = cs.CachedStem(parted, data)
    outcome = fit(
        cs.body_of(parted), cached, settings, output=tmp_path / "body", validation=cached, device="cpu"
    )
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(parted)[name], value, rtol=1e-5, atol=1e-6)
    assert outcome.after["miou"] == pytest.approx(evaluate(whole, data)["miou"], abs=1e-3)
    again = cs.load(outcome.network, model=Segmenter())
    with torch.no_grad():
        x = images(1, *SIZE)
        assert relative_error(again(x), whole(x)) < 1e-4


def test_a_learned_mask_is_trained_on_a_body(tmp_path: Path) -> None:
    net = adaptive("learned:channels=4/4/4")
    cached = cs.CachedStem(net, Scenes())
    net(torch.zeros(1, 3, *SIZE))  # its estimator is made now
    before = {name: value.clone() for name, value in net.mask.state_dict().items()}
    fit(cs.body_of(net), cached, replace(STEM, objective="blend"), output=tmp_path, device="cpu")
    assert any(not torch.equal(value, before[name]) for name, value in net.mask.state_dict().items())


# The dataset.


def test_whole_images_are_what_the_stem_gives() -> None:
    net, data = adaptive(), Scenes(2)
    cached = cs.CachedStem(net, data)
    assert len(cached) == 2 and cached.classes == data.classes and cached.name.startswith("scenes")
    for (values, labels), (image, expected) in zip([cached[0], cached[1]], data.items, strict=True):
        found = cs.stem_outputs(net, normalise(image, None).unsqueeze(0))
        assert all(torch.equal(*pair) for pair in zip(values, (v[0] for v in found), strict=True))
        assert torch.equal(labels, expected)
    assert net.training == adaptive().training


@pytest.mark.parametrize("size", [(64, 96), (65, 97)], ids=str)
def test_crops_are_cut_from_image_maps_and_labels_alike(size: tuple[int, int]) -> None:
    net = adaptive()
    whole = cs.CachedStem(net, Scenes(2, size))
    cached = cs.CachedStem(net, Scenes(2, size), crop=(32, 48), places=(3, 2))
    assert len(cached) == 2 * 3 * 2
    corners = [(top, left) for top in (0, 16, 32) for left in (0, 48)]
    for index, (top, left) in enumerate(corners):
        (image, features), labels = cached[6 + index]
        values, all_labels = whole[1]
        assert torch.equal(labels, all_labels[top : top + 32, left : left + 48])
        assert torch.equal(image, values[0][:, top : top + 32, left : left + 48])
        high = (slice(top // 4, top // 4 + 8), slice(left // 4, left // 4 + 12))
        assert torch.equal(features, values[1][:, high[0], high[1]])


def test_mirrored_images_are_seen_mirrored() -> None:
    net, data = adaptive(), Scenes(2)
    cached = cs.CachedStem(net, data, flip=True)
    assert len(cached) == 4
    (image, features), labels = cached[3]
    mirrored = normalise(data[1][0].flip(-1), None)
    assert torch.equal(image, mirrored) and torch.equal(labels, data[1][1].flip(-1))
    assert torch.equal(features, cs.stem_outputs(net, mirrored.unsqueeze(0))[1][0])


def test_half_the_memory_is_close_and_has_the_networks_type() -> None:
    net, data = adaptive(), Scenes(2)
    full, half = cs.CachedStem(net, data), cs.CachedStem(net, data, dtype=torch.float16)
    labels = sum(labels.nbytes for _, labels in data.items)
    assert half.bytes - labels == (full.bytes - labels) // 2
    for ours, theirs in zip(half[1][0], full[1][0], strict=True):
        assert ours.dtype == theirs.dtype and 0 < relative_error(ours, theirs) < 1e-3


def test_items_are_not_changed_by_what_is_trained_on_them() -> None:
    torch.manual_seed(0)
    net = unverified(Inplace().eval(), "all", output_stride=(2, 8), example_input=torch.zeros(1, 3, *SIZE))
    cached, body = cs.CachedStem(net, Scenes(1)), cs.body_of(net)
    before = [value.clone() for value in cached[0][0]]
    body(*(value.unsqueeze(0) for value in cached[0][0]))
    assert all(torch.equal(*pair) for pair in zip(before, cached[0][0], strict=True))


def test_another_stem_is_another_run(tmp_path: Path) -> None:
    net = adaptive()
    first = cs.CachedStem(net, Scenes(2))
    with torch.no_grad():
        net.classifier[1].bias += 1.0
    assert cs.CachedStem(net, Scenes(2)).name == first.name
    with torch.no_grad():
        net.backbone[0][0].weight += 1.0
    assert cs.CachedStem(net, Scenes(2)).name != first.name


class Other(Scenes):
    def __init__(self, item: Any) -> None:
        self.items = [item]


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (Scenes(1), {"crop": (30, 32)}, "multiples of 16"),
        (Scenes(1), {"crop": (64, 64)}, "fit the image"),
        (Scenes(1), {"crop": (0, 16)}, "multiples of 16"),
        (Scenes(1), {"crop": (16, 16), "places": (0, 1)}, "1 place or more"),
        (Scenes(1), {"dtype": torch.int8}, "floating"),
        (Other(((torch.zeros(3, 8, 8),), torch.zeros(8, 8))), {}, "sample 0"),
        (Other((torch.zeros(3, 48, 64), torch.zeros(1, 48, 64))), {}, "sample 0"),
    ],
)
def test_what_cannot_be_cached_is_refused(data: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(cs.InvalidInput, match=words):
        cs.CachedStem(adaptive(), data, **options)


def host() -> cs.AdaptiveModel:
    return unverified(Undecided(strided()), "none")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Segmenter, "adaptive as a whole"),
        (host, "adaptive as a whole"),
        (lambda: adaptive().eval().optimize(), "optimised"),
    ],
)
def test_networks_without_a_stem_of_their_own_are_refused(make: Callable[[], Any], words: str) -> None:
    net = make()
    for call in (
        lambda: cs.body_of(net),
        lambda: cs.stem_outputs(net, torch.zeros(1, 3, *SIZE)),
        lambda: cs.CachedStem(net, Scenes(1)),
    ):
        with pytest.raises(cs.InvalidInput, match=words):
            call()
