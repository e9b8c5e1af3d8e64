"""Blended paths, and training of a learned mask on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import images, relative_error, thorough
from networks import Composed, Segmenter, Undecided, randomise, strided, unverified
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from training import SIZE, Scenes, adaptive

import cadsurgery as cs
from cadsurgery.data.images import normalise
from cadsurgery.finetune import Blend, Draw, Objective, Settings, calibrate, fit
from cadsurgery.finetune.groups import freeze_unused, make_groups
from cadsurgery.finetune.objectives import make_objective
from cadsurgery.masks import FineMapSpec, LearnedMask, MaskProvider, TrainableMask
from cadsurgery.network.paths import blend

double = torch.float64


def convert(model: nn.Module, x: Tensor, mask: object = "none", **options: Any) -> cs.AdaptiveModel:
    return unverified(model, mask, example_input=x[:1], **options)


def branches(net: Any, x: Tensor) -> dict[str, Tensor]:
    """Two exits at the native size, and a vector of each image that meets a dense map."""
    low = net.two(net.one(net.stem(x)))
    dense = net.head(torch.cumsum(low, 3)) + net.pooled(low)[:, :4]  # cumsum has no rule
    return {"dense": dense, "low": low}


def branched(inplace: bool = True) -> nn.Module:
    one = nn.ReLU(inplace), nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU(inplace)
    two = nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Hardswish(inplace)
    pooled = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()
    stem, head = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6)), nn.Conv2d(8, 4, 3, padding=1)
    parts = {
        name: nn.Sequential(*layers) for name, layers in (("one", one), ("two", two), ("pooled", pooled))
    }
    return randomise(Composed(branches, stem=stem, head=head, **parts))


@pytest.mark.parametrize("spacing", [1, 4])
def test_a_sample_is_that_of_the_level_that_has_its_weight(spacing: int) -> None:
    """At the fine size and at the native one, where a sample is that of the fine pixel it stands for."""
    x = images(2, 67, 95, double)
    model = branched() if spacing == 4 else nn.Sequential(*(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(3)))
    net = convert(randomise(model).double(), x, output_stride=(2, 8))

    def output(value: Any) -> Tensor:
        return value["low"] if isinstance(value, dict) else value

    with torch.no_grad():
        net(x)
        levels = torch.randint(3, net.levels.shape)
        one_hot = F.one_hot(levels, 3).movedim(-1, 1).double()
        found = output(blend(net, (x,), lambda features, grid: one_hot))
        uniform = torch.stack([output(net(x, mask=torch.full(levels.shape, level))) for level in range(3)])
    chosen = levels[:, ::spacing, ::spacing].unsqueeze(1).expand_as(found)
    assert relative_error(found, uniform.gather(0, chosen.unsqueeze(0))[0]) < 1e-12


def test_vectors_of_images_meet_a_map_with_the_mean_weights() -> None:
    x = images(2, 65, 97, double)
    model = branched().double()
    net = convert(model, x, output_stride=(2, 8))

    def vector(found: dict[str, Tensor]) -> Tensor:
        return found["dense"] - model.head(torch.cumsum(found["low"], 3))

    with torch.no_grad():
        net(x)
        weights = torch.rand(2, 3, *net.levels.shape[1:], dtype=double).softmax(1)
        found = vector(blend(net, (x,), lambda features, grid: weights))
        each = [vector(net(x, mask=torch.full(net.levels.shape, level))) for level in range(3)]
    shares = weights.mean((2, 3))
    expected = sum(shares[:, level, None, None, None] * each[level] for level in range(3))
    assert isinstance(expected, Tensor) and relative_error(found, expected) < 1e-9


@pytest.mark.slow
def test_the_gradient_of_the_weights_is_that_of_finite_differences() -> None:
    x = images(1, 9, 17, double)
    net = convert(branched(inplace=False).double(), x, output_stride=(2, 8)).requires_grad_(False)
    net(x)
    weights = torch.rand(1, 3, *net.levels.shape[1:], dtype=double, requires_grad=True)

    def outputs(weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(tree_leaves(blend(net, (x,), lambda features, grid: weights)))

    assert torch.autograd.gradcheck(outputs, weights)


def test_weights_of_another_shape_are_refused() -> None:
    net = adaptive()
    with pytest.raises(cs.InvalidInput, match="shape"):
        blend(net, (torch.zeros(1, 3, *SIZE),), lambda features, grid: features)


@pytest.mark.parametrize("separate", [True, False])
def test_running_statistics_are_of_the_low_path_or_of_all(separate: bool) -> None:
    """Norms of the region and those of vectors behind it; the stem's see the batch once."""
    x = images(3, 65, 97, double)
    net = convert(branched().double(), x, output_stride=(2, 8)).train()
    net(x)
    size, other = net.levels.shape, copy.deepcopy(net)
    blend(net, (x,), lambda features, grid: torch.full((3, 3, *grid.size), 1 / 3), separate=separate)
    for level in (2,) if separate else range(3):
        other(x, mask=torch.full(size, level))
    ours, theirs = dict(net.named_buffers()), dict(other.named_buffers())
    assert len(ours) == 12
    for name, value in ours.items():
        if not name.startswith("stem"):
            torch.testing.assert_close(value, theirs[name], rtol=1e-9, atol=1e-12)
    assert int(ours["stem.1.num_batches_tracked"]) == 2
    assert all(module.track_running_stats for module in net.modules() if isinstance(module, nn.BatchNorm2d))


# The objective.


def labelled() -> tuple[tuple[Tensor, ...], Tensor]:
    items = [Scenes(2)[index] for index in range(2)]
    return (torch.stack([image for image, _ in items]),), torch.stack([labels for _, labels in items])


LEARNED = "learned:fraction=0.3,channels=8/8/8"
DRAW = Draw(0, 3, (4, 5))


def gradients(objective: Objective, draw: Draw = DRAW) -> tuple[dict[str, Tensor], set[str]]:
    objective.zero_grad()
    found = objective(*labelled(), draw)
    found["loss"].backward()
    moved = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.any()}
    return {name: value.detach() for name, value in found.items()}, moved


@pytest.mark.parametrize("network", ["blend", "mixed", "fixed"])
def test_the_mask_gets_a_gradient_and_the_network_what_is_said(network: str) -> None:
    net = adaptive(LEARNED).train()
    net(labelled()[0][0])
    objective = Blend(net, network=network)
    before = {name: value.clone() for name, value in net.named_buffers()}
    found, moved = gradients(objective)
    estimator = {name for name in moved if "_mask_provider" in name}
    assert len(estimator) == 8
    assert bool(moved - estimator) == (network != "fixed")
    same = all(
        torch.equal(value, before[name])
        for name, value in net.named_buffers()
        if "_mask_provider" not in name  # balanced scores follow their batches
    )
    assert same == (network == "fixed")
    assert ("mixed" in found) == (network == "mixed")
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_loss_is_that_of_its_parts() -> None:
    net = adaptive(LEARNED).eval()
    found, _ = gradients(Blend(net, share="published", weight=3.0, distil=0.5, supervision=2.0))
    parts = 2.0 * found["entropy"] + 3.0 * (found["kept"] - 0.3) ** 2 + 0.5 * found["divergence"]
    torch.testing.assert_close(found["loss"], parts)


def test_the_published_share_is_that_of_another_sample() -> None:
    net, inputs = adaptive(LEARNED).eval(), labelled()[0]
    net(*inputs)
    sampled = [
        gradients(Blend(net, share="published"), Draw(0, step, (step,) * 2))[0]["kept"] for step in (0, 1)
    ]
    assert sampled[0] != sampled[1]


@pytest.mark.slow
def test_balanced_scores_hold_the_share_while_they_are_trained_and_later() -> None:
    """Two levels of four: what is not at level 0 counts by its elements. The share moves in steps of one cell."""
    net, inputs = adaptive(LEARNED).eval(), labelled()[0]
    net(*inputs)
    objective = Blend(net)
    cell = 16 / net.levels.numel() * 2
    for _ in range(80):  # the running statistics follow
        found, _ = gradients(objective)
        assert abs(found["kept"].item() - 0.3) <= cell
    net(*inputs)
    sides = torch.tensor([1.0, 2.0, 4.0])[net.levels.long()]
    kept = ((sides**-2 - 1 / 16) / (1 - 1 / 16)).mean().item()
    assert abs(kept - 0.3) <= 2 * cell


def test_calibration_puts_the_share_of_some_data_on_its_target() -> None:
    """Of images of any size, by the maps that are used later."""
    net = adaptive("learned:fraction=0.4,channels=8/8/8").train()
    torch.manual_seed(0)
    sizes = ((64, 96), (96, 64), (65, 97), (96, 128))
    data = [((torch.randn(3, *size),), torch.zeros(size, dtype=torch.long)) for size in sizes]
    share = calibrate(net, data)
    assert net.training and abs(share - 0.4) < 0.05
    net.eval()
    kept = []
    for (image,), _ in data:
        net(image[None])
        mask = net.mask
        assert isinstance(mask, LearnedMask)
        grid = FineMapSpec.of(net.geometry, 1, tuple(net.levels.shape[1:]), net.plan.strides[0])  # type: ignore[arg-type]
        cells = net.levels[:, :: grid.side, :: grid.side]
        kept.append(mask.kept(F.one_hot(cells.long(), 3).movedim(-1, 1).float() * 9, grid).item())
    assert sum(kept) / len(kept) == pytest.approx(share)


@pytest.mark.parametrize(("mask", "data"), [("edges", [0]), (LEARNED, [])])
def test_what_cannot_be_calibrated_is_refused(mask: str, data: list[Any]) -> None:
    with pytest.raises(cs.InvalidInput, match="calibrat"):
        calibrate(adaptive(mask), data)


def test_balanced_scores_give_no_gradient_to_keeping_more_everywhere() -> None:
    net, inputs = adaptive(LEARNED).eval(), labelled()[0]
    net(*inputs)
    objective = Blend(net)
    gradients(objective)
    mask = net.mask
    assert isinstance(mask, LearnedMask)
    last = mask.estimator[7]
    assert last.bias.grad is not None and last.weight.grad is not None
    assert last.bias.grad.abs().max() < 1e-4 * last.weight.grad.abs().max()


class Scale(MaskProvider):
    """Keeps high where the features, times one number that is trained, are above 0: all that `blend` asks for."""

    ignores_image = True

    def __init__(self, fraction: float = 0.5) -> None:
        super().__init__()
        self.fraction, self.scale = fraction, torch.nn.Parameter(torch.ones(()))

    def logits(self, features: torch.Tensor, grid: FineMapSpec) -> torch.Tensor:
        score = F.avg_pool2d(features.mean(1, keepdim=True), grid.side, ceil_mode=True) * self.scale
        return torch.cat((score, torch.zeros_like(score).expand(-1, grid.max_level, -1, -1)), 1)

    def balanced_logits(self, features: torch.Tensor, grid: FineMapSpec) -> torch.Tensor:
        return self.logits(features, grid)

    def kept(self, logits: torch.Tensor, grid: FineMapSpec, generator: Any = None) -> torch.Tensor:
        return logits.softmax(1)[:, 0].mean()

    def sample(self, logits: torch.Tensor, grid: FineMapSpec, generator: Any = None) -> torch.Tensor:
        soft = logits.softmax(1)
        hard = F.one_hot(soft.argmax(1), soft.shape[1]).movedim(-1, 1) + soft - soft.detach()
        fine = hard.repeat_interleave(grid.side, 2).repeat_interleave(grid.side, 3)
        return fine[..., : grid.size[0], : grid.size[1]]

    def balance(self, logits: Any) -> float:
        return sum(float(self.kept(*entry)) for entry in logits) / len(logits)

    def forward(self, image: Any, features: torch.Tensor, grid: FineMapSpec) -> torch.Tensor:
        return self.sample(self.logits(features, grid), grid).argmax(1)


def test_blend_trains_any_mask_that_has_what_it_asks_for() -> None:
    net, inputs = adaptive(Scale(0.4)).eval(), labelled()[0]
    assert isinstance(net.mask, TrainableMask) and not isinstance(cs.adaptify, TrainableMask)
    gradients(Blend(net))
    assert isinstance(net.mask, Scale) and net.mask.scale.grad is not None and net.mask.scale.grad != 0
    assert 0 < calibrate(net, [((inputs[0][0],), labelled()[1][0])]) < 1


def test_noise_belongs_to_an_image_whatever_batch_it_is_in() -> None:
    """One batch is the mean of its images one by one, as several processes or accumulated passes have them."""
    net, ((image,), labels) = adaptive(LEARNED).eval(), labelled()
    objective = Blend(net, share="published", weight=0.0)
    with torch.no_grad():
        both = objective((image,), labels, Draw(0, 0, (4, 9)))["loss"]
        alone = [
            objective((image[at : at + 1],), labels[at : at + 1], Draw(0, 0, (position,)))["loss"]
            for at, position in enumerate((4, 9))
        ]
        same = objective((image,), labels, Draw(0, 0, (4, 4)))["loss"]
    torch.testing.assert_close(both, torch.stack(alone).mean())
    assert not torch.equal(both, same)


def test_under_other_objectives_a_learned_mask_is_found_to_have_no_gradient() -> None:
    from cadsurgery.finetune.batches import Batch

    inputs, labels = labelled()
    for name in ("mixed", "any-budget"):
        net = adaptive(LEARNED).train()
        net(*inputs)
        objective = make_objective(name, net, {})
        freeze_unused(objective, Batch(inputs, labels, (0, 1), (0, 1)), 0)
        groups = {group.name: group for group in make_groups(objective.own_parameters(), net, Settings())}
        assert "mask" not in groups
        assert {name.partition(".")[2] for name in groups["fixed"].parameters} == {
            f"_mask_provider.estimator.{layer}.{part}"
            for layer in (0, 2, 5, 7)
            for part in ("weight", "bias")
        }


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: adaptive("edges"), {}, "learned"),
        (Segmenter, {}, "learned"),
        (lambda: unverified(Undecided(strided()), "none"), {}, "adaptive as a whole"),
        (lambda: adaptive(LEARNED), {"statistics": "own"}, "separate"),
        (lambda: adaptive(LEARNED), {"share": "all"}, "balanced"),
        (lambda: adaptive(LEARNED), {"network": "dense"}, "fixed"),
    ],
)
def test_what_cannot_be_blended_is_refused(
    make: Callable[[], nn.Module], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(cs.CadError, match=words):
        Blend(make(), **options)


def test_a_learned_mask_inside_wrappers_is_the_one_that_is_trained() -> None:
    net = adaptive(f"{LEARNED} | dilate:size=3").train()
    _, moved = gradients(Blend(net))
    assert any("_mask_provider" in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["blend", thorough("mixed")])
@pytest.mark.parametrize("fraction", [0.35])
def test_training_drives_the_share_to_the_target(tmp_path: Path, network: str, fraction: float) -> None:
    net = adaptive(f"learned:fraction={fraction},channels=8/8/8")
    settings = Settings(
        **{"steps": 100, "batch": 4, "lr": 0.05, "mask_factor": 0.1, "workers": 0, "save_every": 100},
        **{"objective": "blend", "objective_options": {"network": network, "weight": 20.0}},
    )
    scenes = Scenes(8)
    fit(net, scenes, settings, output=tmp_path, device="cpu")
    kept = []
    for image, _ in scenes.items:
        net(normalise(image, None).unsqueeze(0))
        sides = torch.tensor([1.0, 2.0, 4.0])[net.levels.long()]
        kept.append(float(((sides**-2 - 1 / 16) / (1 - 1 / 16)).mean()))
    assert abs(sum(kept) / len(kept) - fraction) < 0.05
    again = cs.load(tmp_path / "net.safetensors", model=Segmenter())
    assert isinstance(again.mask, LearnedMask)
    image = scenes.items[0][0].unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(image), net(image)) and torch.equal(again.levels, net.levels)
