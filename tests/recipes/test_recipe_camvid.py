"""The CamVid recipe: the body on the outputs of the fixed stem is the network, and training it is training that."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import images
from networks import Segmenter, build, unverified
from training import Scenes, adaptive

import cadsurgery as cs
from cadsurgery.finetune import Settings, fit
from recipes.camvid_mobilenetv2.stem import CachedStem, body_of, stem_outputs


@pytest.mark.slow
@torch.no_grad()
def test_the_body_of_the_stems_outputs_is_the_network_under_any_mask() -> None:
    x = images(2, 65, 97)
    net = unverified(build("mobilenet_v2", by=4), "edges", example_input=x[:1])
    body, values = body_of(net), stem_outputs(net, x)
    kept = [value.clone() for value in values]
    for mask in (None, "all", "none", "random:seed=3"):
        assert torch.equal(body(*values, mask=mask), net(x, mask=mask))
    torch.testing.assert_close(body.optimize()(*values), net(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(kept, values, strict=True))


def test_training_the_body_is_training_the_network_with_a_fixed_stem(tmp_path: Path) -> None:
    settings = Settings(steps=3, batch=2, lr=0.01, workers=0, save_every=3, freeze="stem")
    whole, parted, data = adaptive().train(), adaptive().train(), Scenes()
    fit(whole, data, settings, output=tmp_path / "whole", device="cpu")
    fit(body_of(parted), CachedStem(parted, data), settings, output=tmp_path / "body", device="cpu")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 96), (65, 97)], ids=str)
def test_crops_are_cut_from_image_maps_and_labels_alike_also_mirrored(size: tuple[int, int]) -> None:
    net, data = adaptive(), Scenes(2, size)
    whole, cached = CachedStem(net, data), CachedStem(net, data, (32, 48), (3, 2))
    assert len(whole) == 2 and len(cached) == 2 * 2 * 3 * 2

    for index, (top, left) in enumerate(product((0, 16, 32), (0, 48))):
        (image, features), labels = cached[12 + index]
        values, all_labels = whole[1]
        fine, of_map = (
            (..., slice(top // side, (top + 32) // side), slice(left // side, (left + 48) // side))
            for side in (1, 4)
        )
        assert torch.equal(labels, all_labels[fine]) and torch.equal(image, values[0][fine])
        assert torch.equal(features, values[1][of_map])
        (mirrored, _), _ = cached[18 + index]
        assert torch.equal(mirrored, values[0].flip(-1)[fine])


def test_a_body_is_saved_as_the_network(tmp_path: Path) -> None:
    net, x = adaptive().eval(), images(1, 48, 64)
    cs.save(body_of(net), tmp_path / "net.safetensors")
    with torch.no_grad():
        assert torch.equal(cs.load(tmp_path / "net.safetensors", Segmenter())(x), net(x))
