"""Networks that take more than an image: several tensors, a list, a dictionary, the image by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import covering, relative_error, slow, some
from networks import build, conv_norm, randomise, unverified
from torch import nn

import cadsurgery as cs


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
