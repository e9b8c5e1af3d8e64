"""Python of plain networks: further arguments, types, item assignment, channels shuffled together with the batch."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same, covering, images, random_levels, some
from networks import conv_norm, randomise, unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.following.example_tracer import symbols_in_python
from cadsurgery.surgery.flow import flow_forward, position_mixers
from cadsurgery.surgery.rules import read

EXACT = 1e-4
SIZES = ((64, 96), (71, 85))
pytestmark = pytest.mark.filterwarnings("ignore:no mask can improve")


block = partial(conv_norm, stride=2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rest, self.head = (
            block(3, 8),
            nn.Sequential(block(8, 8), block(8, 8)),
            nn.Conv2d(8, 5, 1),
        )

    def encode(self, x: Tensor) -> Tensor:
        return self.rest(self.stem(x))


class FurtherArguments(Encoder):
    def forward(self, imgs: Tensor, **kw: Any) -> dict[str, Tensor]:
        res = {"features": self.encode(imgs)}
        res = dict(res, scores=self.head(res["features"]), **kw)
        return dict(res, **{"half": res["scores"] / 2})


def checked(x: Any) -> Any:
    """A function that the network's module imports, as it were: it asks for types, too."""
    if type(x) in (tuple, list):
        raise TypeError("several")
    assert type(x) is Tensor and isinstance(x, Tensor), "a tensor is expected"
    return x


class Types(Encoder):
    def forward(self, x: Any) -> Tensor:
        if not torch.is_tensor(x) or type(x) is list:
            x = x[0]
        y = checked(self.encode(x))
        return self.head(y) if type(y) is torch.Tensor and not issubclass(type(y), nn.Parameter) else y


class PixelDifferences(Encoder):
    """Kernels of 5x5 built of weights of 3x3 (Su et al. 2021): radial differences of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        weights = self.weight.view(shape[0], shape[1], -1)
        buffer = torch.zeros(shape[0], shape[1], 5 * 5).to(weights)
        buffer[:, :, [0, 2, 4, 10, 14, 20, 22, 24]] = weights[:, :, 1:]
        buffer[:, :, [6, 7, 8, 11, 13, 16, 17, 18]] = -weights[:, :, 1:]
        buffer[:, :, 12] = 0
        return self.head(F.conv2d(self.encode(x), buffer.view(shape[0], shape[1], 5, 5), stride=2, padding=2))


class Boxes(Encoder):
    """Numbers of each position, changed in place: by assignment, by operators and by methods of slices."""

    def forward(self, x: Tensor) -> Tensor:
        boxes = self.head(self.encode(x)).flatten(2).permute(0, 2, 1).contiguous()
        boxes[:, :, 0] = torch.clamp(boxes[:, :, 0], 0, 0.1)
        boxes[..., 1:3] = boxes[..., 1:3].exp() * 2
        boxes[:, :, 3] += boxes[:, :, 0]
        boxes[:, :, 0::2].clamp_(max=0.05)
        return boxes


class InTheMiddle(Encoder):
    def forward(self, x: Tensor) -> Tensor:
        x = self.rest[0](self.stem(x)).clone()
        x[:, 0] = 0.5
        x[:, 1:3] = torch.tanh(x[:, 1:3])
        x[:, 3:5].mul_(2)
        return self.head(self.rest[1](x))


class Shuffle(nn.Module):
    """Channels in two halves that are shuffled, by reshapes in which the batch is part of an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.rest = (
            nn.Sequential(block(3, 8), block(8, 8)),
            conv_norm(4, 4),
            block(8, 16),
        )
        self.head = nn.Conv2d(16, 3, 1)

    def shuffle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, c, h, w = x.data.size()
        x = x.reshape(b * c // 2, 2, h * w).permute(1, 0, 2).reshape(2, -1, c // 2, h, w)
        return x[0], x[1]

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.shuffle(self.stem(x))
        return self.head(self.rest(torch.cat([self.left(left), right], 1)))


class ShuffleByViews(Shuffle):
    """Groups by way of the batch, one after another, and views of maps that need not lie as torch's do."""

    def shuffle(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, c, h, w = x.shape
        x = (
            x.view(b * 2, c // 2, h * w)
            .view(b, 2, c // 2, h, w)
            .transpose(1, 2)
            .contiguous()
            .view(b, c, h, w)
        )
        return x[:, : c // 2], x[:, c // 2 :]


class KeepsInPlaceOf(Encoder):
    """Holds what it computes of a tensor in the place of that tensor, and asks a table for the number of axes."""

    def __init__(self, is_buffer: bool) -> None:
        super().__init__()
        mean = torch.full((1, 3, 1, 1), 0.4)
        if is_buffer:
            self.register_buffer("mean", mean)
        else:
            self.mean = mean
        self.names = {4: "map"}

    def forward(self, x: Tensor) -> Tensor:
        self.mean = self.mean.type_as(x)
        y = self.encode(x - self.mean)
        return self.head(y) if self.names[y.ndim] == "map" else y


class NormOfTokens(Encoder):
    """Normalises tokens whose batch and places are one axis, and gives them the shape of the tokens again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encode(x).flatten(2).transpose(1, 2)
        return tokens + self.norm(tokens.flatten(0, 1)).reshape_as(tokens)


def filled_in(forward: Any) -> Any:
    """A decorator that sets an argument by name, as transformers' backbones have."""

    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["scale"] = 2
        return forward(self, *args, **kwargs)

    return wrapper


class FilledIn(Encoder):
    @filled_in
    def forward(self, x: Tensor, scale: int | None = None, **more: Any) -> Tensor:
        return self.head(self.encode(x)) * (scale or 1)


class NumbersOfNumpy(Encoder):
    """Sizes and factors computed by numpy, of which nothing depends on the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        size = [2 * int(numpy.ceil(length / 16)) for length in x.shape[2:]]
        y = numpy.float32(2) * self.head(self.encode(x)) * numpy.sqrt(2)
        return F.interpolate(y, size)


class AssignsByMask(Encoder):
    """Pixels chosen by a mask get other values, and the size of the map, which stays, decides about padding."""

    def forward(self, x: Tensor) -> Tensor:
        hue = torch.Tensor(x.shape[0], x.shape[2], x.shape[3]).fill_(0.5)
        hue[x[:, 0] > 0] = (x[:, 0] / 2)[x[:, 0] > 0]
        x = x * hue.unsqueeze(1)
        if x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, 1))
        return self.head(self.encode(x))


class Fourier(Encoder):
    """A block that filters a map by its spectrum."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.encode(x)
        filtered = torch.fft.irfftn(torch.fft.rfftn(y, dim=(2, 3)) / 2, s=y.shape[2:], dim=(2, 3))
        return self.head(y + filtered)


class Layouts(Encoder):
    """Asks for a memory layout, of which rows have one."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).contiguous(memory_format=torch.channels_last)
        y = self.rest(y.to(memory_format=torch.channels_last)).clone(memory_format=torch.channels_last)
        return self.head(y + torch.ones_like(y, memory_format=torch.channels_last))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "further arguments": FurtherArguments,
    "types": Types,
    "pixel differences": PixelDifferences,
    "boxes": Boxes,
    "in the middle": InTheMiddle,
    "shuffle": Shuffle,
    "shuffle by views": ShuffleByViews,
    "a buffer kept in its own place": partial(KeepsInPlaceOf, True),
    "an attribute kept in its own place": partial(KeepsInPlaceOf, False),
    "a value in the shape of a map": NormOfTokens,
    "a decorator that sets an argument": FilledIn,
    "numbers of numpy": NumbersOfNumpy,
    "pixels assigned by a mask": AssignsByMask,
    "a Fourier transform": Fourier,
    "memory layouts": Layouts,
}


@pytest.mark.parametrize("name", some(NETWORKS))
@torch.no_grad()
def test_it_converts_and_is_the_network(name: str) -> None:
    """With other weights than those of the conversion, at other sizes and batches; copies and pickles of it too."""
    net = unverified(randomise(NETWORKS[name]()).eval(), "none", outputs="native")
    assert net.plan.share("adapt", "keep") > 0.1
    torch.manual_seed(1)
    model = randomise(NETWORKS[name]()).eval()
    net.load_state_dict(model.state_dict())
    for batch, size in enumerate(SIZES, 2):
        x = images(batch, *size)
        for each in (net, net.optimize(), copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert_same(each(x), model(x), EXACT)
    levels = torch.ones_like(net.levels)
    assert_same(net(x[:1], mask=levels[:1]), _first(net(x, mask=levels)), EXACT)


@pytest.mark.parametrize(("network", "batch"), covering([Shuffle, ShuffleByViews], [1, 2, 3]))
@torch.no_grad()
def test_a_shuffle_that_takes_the_batch_with_it_is_in_the_region(network: type[Shuffle], batch: int) -> None:
    """Whatever batch it is converted on; in mixed resolution a batch is its images."""
    model = randomise(network()).eval()
    net = unverified(model, "none", output_stride=(2, 8), example_input=images(batch, 64, 80))
    assert not any(decision.reason for decision in net.plan.chosen("barrier"))
    x = images(2, 66, 71)
    net(x)
    levels = random_levels(2, tuple(net.levels.shape[1:]), net.plan.stage_strides)
    each = [net(x[i : i + 1], mask=levels[i : i + 1]) for i in range(2)]
    assert_same(net(x, mask=levels), torch.cat(each), EXACT)
    assert_same(net(x)[..., ::4, ::4], model(x), EXACT)


def _first(output: Any) -> Any:
    return {k: v[:1] for k, v in output.items()} if isinstance(output, dict) else output[:1]


def test_further_arguments_may_be_given_later() -> None:
    model, x = FurtherArguments().eval(), images(1, 64, 64)
    net = cs.adaptify(model, "none", outputs="native")
    for one in (net, net.optimize()):
        ours, theirs = one(x, path="image.png", scale=2.0), model(x, path="image.png", scale=2.0)
        assert list(ours) == list(theirs) and (ours["path"], ours["scale"]) == ("image.png", 2.0)
        assert_same(ours["half"], theirs["half"])
        assert list(one(x)) == ["features", "scores", "half"]


def test_assigned_weights_have_the_gradients_of_the_original() -> None:
    model = randomise(PixelDifferences()).double().eval()
    net = unverified(copy.deepcopy(model), "none", outputs="native")
    x = images(2, 64, 70, torch.float64)
    for each in (model, net):
        each(x).square().sum().backward()
    assert_same(net.weight.grad, model.weight.grad, 1e-9)


class Remembers(Encoder):
    """Keeps a value in a global of its module when it first runs, as caches of tables do."""

    def forward(self, x: Tensor) -> Tensor:
        globals().setdefault("_remembered", 7)
        return self.head(decorated(self.encode(x)))


@torch.no_grad()
def decorated(x: Tensor) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def test_tracing_leaves_what_the_networks_module_remembers_and_torchs_modules_alone() -> None:
    globals().pop("_remembered", None)
    before, torchs = {**globals()}, {**vars(torch.utils._contextlib)}
    with symbols_in_python(Remembers()):
        assert vars(torch.utils._contextlib) == torchs and "isinstance" in globals()
    model = Remembers().eval()
    cs.adaptify(model)
    assert globals().pop("_remembered") == 7 and {**globals()} == before


class DecidesByValues(nn.Module):
    """A plain network in the middle of decisions by values."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.net = nn.Conv2d(3, 3, 1), Encoder()
        self.net.forward = self.net.encode  # type: ignore[method-assign]
        self.wrapped = nn.ModuleDict({"trunk": nn.Sequential(block(3, 8), block(8, 32), block(32, 32))})

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if float(self.small(x).mean()) > 0 else self.wrapped["trunk"](x)


@pytest.mark.slow
def test_the_largest_part_that_reads_the_image_is_converted_inside_a_network_that_decides_by_values() -> None:
    model, x = DecidesByValues().eval(), images(2, 65, 70)
    net = cs.adaptify(model, "none")
    assert net.plan.part in ("net", "wrapped.trunk") and net.hosts_part
    with torch.no_grad():
        for image in (x, -x, x - 3):
            assert_same(net(image), model(image), EXACT)


class Pairs(nn.Module):
    """Reads two images (B, T, C, H, W) by one encoder, as change detection does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Sequential(block(4, 8), block(8, 32)), nn.Conv2d(32, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.encoder(x[:, 0]), self.encoder(x[:, 1])
        return self.head((after - before).abs())


@pytest.mark.parametrize("example", ["tensor", "tuple", "dictionary"])
def test_the_encoder_of_a_network_of_several_images_is_converted_inside_it(
    example: str, tmp_path: Path
) -> None:
    model, x = Pairs().eval(), torch.rand(2, 2, 4, 64, 96)
    given: Any = {"tensor": x, "tuple": (x,), "dictionary": {"x": x}}[example]
    net = cs.adaptify(model, "none", example_input=given)
    assert net.plan.part == "encoder" and net.plan.example_shape[1:] == (4, 64, 96)
    net(x, mask=torch.ones(2, 64, 96, dtype=torch.bool))  # one map for each pair
    assert net.active_fraction == 1
    for size in SIZES:
        pair = torch.rand(3, 2, 4, *size)
        assert_same(net(pair), model(pair), EXACT)
    if example == "tensor":
        cs.save(net, tmp_path / "net.safetensors")
        loaded = cs.load(tmp_path / "net.safetensors", model=Pairs())
        assert loaded.plan == net.plan
        assert_same(loaded(x), model(x), EXACT)
        with pytest.raises(cs.FileError, match="has no encoder"):
            cs.load(tmp_path / "net.safetensors", model=Encoder())
        expected = model(x)
        model.encoder = cs.adaptify(model.encoder, "none", outputs="native")  # takes the calls of its owner
        assert_same(model(x), expected, EXACT)


class Extractor(nn.ModuleDict):
    """A dictionary of modules with a forward of its own, as torchvision's getters of inner layers are."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, layer in self.items():
            x = found[name] = layer(x)
        return found


class Detector(nn.Module):
    """A detector whose forward ends in numpy, in threads, unless an attribute or argument asks for the map."""

    def __init__(self) -> None:
        super().__init__()
        self.extractor = Extractor({"0": block(3, 8), "1": block(8, 32), "2": block(32, 32)})
        self.head, self.exportable = nn.Conv2d(32, 2, 1), False

    def forward(self, x: Tensor, only_map: bool = False) -> dict[str, Any]:
        scores = self.head(self.extractor(x)["2"])
        if self.exportable or only_map:
            return {"scores": scores}
        maps = scores.detach().cpu().permute(0, 2, 3, 1).numpy()
        with ThreadPoolExecutor(1) as pool:
            return {"scores": scores, "boxes": list(pool.map(boxes_of, [maps[0]]))}


def boxes_of(scores: Any) -> list[Any]:
    return [(scores[..., place] >= 0).astype(numpy.uint8) for place in range(scores.shape[-1])]


class AsArray(Detector):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        scores = self.head(self.extractor(x)["2"])
        return {"scores": scores, "largest": numpy.asarray(scores.detach()).max()}


class AsArrays(Detector):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return self.head(self.extractor(x)["2"]).detach().numpy()


@pytest.mark.parametrize("kind", [AsArray, AsArrays])
def test_the_part_of_a_detector_that_ends_in_numpy_is_converted_inside_it(kind: type[nn.Module]) -> None:
    model, x = kind().eval(), images(2, 64, 96)
    net = cs.adaptify(model, "none")
    assert net.plan.part == "extractor" and net.plan.returned == "native"
    ours, expected = net(x), model(x)
    if kind is AsArray:
        assert ours["largest"] == pytest.approx(expected["largest"], rel=EXACT)
        ours, expected = ours["scores"], expected["scores"]
    assert_same(torch.as_tensor(ours), torch.as_tensor(expected), EXACT)


def test_a_detector_that_ends_in_numpy_is_told_what_makes_it_return_its_map() -> None:
    model, x = Detector().eval(), images(2, 64, 96)
    with pytest.warns(
        cs.CadWarning, match=r"only its extractor(.|\n)*whole network after model.exportable = True"
    ):
        net = cs.adaptify(model, "none")
    assert_same(net(x)["scores"], model(x)["scores"], EXACT)
    assert not model.exportable, "the network is as it was"
    model.exportable = True
    whole = cs.adaptify(model, "none", outputs="native")
    assert not whole.plan.part
    assert_same(whole(x)["scores"], model(x)["scores"], EXACT)


class ByArgument(Detector):
    def forward(self, x: Tensor, only_map: bool = False) -> dict[str, Any]:
        return Detector.forward(self, x, only_map)


def test_a_detector_that_ends_in_numpy_is_told_the_argument_with_which_it_returns_its_map() -> None:
    model, x = ByArgument().eval(), images(2, 64, 96)
    with pytest.warns(cs.CadWarning, match=r'example_input=\{"x": images, "only_map": True\}'):
        cs.adaptify(model, example_input=x)
    net = cs.adaptify(model, "none", outputs="native", example_input={"x": x, "only_map": True})
    assert_same(net(x, only_map=True)["scores"], model(x, True)["scores"], EXACT)


class OfOneBatch(Encoder):
    """Gathers what it finds in each image, which decides by values unless there is one image."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(self.stem, self.rest)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.head(self.trunk(x))
        found = [one[:, one[0] > 0] for one in maps]
        most = max(points.shape[1] for points in found)
        return torch.stack([F.pad(points, (0, most - points.shape[1])) for points in found])


def test_a_network_that_decides_by_values_for_several_images_converts_its_part_on_one_image() -> None:
    model = OfOneBatch().eval()
    net = cs.adaptify(model, "none", example_input=images(1, 64, 96))
    assert net.plan.part == "trunk"
    for batch in (1, 3):
        assert_same(net(x := images(batch, 64, 96)), model(x), EXACT)


class OwnKernels(nn.Module):
    """Convolutions by torch's functions, with weights of the network itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.randn(8, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for kernel in (self.first, self.second):
            x = F.conv2d(x, kernel, stride=2, padding=1).relu()
        return x


class GreyGradients(Encoder):
    """A grey image with its square, as handcrafted features are put before a network's first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.encode(torch.cat([x, x.square()], 1))


class Missing:
    """Stands for an optional package that is not installed: every attribute raises."""

    def __getattr__(self, name: str) -> Any:
        raise OSError(f"install the package that has {name}")


@pytest.mark.parametrize(("kind", "channels"), [(OwnKernels, 4), (GreyGradients, 1)])
def test_images_are_found_for_networks_without_a_telling_first_layer(
    kind: type[nn.Module], channels: int
) -> None:
    """And it may hold an object of which nothing can be asked."""
    model, x = kind().eval(), torch.rand(2, channels, 71, 85)
    model.optional = Missing()  # type: ignore[assignment]
    net = cs.adaptify(model, "none", outputs="native")
    assert_same(net(x), model(x), EXACT)
    assert copy.deepcopy(net).optional is model.optional and net.macs(x).mask


@torch.no_grad()
def test_memory_layouts_are_none_of_rows_under_floors() -> None:
    net, x = cs.adaptify(model := Layouts().eval(), "all", outputs="native", coarsest=16), images(2, 71, 85)
    assert_same(net(x), model(x), EXACT)


def test_a_fourier_transform_joins_all_positions() -> None:
    joined = {node.target for node in position_mixers(flow_forward(read(Fourier().eval(), None)))}
    assert {torch.fft.rfftn, torch.fft.irfftn} <= joined


def hands_on(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        as_tuple = kwargs.pop("as_tuple", False)
        output = forward(self, *args, **kwargs)
        return (output,) if as_tuple else output

    return wrapper


class Decorated(Encoder):
    @hands_on
    def forward(self, pixels: Tensor | None = None, gain: float = 1.0) -> Tensor:
        assert pixels is not None
        return self.head(self.encode(pixels)) * gain


class HandsOn(Encoder):
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.predict(x, *args, **kwargs)

    def predict(self, x: Tensor, gain: float = 1.0, shift: float = 0.0) -> Tensor:
        return self.head(self.encode(x)) * gain + shift


class OfImages(Encoder):
    def forward(self, *pictures: Tensor) -> list[Tensor]:
        return [self.head(self.encode(one)) for one in pictures]


@pytest.mark.parametrize("options", [{"output_stride": (1, 4)}, {"coarsest": 16}], ids=["strides", "floors"])
@pytest.mark.parametrize("kind", [Decorated, HandsOn, OfImages])
@torch.no_grad()
def test_forwards_that_hand_on_their_arguments_are_followed(kind: type[Encoder], options: Any) -> None:
    """No example is needed: the image is the first argument."""
    model, x = randomise(kind()).eval(), images(2, 61, 83)
    net = unverified(model, "all" if "coarsest" in options else "none", outputs="native", **options)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((x,), {})]
    calls += [((x, x.flip(3)), {})] if kind is OfImages else [((x, 2.0), {}), ((x,), {"gain": 3.0})]
    for args, kwargs in calls:
        assert_same(net(*args, **kwargs), model(*args, **kwargs))


class Aliased(Encoder):
    """Changes a value behind the back of another name of it."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(self.encode(x))
        rows = y.permute(0, 2, 3, 1)
        rows[..., 0] = 3.0
        return y


class OnlyArrays(Encoder):
    def forward(self, x: Tensor) -> Any:
        for layer in (self.stem, *self.rest, self.head):
            x = layer(x)
        return x.detach().numpy()


class DecidesByValuesAlone(Encoder):
    """How often it runs a layer depends on the image, which its conversion could take for a size."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) * torch.tensor(2.0)
        for _ in range(len(x.flatten().nonzero()) % 3):
            x = self.rest[0](x)
        return x


class OfDictionary(DecidesByValuesAlone):
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return super().forward(inputs["image"])


class Joined(Pairs):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder:
            x = torch.stack([layer(image) for image in x.unbind(1)], 1)
        return x


@pytest.mark.parametrize(
    ("kind", "example", "words"),
    [
        (Aliased, None, "behind its back"),
        (Pairs, None, r"model.encoder = cs.adaptify\(model.encoder"),  # the part that reads one image
        (Joined, torch.rand(2, 2, 4, 64, 96), "images of a pair or clip come in one tensor"),
        (OnlyArrays, None, r"returns no tensors(.|\n)*returns ndarray"),
        (DecidesByValuesAlone, None, r"decides by values(.|\n)*test_plain_python.py"),
        (OfDictionary, ({"image": images(1, 40, 56)},), r"decides by values(.|\n)*test_plain_python.py"),
    ],
)
def test_what_cannot_be_converted_says_why(kind: type[nn.Module], example: Any, words: str) -> None:
    with pytest.raises(cs.CannotConvert, match=words):
        cs.adaptify(kind().eval(), example_input=example)
