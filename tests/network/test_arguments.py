"""Networks that take more than an image, pictures of other channels and layouts, and what is made in inference mode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import covering, images, relative_error, slow, some
from networks import Encoded, Segmenter, build, conv_norm, randomise, seeded, unverified
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.data.images import street_scene
from cadsurgery.elements.backends.choose import Misfit
from cadsurgery.elements.elements import Elements
from cadsurgery.elements.kernel_map import Window
from cadsurgery.elements.windows import conv2d


class Base(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem, self.head = conv_norm(channels, 8, 2), nn.Conv2d(8, 2, 1)
        self.body = nn.Sequential(conv_norm(8, 8, 2), conv_norm(8, 8), conv_norm(8, 8, 2), conv_norm(8, 8))

    def run(self, x):
        y = self.head(self.body(self.stem(x)))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


class Two(Base):
    def __init__(self) -> None:
        super().__init__(6)

    def forward(self, image, before):
        return self.run(torch.cat([image, before], 1))


class Conditioned(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(5, 8)

    def forward(self, condition, image):
        y = self.body(self.stem(image))
        return self.head(y * self.scale(condition)[:, :, None, None])


class Named(Base):
    """An optional argument between, the image by name."""

    def forward(self, prior=None, *, image):
        y = self.run(image)
        return y if prior is None else y + prior


class FromDictionary(Base):
    def forward(self, batch):
        return {"logits": self.run(batch["image"]) + batch["bias"].view(-1, 1, 1, 1)}


def image(channels: int, size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, channels, *size)


# Name: the network, and the arguments of a call for an image of a size.
CASES = {
    "two images": (Two, lambda size: (image(3, size), image(3, size))),
    "a vector first": (Conditioned, lambda size: (torch.rand(2, 5), image(3, size))),
    "the image by name": (Named, lambda size: {"image": image(3, size)}),
    "an optional one": (Named, lambda size: {"prior": image(2, size), "image": image(3, size)}),
    "a dictionary": (FromDictionary, lambda size: ({"bias": torch.rand(2), "image": image(3, size)},)),
}


def call(net, arguments, **more):
    if isinstance(arguments, dict):
        return net(**arguments, **more)
    return net(*arguments, **more)


def make(case: str):
    torch.manual_seed(0)
    kind, arguments = CASES[case]
    return kind().eval(), arguments


@pytest.mark.parametrize("case", some(CASES))
@pytest.mark.filterwarnings("ignore:no mask can improve")
def test_a_network_with_other_arguments_is_the_original_at_its_own_level(case, tmp_path):
    model, arguments = make(case)
    net = unverified(model, mask="none", example_input=arguments((97, 129)), outputs="native")
    assert net.plan.share("adapt", "keep") > 0.3
    with torch.no_grad():
        for size in ((97, 129), (130, 71)):
            torch.testing.assert_close(
                *(call(run, arguments_of) for arguments_of in [arguments(size)] for run in (net, model)),
                rtol=1e-4,
                atol=1e-5,
            )
    cs.save(net, tmp_path / "net.safetensors")
    loaded = cs.load(tmp_path / "net.safetensors", kind_of(case)())
    given = arguments((97, 129))
    with torch.no_grad():
        for run in (loaded, net.optimize()):
            torch.testing.assert_close(call(run, given), call(model, given), rtol=1e-4, atol=1e-5)
    high, low = (call(net.macs, given, mask=mask).mask for mask in ("all", "none"))
    assert high > low and net.levels.shape[0] == 2
    assert cs.plan(model, example_input=arguments((64, 96))).output_stride == net.plan.output_stride


def kind_of(case: str):
    return CASES[case][0]


def test_what_no_call_is_made_of_is_refused():
    model = make("two images")[0]
    x = image(3, (64, 96))
    with pytest.raises(cs.InvalidInput, match=r"not called with these arguments.*\n.*before.*\n.*dictionary"):
        cs.plan(model, example_input=x)
    with pytest.raises(cs.InvalidInput, match=r"not called with these.*\n.*argument"):
        cs.plan(model, example_input={"image": x, "other": x})
    with pytest.raises(cs.InvalidInput, match=r"holds .* of type object"):
        cs.plan(model, example_input=(x, object()))
    with pytest.raises(cs.InvalidInput, match="example_input is"):
        cs.plan(model, example_input=(x[0], x[0]))
    with pytest.raises(cs.CannotConvert, match="all arguments of a call as a tuple or a dictionary"):
        cs.plan(model)


# -- transforms of torch, devices without values, state dicts of other networks -------------------------


TRANSFORMS: dict[str, Any] = {
    "grad": lambda net, x: torch.func.grad(lambda image: net(image).sum())(x),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x,)),
    "vmap": lambda net, x: torch.func.vmap(lambda image: net(image[None])[0])(x),
}


@pytest.mark.parametrize("name", some(TRANSFORMS, every=3))
def test_transforms_of_images_are_refused_with_what_to_use(name: str) -> None:
    net = unverified(build("resnet18", by=4), mask="edges", example_input=torch.rand(1, 3, 64, 64))
    with pytest.raises(cs.InvalidInput, match=r"torch\.func transforms the image") as caught:
        TRANSFORMS[name](net, torch.rand(2, 3, 64, 64))
    assert "torch.autograd.grad" in caught.value.next and "functional_call" in caught.value.next


@pytest.mark.parametrize(("compiler", "optimised"), covering(["trace", "script"], [False, True]))
def test_torchscript_is_refused_with_what_to_use(compiler: str, optimised: bool) -> None:
    """Before a first call and after it, and as a part of another module."""
    net: nn.Module = unverified(build("resnet18", by=4), mask="edges", example_input=torch.rand(1, 3, 64, 64))
    net, image = net.optimize() if optimised else net, torch.rand(1, 3, 64, 64)
    for part in (net, nn.Sequential(net, nn.ReLU())):
        with pytest.raises(cs.CannotConvert, match=r"torch\.jit cannot") as caught:
            torch.jit.trace(part, image) if compiler == "trace" else torch.jit.script(part)
        assert "cs.export" in caught.value.next
        net(image)


def test_transforms_of_weights_work() -> None:
    net, image = (
        unverified(build("resnet18", by=4), mask="none", example_input=torch.rand(1, 3, 64, 64)),
        torch.rand(1, 3, 64, 64),
    )
    weights = {name: value.detach() for name, value in net.named_parameters()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(net, weights, (image,)).square().sum()

    found = torch.func.grad(loss)(weights)
    net(image).square().sum().backward()
    for name, value in net.named_parameters():
        if value.grad is not None:
            torch.testing.assert_close(found[name], value.grad, rtol=1e-3, atol=1e-4)


def test_an_image_without_values_is_refused() -> None:
    net = unverified(build("resnet18", by=4), mask="edges", example_input=torch.rand(1, 3, 64, 64))
    with pytest.raises(cs.InvalidInput, match="on the meta device"):
        net.to("meta")(torch.rand(1, 3, 64, 64, device="meta"))


def test_weights_of_the_original_are_refused_by_an_optimised_copy() -> None:
    model = build("resnet18", by=4)
    fast = unverified(model, mask="none", example_input=torch.rand(1, 3, 64, 64)).optimize()
    with pytest.raises(cs.InvalidInput, match="not those of an optimised copy") as caught:
        fast.load_state_dict(model.state_dict())
    assert "optimize() again" in caught.value.next
    fast.load_state_dict(fast.state_dict())


@pytest.mark.parametrize(
    ("name", "fused"), [("resnet18", True), slow("resnet18", False), slow("mobilenet_v2", False)]
)
@pytest.mark.filterwarnings("ignore")
def test_quantizable_networks_in_floats_are_plain_networks(name: str, fused: bool) -> None:
    """Their sums and stubs do in floats what any network does, before they are prepared and where modules are fused."""
    model: Any = randomise(
        getattr(torchvision.models.quantization, name)(weights=None, quantize=False)
    ).eval()
    if fused:
        model.fuse_model()
        model = torch.ao.quantization.QuantWrapper(model)
    image = torch.rand(2, 3, 64, 96)
    net = unverified(model, mask="none", example_input=torch.rand(1, 3, 64, 64))
    with torch.no_grad():
        for one in (net, net.optimize()):
            assert relative_error(one(image), model(image)) < 1e-4


class Rounded(Base):
    """Its values are rounded to steps, as in training for 8 bits."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.fake_quantize_per_tensor_affine(self.body(self.stem(x)), 0.1, 3, 0, 255))


def test_values_rounded_to_steps_stay_in_the_region() -> None:
    torch.manual_seed(0)
    model, image = Rounded().eval(), torch.rand(2, 3, 64, 96)
    net = unverified(model, mask="none", example_input=torch.rand(1, 3, 64, 96), outputs="native")
    assert net.plan["fake_quantize_per_tensor_affine"].action == "keep"
    with torch.no_grad():
        assert relative_error(net(image), model(image)) < 1e-4


class Halved(Base):
    """Its sums need sizes that are multiples of 8, which torch says in its own words."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(self.stem(x))
        return self.head(y.view(*y.shape[:2], y.shape[2] // 2, 2, -1, 2).mean((3, 5)))


@pytest.mark.parametrize("is_optimized", [False, True])
def test_sizes_that_the_original_refuses_are_refused_with_its_error(is_optimized: bool) -> None:
    torch.manual_seed(0)
    model = Halved().eval()
    net: Any = unverified(model, mask="none", example_input=image(3, (64, 96)), outputs="native")
    net = net.optimize() if is_optimized else net
    other = image(3, (66, 98))
    with pytest.raises(RuntimeError) as original:
        model(other)
    with pytest.raises(cs.InvalidInput, match="does not run on an image of 66 x 98") as caught:
        net(other)
    assert str(original.value) in caught.value.why


# -- pictures of other channels, sizes or layouts: computed as the network as given does, or refused


SIZE = (64, 96)


def plain(channels: int = 3) -> nn.Sequential:
    layers = [nn.Conv2d(channels, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 2, 1))


FIRST: dict[str, Callable[[], nn.Sequential]] = {
    "a convolution": plain,
    "a depthwise convolution": lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3), *plain()),
    "a 1x1 convolution": lambda: nn.Sequential(nn.Conv2d(3, 5, 1), *plain(5)),
    "a norm": lambda: nn.Sequential(nn.BatchNorm2d(3), *plain()),
    "a strided 1x1 convolution": lambda: nn.Sequential(nn.Conv2d(3, 5, 1, 2), *plain(5)),
    "a depthwise strided convolution": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, groups=3), *plain(6)),
    "a grey convolution": partial(plain, 1),
}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "floors": {"mask": "content", "coarsest": 8},
    "edges": {"mask": "edges"},
    "a stride": {"mask": "edges", "output_stride": (2, 4)},
}


def network(first: str) -> nn.Module:
    torch.manual_seed(0)
    return FIRST[first]().eval()


def example(first: str) -> Tensor:
    image = street_scene(*SIZE)[None]
    return image[:, :1] if first == "a grey convolution" else image


@cache
def copies(first: str, conversion: str) -> dict[str, Any]:
    image, options = example(first), CONVERSIONS[conversion]
    net = cs.adaptify(network(first), example_input=image, verify_laws=False, **options)
    return {"converted": net, "optimised": net.optimize()}


PAIRS = covering([*FIRST], [*CONVERSIONS], ["converted", "optimised"])


@pytest.mark.parametrize(("first", "conversion", "copy"), some(PAIRS, rows=True))
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_other_channels_are_refused_with_a_map_of_ones_own_too(
    first: str, conversion: str, copy: str
) -> None:
    net, image = copies(first, conversion)[copy], example(first)
    for channels in {1, 2, 3, 4, 7} - {image.shape[1]}:
        picture = image[:, :1].expand(-1, channels, -1, -1).contiguous()
        for options in ({}, {"mask": "random"}, {"mask": "all"}, {"mask": "none"}):
            with torch.no_grad(), pytest.raises(cs.InvalidInput, match="channel"):
                net(picture, **options)
    kept = torch.zeros(1, *SIZE, dtype=torch.bool)
    kept[:, 16:48, 32:64] = True
    options = {"mask": kept} if conversion == "floors" else {}
    with torch.no_grad(), pytest.raises(cs.InvalidInput, match="channel"):
        net(torch.cat([image] * 4, 1)[:, :4], **options)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda image: image.contiguous(memory_format=torch.channels_last),
    "turned": lambda image: image.transpose(2, 3).contiguous().transpose(2, 3),
    "a part": lambda image: nn.functional.pad(image, (3, 4, 5, 6))[..., 5:-6, 3:-4],
    "every second": lambda image: image.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda image: image.expand(3, -1, -1, -1),
    "other size": lambda image: image[..., :37, :51],
    "one pixel": lambda image: image[..., :1, :1],
}


@pytest.mark.parametrize(("copy", "strides"), covering(["converted", "optimised"], [*STRIDES]))
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_the_layout_of_an_image_does_not_matter(copy: str, strides: str) -> None:
    net, image = copies("a convolution", "edges")[copy], STRIDES[strides](example("a convolution"))
    with torch.no_grad():
        expected = net(image.contiguous(), mask="all")
        assert relative_error(net(image, mask="all"), expected) < 1e-5


@pytest.mark.parametrize("copy", ["converted", "optimised"])
@pytest.mark.parametrize("axis", range(4))
@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
def test_empty_batches_are_refused(copy: str, axis: int) -> None:
    image = example("a convolution")
    with torch.no_grad(), pytest.raises(cs.InvalidInput):
        copies("a convolution", "edges")[copy](image.narrow(axis, 0, 0))


@pytest.mark.parametrize("groups", [1, 8])
def test_rows_that_are_not_those_of_their_lattice_are_refused(groups: int) -> None:
    geometry = copies("a convolution", "edges")["optimised"].geometry
    lattice = geometry.lattice(torch.zeros(1, 8, 12, dtype=torch.int8))
    window, weight = Window((3, 3), padding=(1, 1, 1, 1)), torch.rand(8, 8 // groups, 3, 3)
    with torch.no_grad():
        assert len(conv2d(Elements(torch.rand(96, 8), lattice), weight, None, window, 0, groups).rows) == 96
        for shape, words in (((89, 8), "lattice"), ((97, 8), "lattice"), ((96, 7), "channels")):
            with pytest.raises(Misfit, match=words):
                conv2d(Elements(torch.rand(shape), lattice), weight, None, window, 0, groups)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_program_computes_contiguous_images_whatever_the_layout_of_the_example(tmp_path: Path) -> None:
    image = example("a convolution")
    net = cs.adaptify(
        network("a convolution"), "edges | budget:fraction=0.3", example_input=image, verify_laws=False
    )
    last = image.contiguous(memory_format=torch.channels_last)
    cs.export(net, last, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    (taken,) = (
        node.meta["val"] for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    )
    assert taken.stride() == torch.empty(image.shape).stride()  # which compilers of programs do not check
    run = program.module()
    with torch.no_grad():
        expected = net(image)
        for layout in (image, last):
            assert relative_error(run(layout), expected) < 1e-5
    with pytest.raises((RuntimeError, AssertionError)):
        run(image[:, :2])


# -- what is made in inference mode is trained afterwards, or says so in words about that mode -----


def _saved(model: nn.Module, x: Any, folder: Path) -> nn.Module:
    cs.save(cs.adaptify(model, "edges", verify_laws=False), folder / "net.safetensors")
    return cs.load(folder / "net.safetensors", seeded(Segmenter, torch.float32))


def _refined(model: nn.Module, x: Any, folder: Path) -> nn.Module:
    net = unverified(model, "edges", example_input=x)
    net.add_refinement()
    return net


MADE: dict[str, Callable[[nn.Module, Any, Path], nn.Module]] = {
    "strides": lambda model, x, folder: unverified(model, "edges"),
    "an example of that mode": lambda model, x, folder: unverified(model, "edges", example_input=x),
    "arguments of that mode": lambda model, x, folder: unverified(model, "edges", example_input={"x": x}),
    "floors": lambda model, x, folder: unverified(model, "edges", coarsest=32, example_input=x),
    "a learned mask": lambda model, x, folder: unverified(model, "learned", example_input=x),
    "a refinement": _refined,
    "a file": _saved,
    "a sampled input": lambda model, x, folder: cs.resample(model, size=(32, 48)),
}


@pytest.mark.parametrize(("make", "is_called"), covering([*MADE], [False, True]))
def test_what_is_made_in_inference_mode_is_trained(make: str, is_called: bool, tmp_path: Path) -> None:
    model = seeded(Segmenter, torch.float32)
    with torch.inference_mode():
        net = MADE[make](model, images(1, 64, 96), tmp_path)
        if is_called:
            net(images(1, 64, 96))
    assert not any(value.is_inference() for value in (*net.parameters(), *net.buffers()))
    net.train()
    output = net(images(2, 64, 96))
    (output["out"] if isinstance(output, dict) else output).square().sum().backward()
    gradients = [value.grad for value in net.parameters()]
    assert sum(gradient is not None for gradient in gradients) >= 14


def test_a_path_that_is_read_in_inference_mode_is_trained() -> None:
    def branch(own: Any, image: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return own.head(y) + torch.ones(1) * y.shape[3] if y.shape[2] > 20 else own.head(2 * y)

    net = cs.adaptify(Encoded(branch).eval(), "edges", verify_laws=False, example_input=images(1, 48, 64))
    with torch.inference_mode():
        net(images(1, 96, 128))
    net(images(1, 96, 128)).sum().backward()
    assert net.head.weight.grad is not None


@pytest.mark.parametrize("size", [(64, 96), (97, 129)])
def test_an_image_of_inference_mode_is_refused_in_training_in_words(size: tuple[int, int]) -> None:
    net = unverified(seeded(Segmenter, torch.float32), "edges", example_input=images(1, 64, 96))
    with torch.inference_mode():
        x = images(1, *size)
    with pytest.raises(cs.InvalidInput, match="inference_mode") as caught:
        net(x)
    assert "resize" not in str(caught.value)
    with torch.no_grad():
        net(x)
