"""A network whose input image is sampled more densely where it matters."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Self, get_args

import torch
from torch import Tensor, nn

from cadsurgery.data.networks import source_of, stated_statistics
from cadsurgery.following.arguments import image_of, outside_inference_mode
from cadsurgery.following.trace import evaluating
from cadsurgery.masks.context import call_context, labelled
from cadsurgery.masks.masking import check_image
from cadsurgery.masks.unit import Normalisation
from cadsurgery.methods import converted
from cadsurgery.methods.converted import ConvertedModel, register
from cadsurgery.methods.report import MethodMacs
from cadsurgery.methods.resampling.back import interpolate_back
from cadsurgery.methods.resampling.locations import (
    IGNORED,
    TARGETS,
    Mode,
    check_size,
    sample,
    uniform_locations,
)
from cadsurgery.methods.resampling.report import ResampledMacs, ResampledPlan
from cadsurgery.methods.resampling.samplers import (
    SAMPLERS,
    LearnedSampler,
    MaskSampler,
    Sampler,
    SamplerOptions,
    resolve_sampler,
)
from cadsurgery.network import storage
from cadsurgery.network.adaptify import adaptify, copy_network
from cadsurgery.network.macs import count_network
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.program import Derived
from cadsurgery.network.signature import Forward
from cadsurgery.support.divergence import is_map, resize
from cadsurgery.support.errors import CadError, CannotConvert, FileError, InvalidInput, check_name, first_line
from cadsurgery.support.torch_internals import tree_leaves, tree_map

NETWORK, SAMPLER = "network", "location_sampler"  # names of the child modules
_PREFIX, _OWN = f"{NETWORK}.", f"{SAMPLER}."
_DENSE = "network"  # in files, an inner network that no method made


@outside_inference_mode
def resample(
    model: nn.Module,
    sampler: object = "learned",
    size: int | tuple[int, int] = 224,
    grid: int = 8,
    *,
    smoothness: float = 1.0,
    targets: Collection[int] | None = TARGETS,
    ignore: int | None = IGNORED,
    share: float = 0.05,
    mode: Mode = "nearest",
    example_input: Tensor | None = None,
) -> ResampledModel:
    """Run a network on a sampled image, with more pixels near boundaries of important classes (Marin et al., ICCV
    2019).

    `model` is not changed. Its state dict loads into the result, which is called like the model and returns the same
    structure, with maps of the image's size.

    Args:
        model: a network that returns class scores for each position, in any structure; also an adaptive network or
            one with exits.
        sampler: `"learned"`, a small network to train (`finetune --set objective=locations`); any mask with
            scores, e.g. `"edges"`; `"labels"`, given by `cadsurgery.masks.labelled`; or `"uniform"`.
        size: size of the sampled image, one number for both sides or (height, width); may be larger than the image.
        grid: number of locations per side of the grid, which is upsampled to `size`.
        smoothness: smoothness of the grid, see `resampling.target_locations`; for a learned sampler, of its targets.
        targets: classes whose boundaries matter; None for all.
        ignore: label of pixels that form no boundary; None for none.
        share: for a mask, the share of samples that count as boundaries: those with the highest scores.
        mode: how pixels are sampled, see `resampling.sample`.
        example_input: an image batch (B, C, H, W); default: small random images.

    Raises:
        CannotConvert: the network does not run on the sampled example, or returns no map.
        UnknownName: there is no such sampler, mask or option.
        InvalidInput: size, grid, or another option is out of range, or the network's input is sampled already.
    """
    height, width = check_size(size)
    check_name("mode", mode, get_args(Mode))
    chosen = tuple(targets) if targets is not None else None
    options = SamplerOptions(grid, smoothness, chosen, ignore, share)
    ResampledModel.refuse_again(model)
    network = copy.deepcopy(model) if isinstance(model, Derived) else copy_network(model)
    image = _example(network, (height, width)) if example_input is None else example_input
    check_image(image, "example_input")
    unit = network.normalisation if isinstance(network, AdaptiveModel) else None
    stated = stated_statistics(network)
    unit = unit or (Normalisation(*stated) if stated else None)
    made = resolve_sampler(sampler, options, image.shape[1], unit)
    weight = next(network.parameters(), torch.empty(0))
    net = ResampledModel(network, made.to(weight.device, weight.dtype), (height, width), mode)
    net.train(model.training)
    net.source = source_of(model)
    net.plan = _make_plan(net, image)
    return net


def _example(network: nn.Module, size: tuple[int, int]) -> Tensor:
    """Return a random image, one and a half times as large as the sampled image, in the dtype of the network."""
    weight = next(network.parameters(), torch.empty(0))
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    channels = next((module.in_channels for module in convolutions), 3)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, channels, size[0] * 3 // 2, size[1] * 3 // 2, generator=generator)
    return image.to(weight.device, weight.dtype)


def _make_plan(net: ResampledModel, image: Tensor) -> ResampledPlan:
    labels = torch.zeros(image.shape[0], *image.shape[2:], dtype=torch.int64)  # for masks that need labels
    with torch.no_grad(), evaluating(net), labelled(labels):
        uniform = uniform_locations(2).expand(image.shape[0], -1, -1, -1)
        try:
            output = net.call_network(image, uniform)
        except CadError:
            raise
        except Exception as error:  # any error: the network decides which inputs it accepts
            raise CannotConvert(
                f"{type(net.network).__name__} does not run on an image of {net.size[0]} x {net.size[1]}.",
                why=first_line(error),
                next="choose another size, or pass example_input= if it is called with an image of other channels.",
            ) from error
        maps = tuple(tuple(value.shape[1:]) for value in tree_leaves(output) if is_map(value, image.shape[0]))
        if not maps:
            raise CannotConvert(
                f"{type(net.network).__name__} returns no map.",
                why="scores for each position are brought back to the image; this network gives others.",
                next="pass a segmentation network, or wrap it so that it returns floating-point (B, C, h, w).",
            )
        counted = net._count(image, uniform)
    options, shape = net.sampler.options, tuple(image.shape)
    return ResampledPlan(
        sampler=net.sampler.spec(),
        grid=options.grid,
        size=net.size,
        mode=net.mode,
        back=net.back,
        maps=maps,
        example_shape=shape,
        macs=(counted.sampler, counted.network, counted.original),
    )


@register
class ResampledModel(ConvertedModel):
    """A network and a sampler: the network runs on the sampled image, and its maps return at the image's size.

    Attributes:
        plan: how the network was converted.
        size: (height, width) of the sampled image.
        mode: how pixels are sampled.
        source: where the network came from.
        locations: (B, grid, grid, 2) of the last call; None before.
    """

    method, converted_by, already = (
        "resampling",
        "cs.resample",
        "the input of this network is sampled already.",
    )
    convert, plan_type = staticmethod(resample), ResampledPlan
    group, child, objective = "sampler", SAMPLER, "sampled"
    option_types: ClassVar[dict[str, Any]] = {
        **{"grid": int, "smoothness": float, "targets": tuple[int, ...] | None, "ignore": int | None},
        **{"share": float, "size": tuple[int, int], "mode": Mode, "back": str},
    }
    field_types: ClassVar[dict[str, Any]] = {
        **{"inside": str, "network": dict[str, Any], "sampler": str, "normalisation": Normalisation | None}
    }
    back: ClassVar[str] = "inverse"  # how scores come back, which files say: there was another way
    plan: ResampledPlan
    network: nn.Module
    is_optimized = False

    def __init__(self, network: nn.Module, sampler: Sampler, size: tuple[int, int], mode: Mode) -> None:
        """Combine a network and a sampler; call `cadsurgery.resample` instead."""
        super().__init__()
        self.add_module(NETWORK, network)
        self.add_module(SAMPLER, sampler)
        self.size, self.mode = size, mode
        self.options = asdict(sampler.options)
        self.locations: Tensor | None = None
        self.training = network.training
        self.register_state_dict_post_hook(_as_the_original)
        self.register_load_state_dict_pre_hook(_from_the_original)

    @classmethod
    def is_own(cls, name: str) -> bool:
        """True for tensors of the sampler."""
        return _OWN in name

    @property
    def inner(self) -> nn.Module:
        """The network that gets the sampled image."""
        network: nn.Module = self.network
        return network

    @property
    def decided_by(self) -> str:
        """The sampler."""
        return f"{self.sampler.spec()} sampler"

    def identity(self) -> dict[str, Any]:
        """Return the options of the sampler."""
        return {"sampler": str(self.sampler.options)}

    @property
    def sampler(self) -> Sampler:
        """The module that computes the locations."""
        sampler = self._modules[SAMPLER]
        assert isinstance(sampler, Sampler)
        return sampler

    @Forward
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network on the sampled image and return its maps at the image's size.

        Args:
            args: as for the original; the first 4-d tensor is the image batch (B, C, H, W).
            kwargs: as for the original.

        Raises:
            InvalidInput: the image is not an image batch, or the sampler cannot compute its locations.
        """
        image = self._image(args, kwargs)
        locations = self.sampler(image)
        self.locations = locations.detach()
        output = self.call_network(image, locations, args, kwargs)
        size = (image.shape[2], image.shape[3])

        def bring_back(value: Any) -> Any:
            if not is_map(value, image.shape[0]):
                return value
            return interpolate_back(resize(value, self.size), locations, size)

        return tree_map(bring_back, output)

    def call_network(self, image: Tensor, locations: Tensor, args: Any = None, kwargs: Any = None) -> Any:
        """Run the network on an image sampled at `locations`; its maps are not interpolated back.

        Args:
            image: (B, C, H, W).
            locations: (B, grid, grid, 2).
            args, kwargs: arguments of the call, in which the image is replaced; default: only the image.
        """
        args, kwargs = (image,) if args is None else args, kwargs or {}
        sampled = sample(image, locations, self.size, self.mode)
        args, kwargs = tree_map(lambda value: sampled if value is image else value, (args, kwargs))
        if call_context().points is not None:
            raise InvalidInput(
                "keypoints are in pixels of the image, and the network sees it sampled.",
                next="choose a mask that looks at the image, or call net.network on an image that is not sampled.",
            )
        with self._labels_sampled(image, locations):
            return self.network(*args, **kwargs)

    def _labels_sampled(self, image: Tensor, locations: Tensor) -> AbstractContextManager[None]:
        """Provide the labels of the call, if any, sampled like the image, for masks inside the network."""
        labels = call_context().labels
        if labels is None or tuple(labels.shape) != (image.shape[0], *image.shape[2:]):
            return contextlib.nullcontext()
        return labelled(self.sample_labels(labels, locations))

    def sample_labels(self, labels: Tensor, locations: Tensor) -> Tensor:
        """Sample labels (B, H, W) at the locations: (B, h, w)."""
        return sample(labels.unsqueeze(1), locations.to(labels.device), self.size)[:, 0]

    def _image(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        # The signature of the inner network would be read anew in each call.
        image = image_of({**{str(place): value for place, value in enumerate(args)}, **kwargs})
        check_image(image)
        return image

    def macs(self, *args: Any, **kwargs: Any) -> ResampledMacs:
        """Count MACs on an image: of the sampler, of the network, and of the network without sampling.

        Args:
            args, kwargs: as in a call.
        """
        image = self._image(args, kwargs)
        with torch.no_grad(), evaluating(self):
            leaves = tree_leaves((args, kwargs))
            if any(isinstance(value, Tensor) and value is not image for value in leaves):
                raise InvalidInput(
                    "macs are counted only on an image.", next="leave out the other tensors of the call."
                )
            return self._count(image, None if image.is_meta else self.sampler(image))

    def _count(self, image: Tensor, locations: Tensor | None) -> ResampledMacs:
        """Count at these locations, on which inner masks depend; without locations, from shapes alone."""
        sampler = self.sampler.macs(image)
        original, not_counted = _macs_of(self.network, image)
        if locations is None:
            network, _ = _macs_of(self.network, image.new_empty((*image.shape[:2], *self.size)))
        else:
            with self._labels_sampled(image, locations):
                network, _ = _macs_of(self.network, sample(image, locations, self.size, self.mode))
        return ResampledMacs(
            sampler=sampler,
            network=network,
            original=original,
            size=self.size,
            shape=tuple(image.shape),
            not_counted=not_counted,
        )

    def optimize(self) -> ResampledModel:
        """Return an inference copy.

        A dense network has its batch norms folded and activations fused if torch.fx can trace it; a network of
        another method is replaced by its own inference copy. Batch norms of a learned sampler are folded.
        """
        net = ResampledModel(_optimized(self.network), copy.deepcopy(self.sampler), self.size, self.mode)
        net.plan, net.source, net.is_optimized = self.plan, self.source, True
        net.requires_grad_(False)
        net.eval()
        if isinstance(net.sampler, LearnedSampler):
            net.sampler.net.fold()
        return net

    # -- files -------------------------------------------------------------------------------------

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the contents of the file: those of the inner network's own method, and the sampler's.

        Raises:
            InvalidInput: the sampler is the user's own, which a file cannot contain.
        """
        sampler, network = self.sampler, self.network
        is_mask = isinstance(sampler, MaskSampler) and sampler.mask.storable
        if not is_mask and SAMPLERS.get(sampler.name) is not type(sampler):
            raise InvalidInput(
                f"the sampler {sampler.spec()!r:.80} cannot be stored.",
                why="it is a function or a class of your own, which a file cannot hold.",
                next="save net.network, and call cs.resample on it after loading.",
            )
        inside, tensors, within = _DENSE, network.state_dict(), dict[str, Any]()
        if isinstance(network, AdaptiveModel | ConvertedModel):
            inside = network.method if isinstance(network, ConvertedModel) else "adaptive"
            tensors, within = converted.pack(network)
        unit = sampler.unit.normalisation if isinstance(sampler, MaskSampler) else None
        own = {f"{_OWN}{name}": value for name, value in sampler.state_dict().items()}
        fields = {"inside": inside, "network": within, "sampler": sampler.spec()}
        return tensors | own, {**fields, "normalisation": unit and unit.to_dict()}

    @classmethod
    def rebuild(
        cls, path: str | Path, stored: storage.Stored, tensors: dict[str, Tensor], model: nn.Module | None
    ) -> Self:
        """Build the network of a file, whatever method made the inner network; see `ConvertedModel.rebuild`."""
        fields, is_dense = stored.fields, stored.fields["inside"] == _DENSE
        size, grid = stored.options["size"], stored.options["grid"]
        storage.check_size(path, max(math.prod(size), grid**4), stored.trust)
        if (back := stored.options.pop("back")) != cls.back:
            raise FileError(
                f"{path} brings scores back by {back!r:.60}.",
                why="that way is gone; the inverse of the warp gives the same where the grid does not fold, faster.",
                next="make the network again: cs.resample(model, ...); its state dict fits.",
            )
        own = {name[len(_OWN) :]: tensors.pop(name) for name in list(tensors) if name.startswith(_OWN)}
        if not is_dense:
            network: nn.Module = converted.unpack(path, fields["network"], tensors, model, trust=stored.trust)
        else:
            network = model if model is not None else storage.build_stated(path, stored.source, tensors)
        sampler: object = fields["sampler"]
        if sampler not in SAMPLERS:
            mask_tensors = {name.removeprefix("mask."): value for name, value in own.items()}
            sampler = storage.stored_mask(path, fields["sampler"], mask_tensors, stored.trust)
        net = cls._convert_again(path, network, stored, sampler=sampler)
        net.plan = stored.plan  # its MACs were counted with the stored mask's parameters
        storage.fill(path, net.sampler, own)
        if is_dense:
            storage.fill(path, net.network, tensors)
        if isinstance(net.sampler, MaskSampler):
            net.sampler.unit.set_once(fields["normalisation"])
        return net


def _macs_of(network: nn.Module, image: Tensor) -> tuple[int, tuple[str, ...]]:
    """Count the MACs of a network of any kind on an image, and list the operations that are not counted."""
    if not hasattr(network, "macs"):
        dense = count_network(network, image)
        return dense.macs, dense.not_counted
    counted: Any = network.macs(image)  # type: ignore[operator]
    return (counted.total if isinstance(counted, MethodMacs) else counted.mask), counted.not_counted


_COARSEST = 32  # output stride of the floors; where everything is high nothing is computed there


def _optimized(network: nn.Module) -> nn.Module:
    """Return an inference copy of a network: its own, or of a dense network, that of its adaptive network with floors,
    which computes what the network does where everything is high."""
    optimize: Callable[[], nn.Module] | None = getattr(network, "optimize", None)
    if optimize is not None:
        return optimize()
    with contextlib.suppress(CadError), evaluating(network):
        return adaptify(network, "all", coarsest=_COARSEST, verify_laws=False).optimize()
    return copy.deepcopy(network).eval()


def _as_the_original(net: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{_PREFIX}")]:
        state[prefix + name[len(prefix) + len(_PREFIX) :]] = state.pop(name)


def _from_the_original(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        own = name[len(prefix) :]
        if not own.startswith(_OWN):
            state[f"{prefix}{_PREFIX}{own}"] = state.pop(name)
