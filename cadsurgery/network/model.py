"""The adaptive network: the original's modules, run by the rewritten graph on the level map of a mask."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice, product
from threading import RLock, local
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from cadsurgery.data.networks import Source, source_of
from cadsurgery.elements.lattice import Lattice
from cadsurgery.following.arguments import kinds_of, outside_inference_mode
from cadsurgery.following.equivalence import meta_copy
from cadsurgery.following.graphs import called_modules
from cadsurgery.following.guards import GuardFailed, is_guard
from cadsurgery.following.hooks import acts_as, child, copying, take_over
from cadsurgery.following.trace import drop_cached
from cadsurgery.masks.context import call_context, masked
from cadsurgery.masks.masking import NEEDS_STATIC, check_image
from cadsurgery.masks.provider import MaskProvider
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.masks.unit import Normalisation, Unit, read_normalisation
from cadsurgery.network.adapters import (
    ADAPTERS,
    MEANS,
    REFINEMENTS,
    adapter_kind,
    make_mean_shifts,
    make_refinements,
    with_adapters,
)
from cadsurgery.network.bands.banded_call import Bands, RowsOfResult, Walks
from cadsurgery.network.boxes import Box, boxes_of
from cadsurgery.network.conversion import convert_for_call
from cadsurgery.network.cuda_graphs import Called, Recordings
from cadsurgery.network.fuse import KERNELS
from cadsurgery.network.input_refusals import first_value
from cadsurgery.network.invocations import Invocation, answer
from cadsurgery.network.macs import MacReport, count_macs
from cadsurgery.network.optimized import BFLOAT16, FLOAT, check_precision, fuse_network
from cadsurgery.network.program import Program, ProgramNetwork, frozen_copy, refuse_torchscript
from cadsurgery.network.regions import Asked, ByRows, PictureParts, Regions
from cadsurgery.network.signature import Forward
from cadsurgery.support.errors import CannotConvert, InvalidInput, NotConverted
from cadsurgery.support.memory import bytes_of
from cadsurgery.support.progress import Step, silent, waiting
from cadsurgery.support.running import running
from cadsurgery.support.torch_internals import is_transformed, tree_leaves
from cadsurgery.surgery.verify import Check

# Tracing patches functions of torch, so only one thread traces at a time; a waiting thread reuses the traced program.
_FOLLOWING = RLock()
_MOST_TRIED = 4  # the latest paths read for other calls, which are tried before the network is read anew

Result = TypeVar("Result")


class AdaptiveModel(ProgramNetwork):
    """A network with content-adaptive downsampling: same call, same output structure, same state dict as the original.

    Calling it with `mask=` overrides the mask for that call. After a call, `levels` and `active_fraction` describe the
    cells that this thread's call kept high.

    Attributes:
        checks: results of the verification at conversion; empty if it was skipped.
        source: the source of the network if it was built by name; `save` records it.
        license: licence of the weights, as far as anything states it, see `data.networks.license_of`; files and cards
            have it.
    """

    license = ""
    hosts_part = False  # True if the network runs its own code with one adaptive part; see `HostedModel`

    def __init__(self, model: nn.Module, program: Program, mask: object) -> None:
        """Take over the modules of `model`; users call `cadsurgery.adaptify` instead."""
        super().__init__()
        self._constants = self.adopt(model)
        self._original = (model,)  # for its attributes; in a tuple, or torch would register it
        self._shapes = shapes_of(self)
        self.use_program(program)
        self._last = _Last()
        self._paths = dict[tuple[Any, ...], Program]()  # programs for calls that take another path
        self._overridden = False  # True once `masked` was used: torch before 2.15 cannot compile the look-up
        self.checks: tuple[Check, ...] = ()
        self.source: Any = None
        self._regions = Regions()
        self._bands: Bands | None = None  # of an inference copy that computes pictures in bands
        self._mask_provider = resolve_mask(mask)
        self._unit: Unit = model._unit if isinstance(model, AdaptiveModel) else Unit()
        self.register_state_dict_post_hook(_without_own)
        self.register_load_state_dict_post_hook(_drop_cached)
        self.use_channels_last()

    @classmethod
    def is_own(cls, name: str) -> bool:
        """True for tensors of the mask and of adapters."""
        return any(part in name for part in _OWN)

    @property
    def is_optimized(self) -> bool:
        """True for a copy that `optimize` made."""
        return self.program.is_fused

    @Forward
    def forward(self, *args: Any, mask: object = None, sizes: Any = None, **kwargs: Any) -> Any:
        """Run the network as the original is called.

        Args:
            args: the original's positional arguments; the first is the image batch (B, C, H, W).
            mask: mask for this call only: (B, h, w) bool (True = keep high) or integer levels, or anything
                `adaptify` takes as a mask. If the original has an argument of this name, it is passed to the original;
                use `masked` then.
            sizes: for each image of a padded batch its (height, width) from the top left corner: each gets the mask
                that it has by itself, and nothing is kept in the padding. A `pixel_mask` of the call says the same.
                Passed on if the original has an argument of this name; use `cs.masks.sized` then.
            kwargs: the original's keyword arguments.

        Raises:
            InvalidInput: an image that is empty or holds NaN, or a mask of wrong size, type or values.
        """
        parameters = self._program.signature.parameters
        if sizes is not None and "sizes" in parameters:  # an argument of the original
            kwargs["sizes"], sizes = sizes, None
        if mask is not None and "mask" in parameters:
            kwargs["mask"], mask = mask, None
        _refuse_without_values(self, args)
        if mask is None and self._overridden:
            mask = call_context().masks.get(self)
        chosen = self._mask_provider if mask is None else mask
        if running.is_compiled and not getattr(chosen, "static", False):
            return self._run_uncompiled(*args, mask=mask, sizes=sizes, **kwargs)
        call = Invocation(self._program, self._program.bind(*args, **kwargs), sizes)
        output, lattice = self.follow(call, partial(self.answer, resolve_mask(chosen)))
        return self.finish(call.in_layout(output), lattice)

    def answer(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> Called:
        """Return output and lattice of a call with a mask."""
        return answer(program, provider, arguments)

    def follow(self, call: Invocation, run: Callable[[Program, dict[str, Any]], Result]) -> Result:
        """Run the network's program on a call; where Python branches differ from the conversion's, one that is traced
        for it.

        Raises:
            InvalidInput: the image is invalid, or does not fit the network.
        """
        if running.in_graph:
            call.check()
            return run(self._program, call.arguments)
        with call.explained():
            key = self._key_of(call.arguments) if self._paths else ()
            try:
                return run(self._paths.get(key, self._program), call.arguments)
            except GuardFailed as refusal:
                if key in self._paths:
                    raise
                for other in islice(dict.fromkeys(reversed(self._paths.values())), _MOST_TRIED):
                    with contextlib.suppress(Exception):  # a path for other calls may raise any error
                        result = run(other, call.arguments)
                        self._paths[key] = other
                        return result
                return run(self._program_for(call.arguments, refusal), call.arguments)

    def _program_for(self, arguments: dict[str, Any], refusal: GuardFailed) -> Program:
        """Return the program for calls of this kind, which fail the guards of the network's own; it is built once."""
        call = self._key_of(arguments)
        with _FOLLOWING:
            if call not in self._paths:
                self._paths[call] = self._follow(arguments, refusal)
            return self._paths[call]

    def _key_of(self, arguments: dict[str, Any]) -> tuple[Any, ...]:
        """Return all that Python code may branch on in a call: shapes and types of tensors, all other arguments, and
        attributes that it reads."""
        kinds = tuple(kinds_of(arguments).items())
        return kinds, self._program.state_outside, *map(_value_of, tree_leaves(arguments))

    def _follow(self, arguments: dict[str, Any], refusal: GuardFailed) -> Program:
        """Convert the network for calls that take another path."""
        program = convert_for_call(self._original[0], self._program, arguments, refusal)
        if self.adapters is not None:
            program = with_adapters(program, set(self.adapters)).bind_to(self)
        return program

    def run(self, masking: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run with another masking, a callable (image, fine map) -> Lattice, for verification and tools; of a hosted
        network only the adaptive part runs."""
        part = self.adaptive_part
        call = Invocation(part._program, part._program.bind(*args, **kwargs))
        output, lattice = part.follow(call, lambda program, arguments: program(masking, arguments))
        return part.finish(call.in_layout(output), lattice)

    @torch.compiler.disable(
        reason="the number of elements varies from image to image, or the mask depends on more than the image: "
        f"{NEEDS_STATIC}"
    )
    def _run_uncompiled(self, *args: Any, **kwargs: Any) -> Any:
        """Call `forward` for a mask whose shapes a compiler cannot know; compilers break the graph here or refuse."""
        return self.forward(*args, **kwargs)

    def finish(self, output: Any, lattice: Lattice | Tensor) -> Any:
        """Return the output after storing the lattice for `levels`; a compiled call stores only the level map, as a
        recorded one, which gives no more, and an exported one nothing."""
        if not running.in_graph:
            self._last.note(lattice)
        elif not running.is_exported:
            self._last.of_compiled = lattice if isinstance(lattice, Tensor) else lattice.pyramid.levels
        return output

    def masked(self, mask: object) -> AbstractContextManager[None]:
        """Use another mask for calls in the block, in this thread; None keeps the network's own."""
        part = self.adaptive_part
        part._overridden = True
        return masked(part, mask)

    def use_channels_last(self) -> None:
        """Convert the weights of convolutions to channels_last, the layout of elements; values and names do not change.

        Networks whose original graph is run as well are left out, because dense convolutions round differently in
        another layout; so are modules called together with instance norms, see `functional.contiguous_gradient`.
        """
        called = (child(self, name) for name in called_modules(self.graph))
        parts = [list(module.modules()) for module in called if module is not None]
        mixed = {
            part for some in parts if any(isinstance(p, nn.InstanceNorm2d) for p in some) for part in some
        }
        for module in self.modules() if self.program.unchanged is None else ():
            plain = acts_as(module, nn.Conv2d) and module.groups == 1 and "weight" in module._parameters
            if plain and module not in mixed:
                weight: Any = module.weight
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)

    @property
    def normalisation(self) -> Normalisation | None:
        """The normalisation of its input as masks assume it, and its origin; None before the first picture. Accepts
        what `adaptify` takes."""
        return self._unit.normalisation

    @normalisation.setter
    def normalisation(self, value: object) -> None:
        self._unit = Unit(read_normalisation(value, self.plan.example_shape[1]))
        if self.source is not None and not self.hosts_part:
            self.source = source_of(self)  # pictures are prepared as was said

    @property
    def has_other_shapes(self) -> bool:
        """True if parameters have other shapes than at the conversion, e.g. those of a new classifier."""
        now = shapes_of(self)
        return any(now.get(name, shape) != shape for name, shape in self._shapes.items())

    def normalise_by(self, image: Tensor) -> None:
        """Estimate the normalisation of the input from an image batch, unless it is known or this is no picture."""
        self._unit(image)

    @property
    def adapters(self) -> nn.ModuleDict | None:
        """The modules beside the weights by name, see `add_refinement` and `add_mean_shifts`."""
        adapters = self.adaptive_part._modules.get(ADAPTERS)  # another module in an optimised copy
        return adapters if isinstance(adapters, nn.ModuleDict) else None

    @outside_inference_mode
    def add_mean_shifts(self) -> nn.ModuleDict:
        """Add a `MeanShift` to each layer that reads a mean over the region, once; until set it changes nothing.

        With all cells at level 0, results stay bit for bit the same, whatever the shifts are. The state dict stays the
        original's; `save` stores the shifts beside it. `cs.finetune.calibrate_means` sets them.

        Returns:
            The `adapters` of this network, including the shifts.

        Raises:
            InvalidInput: the network is an optimised copy, or no layer of it reads a mean over the region.
        """
        return self._add(
            MEANS,
            make_mean_shifts,
            "layer that reads a mean",
            "an optimised copy gets none, and a mean must be of the region, read by a convolution or linear layer.",
        )

    @outside_inference_mode
    def add_refinement(self, hidden: int = 48) -> nn.ModuleDict:
        """Add a `Refinement` to each final map of the region at the fine size, once; untrained, it changes nothing.

        A refinement corrects interpolated values with the features that enter the region, within two pixels of
        downsampled cells; other pixels stay bit for bit the same. `cs.finetune.fit_refinement` trains it.

        Args:
            hidden: number of hidden channels.

        Returns:
            The `adapters` of this network, including the refinements.

        Raises:
            InvalidInput: the network is an optimised copy, or the maps of its region do not have the size of the map
                that enters it.
        """
        return self._add(
            REFINEMENTS,
            partial(make_refinements, hidden=hidden),
            "map that could be refined",
            "an optimised copy gets none, and a map behind the region must have the size of the one that enters it.",
        )

    def _add(self, kind: str, make: Callable[[Program], nn.ModuleDict], what: str, why: str) -> nn.ModuleDict:
        """Add the adapters of a kind, unless the network has some."""
        part = self.adaptive_part
        adapters = part.adapters if part.adapters is not None else nn.ModuleDict()
        if any(adapter_kind(name) == kind for name in adapters):
            return adapters
        new = make(part.program) if not part.program.is_fused else nn.ModuleDict()
        if not len(new):
            raise InvalidInput(
                f"{type(self).__name__} has no {what}.",
                why=why,
                next="add them to what cs.adaptify(...) gave, before optimize().",
            )
        adapters.update(dict(new.items()))
        part.add_module(ADAPTERS, adapters)
        part.use_program(with_adapters(part.program, set(new)))
        part._paths = {}
        return adapters

    @property
    def lattice(self) -> Lattice:
        """The lattice of the last call of this thread; of the last call of all, if this thread made none or calls are
        compiled."""
        last = self._last.read()
        if isinstance(last, Tensor):
            last = self.geometry.lattice(last)
            self._last.note(last)
        if last is None:
            refuse_torchscript()
            raise InvalidInput("the network has not run yet.", next="call it on an image first: net(x).")
        return last

    @property
    def levels(self) -> Tensor:
        """The level map (B, h, w) of the last call of this thread, as the lattice realises it; 0 is the high output
        stride."""
        return self.lattice.levels

    @property
    def active_fraction(self) -> float:
        """The share of the fine map that the last call of this thread kept at the high output stride."""
        return self.lattice.active_fraction

    def macs(
        self, *args: Any, mask: object = None, sizes: Any = None, within: Any = None, **kwargs: Any
    ) -> MacReport:
        """Count the multiply-accumulates on an image: with the mask, as given, with everything high and everything low.

        Args:
            args: as for a call. The network runs only as far as its mask needs; the rest is computed on shapes.
            mask: mask for this count only, as for a call.
            sizes: sizes of the images of a padded batch, as for a call.
            within: boxes of each image, as for `cs.read_within`, which are computed only; `of_whole` is the share.
            kwargs: as for a call.

        Raises:
            InvalidInput: invalid boxes, or boxes together with more than an image.
            CannotConvert: the network is not computed in boxes.
        """
        if (
            within is not None and "within" in self.program.signature.parameters
        ):  # an argument of the original
            kwargs["within"], within = within, None
        if mask is not None and "mask" in self.program.signature.parameters:  # an argument of the original
            kwargs["mask"], mask = mask, None
        provider = resolve_mask(self.mask if mask is None else mask)

        def count(
            program: Program, arguments: dict[str, Any], provider: MaskProvider = provider
        ) -> MacReport:
            counted = self.counted if program is self.program else self._counted_on(program)
            return count_macs(program, counted, provider, arguments)

        if within is not None:
            if len(args) != 1 or kwargs or sizes is not None:
                raise InvalidInput(
                    "boxes are counted for a call with an image only.",
                    next="call net.macs(image, within=boxes).",
                )
            return self._macs_within(args[0], within, count, mask)
        return self.follow(Invocation(self.program, self.program.bind(*args, **kwargs), sizes), count)

    def _macs_within(
        self, image: Tensor, boxes: Any, count: Callable[..., MacReport], mask: object
    ) -> MacReport:
        """Count the multiply-accumulates of `cs.read_within`."""
        check_image(image)
        whole = self.macs(image, mask=mask)
        work = defaultdict[str, float](float)

        def of_parts(region: PictureParts) -> MacReport:
            for box in region.parts:
                provider, arguments = region.call_of(box)
                for layer in count(region.asked.program, arguments, provider).layers:
                    work[layer.layer] += layer.mask
            return whole.within(work)

        def of_rows(refusal: CannotConvert, rows: ByRows) -> MacReport:
            try:
                shares = rows.shares(self.counted)
            except (CannotConvert, InvalidInput) as error:
                raise refusal from error
            for share, layer in product(shares, whole.layers):
                work[layer.layer] += layer.mask / len(image) * share.get(layer.layer, 1.0 if share else 0.0)
            return whole.within(work)

        return self.in_region(image, boxes_of(boxes, image), of_parts, of_rows, mask)

    def in_region(
        self,
        image: Tensor,
        boxes: Sequence[Sequence[Box]],
        run: Callable[[PictureParts], Result],
        otherwise: Callable[[CannotConvert, ByRows], Result],
        mask: object = None,
        output: str | int | None = None,
    ) -> Result:
        """Run something on the parts of pictures that are computed for boxes of each, see `regions.PictureParts`.

        Args:
            image: (B, C, H, W).
            boxes: the boxes of each picture.
            run: is given the parts.
            otherwise: is given why the network is not computed for a part of the picture only, and what computes the
                rows of the boxes in bands.
            mask: mask for this call only, as for a call.
            output: key or position of the output that is asked for.

        Raises:
            UnknownName: no such output.
        """
        provider = resolve_mask(self.mask if mask is None else mask)

        def found(program: Program, arguments: dict[str, Any]) -> Result:
            asked = Asked(program, provider, arguments, boxes, output)
            try:
                region = self._regions.find(asked)
            except CannotConvert as refusal:
                return otherwise(refusal, ByRows(self._regions, self._bands or Bands(sys.maxsize), asked))
            return run(region)

        return self.follow(Invocation(self.program, self.program.bind(image)), found)

    @property
    def counted(self) -> Program:
        """The program of a copy on meta tensors, on which operations are counted."""
        return meta_copy(self).program

    def _counted_on(self, program: Program) -> Program:
        """Bind the program of another path to a copy on meta tensors, on which operations are counted."""
        return program.bind_to(meta_copy(self))

    def optimize(
        self,
        fuse: bool = True,
        *,
        precision: str = FLOAT,
        memory: int | str | None = None,
        calibration: Any = None,
        step: Step = silent,
    ) -> AdaptiveModel:
        """Return a copy for inference: batch norm folded, residuals and activations fused, weights packed.

        The copy is called like this network and gives the same results up to rounding, without gradients. It has the
        current weights and mask; this network is not changed. Attributes that are set on the mask later hold for the
        copy, too, unless the mask has tensors (`MaskProvider.is_shared`). NaN in weights, and NaN from operations such
        as divisions, stays NaN. NaN from values that overflow may be lost where a ReLU is fused.

        Args:
            fuse: False only folds batch norm and leaves everything else to torch; with a uniform mask this is the
                best ordinary dense network, with which `cadsurgery bench` compares.
            precision: `float` keeps the precision of the weights; the copy in `bfloat16` takes images in bfloat16, too.
                8 bits are for files: `cadsurgery.export`.
            memory: what the maps of a picture may take beside weights, picture and results, in bytes or as a text such
                as `"1.5GiB"`, or `"auto"` for what the machine or its control group has free, less a margin: pictures
                are computed one by one in bands of rows, with the same result. On the CPU.
            calibration: images for 8 bits, which are refused here with what to call.
            step: progress callback; see `cadsurgery.support.progress.Step`.

        Raises:
            UnknownName: an unknown precision.
            InvalidInput: 8 bits; no amount of memory; or another precision or memory for a network that is optimised
                already.
        """
        check_precision(precision, calibration)
        bands = Bands(bytes_of(memory)) if memory is not None else None
        with waiting(step) as shown:
            shown("optimising the network")
            fast = self._optimize(fuse)
        if fast is self and (precision != FLOAT or memory is not None):
            asked = f"precision={precision!r}" if memory is None else f"memory={memory!r}"
            raise InvalidInput(
                f"an optimised network gets no other {asked.partition('=')[0]}.",
                next=f"ask the network it was made from: net.optimize({asked}).",
            )
        fast.adaptive_part._bands = bands
        fast.license = self.license
        return fast.to(torch.bfloat16) if precision == BFLOAT16 else fast

    def _optimize(self, fuse: bool) -> AdaptiveModel:
        return OptimizedModel(self, fuse)

    def __getattr__(self, name: str) -> Any:
        """Return modules, parameters, and plain attributes of the original such as `num_classes`; not its methods,
        which would run the original network."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("_original")
            value = getattr(original[0], name, None) if original and not name.startswith("_") else None
            if original is None or value is None:
                raise
            if callable(value):
                raise _not_converted(original[0], name) from None
            return value

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a mask provider as a submodule under the property's name.
        if name in ("mask", "normalisation"):
            object.__setattr__(self, name, value)
        elif self._is_read_by_original(name):
            self._set_on_original(name, value)
        else:
            super().__setattr__(name, value)

    def _is_read_by_original(self, name: str) -> bool:
        """True if the original's code reads an attribute of this name from the network itself."""
        program = self.__dict__.get("_program")
        is_own = name in self.__dict__ or hasattr(type(self), name)
        return program is not None and not is_own and program.outside.has(name)

    def _set_on_original(self, name: str, value: Any) -> None:
        """Set an attribute that the original's code reads; the next call is read anew."""
        setattr(self._original[0], name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._program, self._paths = self._program.bind_to(self), {}

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptiveModel:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        for module in (self, *(part for part in self._original if isinstance(part, nn.Module))):
            memo.update({**copying(module), **memo})
        state = {
            key: value for key, value in vars(self).items() if key not in ("_program", "_paths", "_last")
        }
        clone.__dict__.update(
            copy.deepcopy(state, memo), _program=self._program.bind_to(clone), _paths={}, _last=_Last()
        )
        return clone


def _refuse_without_values(net: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Refuse images whose values the mask cannot read.

    Raises:
        InvalidInput: an image is on the meta device, as the network is, or torch.func transforms it.
        CannotConvert: torch.jit traces the network.
    """
    if running.in_graph:
        return
    refuse_torchscript()
    for value in arguments:
        if not isinstance(value, Tensor):
            continue
        if value.is_meta and (weight := first_value(net)) is not None and weight.is_meta:
            raise InvalidInput(
                "the image has no values: it is on the meta device.",
                why="the mask reads them, and they decide how many elements there are.",
                next="give an image with values; net.macs(image) and cs.plan(model) count the work of a call.",
            )
        if is_transformed(value):
            raise InvalidInput(
                "torch.func transforms the image of this call (grad, jvp or vmap).",
                why="the mask reads its values, and they decide how many elements there are.",
                next="use torch.autograd.grad for gradients by the image, and a batch instead of vmap; over weights "
                "torch.func works: torch.func.functional_call(net, parameters, (image,)).",
            )


def _inference_copy(net: AdaptiveModel) -> AdaptiveModel:
    """Copy a network for inference; the copy has the same mask object, where that can be (`MaskProvider.is_shared`)."""
    mask, memo = net.mask, dict[int, Any]()
    if mask.is_shared:
        memo[id(mask)] = mask
    modes = [(module, module.training) for module in mask.modules()]
    clone = copy.deepcopy(net, memo).eval().requires_grad_(False)
    for module, is_training in modes:
        module.training = is_training
    return clone


class OptimizedModel(AdaptiveModel):
    """An adaptive network for inference only; see `AdaptiveModel.optimize`. Any number of threads may call it."""

    def __init__(self, net: AdaptiveModel, epilogues: bool) -> None:
        """Fuse the graph of `net` and copy the modules that it still needs; see `fuse_network` for `epilogues`."""
        net.program.check_modules()
        source = _inference_copy(net)
        super().__init__(*fuse_network(source, epilogues), source.mask)
        take_over(self, source)
        # Calls that take another path are converted from the unfolded weights.
        self._unfused: tuple[AdaptiveModel, ...] = ()
        if len(self.program.signature.parameters) > 1 or any(map(is_guard, self.graph.nodes)):
            self._unfused = (_inference_copy(net),)
        self._epilogues, self._recordings = epilogues, Recordings()
        self.register_load_state_dict_post_hook(_forget_other_paths)
        data = {name: value for name, value in vars(net._original[0]).items() if _is_data(name, value)}
        self._original = (SimpleNamespace(**data),)  # type: ignore[assignment]
        self._counted = (meta_copy(net),)
        self.checks, self.source, self._unit = net.checks, net.source, net._unit
        self.training = False

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict of this copy, or of one that was made from the same network.

        Raises:
            InvalidInput: the state dict is that of the network before `optimize`.
        """
        folded = {name for name in self.state_dict() if name.startswith(f"{KERNELS}.")}
        if folded and folded.isdisjoint(state_dict):
            raise InvalidInput(
                "these weights are not those of an optimised copy.",
                why="it holds convolutions with their norms folded in, under other names.",
                next="load them into the converted network, net.load_state_dict(...), and call net.optimize() again.",
            )
        return super().load_state_dict(state_dict, *args, **kwargs)

    @Forward
    @torch.compiler.disable(reason="an optimised network is not compiled: compile the one it was made from")
    def forward(self, *args: Any, mask: object = None, sizes: Any = None, **kwargs: Any) -> Any:
        """Run the network as the original is called; see `AdaptiveModel.forward`. torch.compile does not compile it:
        on a GPU it records its calls, see `network/cuda_graphs.py`."""
        with torch.no_grad():
            return super().forward(*args, mask=mask, sizes=sizes, **kwargs)

    def answer(self, provider: MaskProvider, program: Program, arguments: dict[str, Any]) -> Called:
        """Return output and lattice of a call with a mask."""
        if self._bands is not None:
            return self._bands(provider, program, arguments)
        run = partial(answer, program, provider)
        if call_context().sizes is not None:  # which are no part of what is recorded
            return run(arguments)
        return self._recordings.call(self, provider, arguments, run) or run(arguments)

    def plan_memory(self, *args: Any, mask: object = None, **kwargs: Any) -> Walks:
        """Return how the first picture of a call is computed in bands, and the memory that its maps take; only the mask
        is computed.

        Args:
            args: as for a call.
            mask: mask for this plan only, as for a call.
            kwargs: as for a call.

        Raises:
            CannotConvert: an operation needs a whole map.
            InvalidInput: the memory is too little, or the copy was made without one.
        """
        provider = self._mask_provider if mask is None else resolve_mask(mask)
        return self.follow(
            Invocation(self._program, self._program.bind(*args, **kwargs)),
            partial(self._banded().plan, provider),
        )

    def rows(
        self,
        picture: Any,
        *args: Any,
        mask: object = None,
        start: int = 0,
        sizes: Any = None,
        **kwargs: Any,
    ) -> RowsOfResult:
        """Compute a picture that does not fit into memory: the first map of the output comes in rows, as they are
        computed; see `RowsOfResult`.

        Args:
            picture: (C, H, W) as the network takes it: a tensor, or anything with a shape of which `picture[:, a:b]`
                gives rows, such as `numpy.memmap` or an array of zarr. Masks other than `all` and `none` are given all
                of it.
            args, kwargs: further arguments of the call.
            mask: mask for this call only.
            start: the first row of the result that is asked for.
            sizes: the (height, width) of a picture that is padded below and at the right, in a list, as for a call.

        Raises:
            CannotConvert: an operation needs a whole map.
            InvalidInput: the copy was made without a memory, the output holds no map, or has no such row; when rows are
                first asked for, the memory is too little.
        """
        provider = self._mask_provider if mask is None else resolve_mask(mask)

        def read(first: int, end: int) -> Tensor:
            return torch.as_tensor(picture[:, first:end]).unsqueeze(0)

        size = read(0, 1).new_zeros(()).expand(1, *picture.shape)
        run = partial(self._banded().rows, provider, start, read)
        return self.follow(Invocation(self._program, self._program.bind(size, *args, **kwargs), sizes), run)

    def _banded(self) -> Bands:
        if self._bands is None:
            raise InvalidInput(
                "the network runs whole.", next='make a copy with a memory: net.optimize(memory="1.5GiB").'
            )
        return self._bands

    @property
    def counted(self) -> Program:
        """The counted program of the network that this copy was made from."""
        return self._counted[0].program

    def _counted_on(self, program: Program) -> Program:
        counted: Program = program.net.counted
        return counted

    def _follow(self, arguments: dict[str, Any], refusal: GuardFailed) -> Program:
        """Convert and optimise the network for calls that take another path."""
        if not self._unfused:
            raise refusal
        source = copy.copy(self._unfused[0])
        source._program = source._follow(arguments, refusal)
        copied = OptimizedModel(source, self._epilogues)
        copied._unfused, copied._unit = (), self._unit
        return copied.program

    def _set_on_original(self, name: str, value: Any) -> None:
        raise frozen_copy(f"{name} is set on an inference copy.")

    def _apply(self, fn: Any, recurse: bool = True) -> OptimizedModel:
        """Move or convert the modules as torch does, including the unfolded weights kept for other paths."""
        self._paths = {}
        for source in self._unfused:
            source._apply(fn, recurse)
        super()._apply(fn, recurse)
        return self

    def _optimize(self, fuse: bool) -> OptimizedModel:
        return self


def whole_program(net: object, refusal: str, next: str = "pass what cs.adaptify(...) gave.") -> Program:
    """Return the program of a network that is adaptive as a whole.

    Raises:
        InvalidInput: `net` is something else; `refusal` is the message, e.g. "has no stem to keep".
    """
    if isinstance(net, AdaptiveModel) and not net.hosts_part:
        return net.program
    why, method = "it is no network that is adaptive as a whole.", getattr(type(net), "converted_by", "")
    if method:
        why = f"it was made by {method}: what it computes is decided in the middle of a call."
        next = "run it where this package is, net.optimize(); or pass what cs.adaptify(...) gives of the same network."
    raise InvalidInput(f"{type(net).__name__} {refusal}.", why=why, next=next)


def pictures_for(net: nn.Module) -> Source:
    """Return the source of a network, by which pictures are normalised for it (`data.images.normalise`); masks then
    assume the same normalisation."""
    source = source_of(net)
    if isinstance(net, AdaptiveModel) and not net.hosts_part:
        net._unit.set_once(Normalisation(source.mean, source.std, "as pictures are prepared for it"))
    return source


def shapes_of(net: AdaptiveModel) -> dict[str, torch.Size]:
    """Return the shapes of the original's parameters by name."""
    return {name: parameter.shape for name, parameter in net.named_parameters() if not net.is_own(name)}


class _Last:
    """Lattices, or level maps, of the last calls: of each thread its own.

    Attributes:
        of_compiled: level map of a compiled call, if that was the last one; a compiler follows no values of threads.
    """

    def __init__(self) -> None:
        self.of_compiled: Tensor | None = None
        self._of_all: Lattice | Tensor | None = None
        self._own = local()

    def note(self, lattice: Lattice | Tensor) -> None:
        """Remember a call of this thread."""
        self._own.lattice = self._of_all = lattice
        self.of_compiled = None

    def read(self) -> Lattice | Tensor | None:
        """Return what this thread noted; if it noted nothing, what any other did."""
        return getattr(self._own, "lattice", self._of_all) if self.of_compiled is None else self.of_compiled

    def __reduce__(self) -> Any:
        return _Last, ()


def _value_of(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else repr(value)


# Submodules that the original does not have.
_OWN = ("_mask_provider.", f"{ADAPTERS}.")


# What is done by a converted network instead of what libraries call so.
_INSTEAD = {
    "save_pretrained": 'cs.save(net, "net.safetensors"), and cs.load("net.safetensors") to read it back',
    "push_to_hub": 'cs.push(net, "user/name")',
    "fuse": "net.optimize()",
    "export": 'cs.export(net, image, "net.onnx")',
    "info": "print(net.plan)",
}


def _not_converted(original: nn.Module, name: str) -> NotConverted:
    """Return the error for a method of the original network."""
    instead = _INSTEAD.get(
        name, f"call the converted network, or the method of the network as given: model.{name}"
    )
    return NotConverted(
        f"{name} is a method of {type(original).__name__}, not of the converted network.",
        why="it may run the network as it was given, without its mask.",
        next=f"{instead}.",
    )


def _without_own(model: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Remove mask and adapters from a state dict, so that it is the original's; `save` stores them separately."""
    for name in [name for name in state if name.removeprefix(prefix).startswith(_OWN)]:
        del state[name]


def _drop_cached(net: nn.Module, _: Any) -> None:
    """Drop values cached for other weights: the verification ran the network on those of the conversion."""
    drop_cached(net)


def _forget_other_paths(model: nn.Module, keys: Any) -> None:
    """Drop the unfolded weights after folded weights were loaded: other paths can no longer be converted."""
    assert isinstance(model, OptimizedModel)
    model._unfused, model._paths = (), {}


def _is_data(name: str, value: Any) -> bool:
    """True if an attribute of a network is public and neither a module nor a tensor."""
    return not name.startswith("_") and not isinstance(value, (nn.Module, Tensor))
