"""What of a network is converted: the whole or, where torch.fx cannot follow that, the part that reads its image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.following.arguments import (
    Arguments,
    bind,
    bind_example,
    image_of,
    run_forward,
    take_image,
    with_another_batch,
)
from cadsurgery.following.call_entry import call_by_name, signature_of
from cadsurgery.following.equivalence import Pair
from cadsurgery.following.facts import EXAMPLE_SIZES, Facts, OtherFunction, default_examples
from cadsurgery.following.guards import GuardFailed, is_guard
from cadsurgery.following.module_state import left_as_it_is
from cadsurgery.following.trace import CannotFollow, evaluating
from cadsurgery.masks.masking import check_image
from cadsurgery.network.alternatives import name_alternatives, name_switch
from cadsurgery.network.hosted import reach
from cadsurgery.support.errors import CadError, CannotConvert, InvalidInput, warn
from cadsurgery.support.torch_internals import tree_leaves, tree_map_only
from cadsurgery.surgery.decide import make_plan
from cadsurgery.surgery.refusals import BACKBONE_NAMES
from cadsurgery.surgery.rules import read

_LEAST_SHARE = 0.5  # of a network's convolution weights, in a part that is converted in place of the whole

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class CallOfPart:
    """An example of the call of a part, where it is known already which part of a network is converted.

    Attributes:
        path: name of the part in the network.
        example: an image batch or arguments by name, as the part takes them.
    """

    path: str
    example: Tensor | dict[str, Any]


Example = Tensor | tuple[Any, ...] | dict[str, Any] | CallOfPart


class _TakesSeveralImages(CannotConvert):
    """The network takes the images of a pair or clip in one tensor."""


def traceable_part(model: nn.Module, example_input: Example | None) -> tuple[str, Facts]:
    """Return name and facts of the part of a model that can be traced: the model itself ("") or its backbone.

    The backbone is the part with a usual name or, without one, the largest part that the network calls with an image.

    Raises:
        CannotConvert: there is no such part, or it does not run on the example.
    """
    if isinstance(example_input, CallOfPart):
        try:
            part = model.get_submodule(example_input.path)
        except AttributeError as error:
            kind = type(model).__name__
            raise CannotConvert(
                f"{kind} has no {example_input.path}.", next="give the network that has it."
            ) from error
        return example_input.path, read(part, bind_example(part, example_input.example))
    example = None
    try:
        if example_input is not None:
            if isinstance(example_input, Mapping):  # e.g. what a preprocessor gives
                example_input = dict(example_input)
            _check_alone(example_input)
            example = bind_example(model, example_input)
            _check(example, example_input)
        facts = read(model, example)
        return _part_for_any_batch(model, facts) or ("", facts)
    except (CannotFollow, OtherFunction, _TakesSeveralImages) as error:
        refusal: CannotConvert = error
        found = _named_part(model, example) or _largest_part(model, example)
        takes_none = example is None and not _takes_an_example(model)
        if takes_none:
            refusal = _without_example(model, refusal)
        if found is None:
            raise (refusal if takes_none else name_alternatives(model, refusal, example)) from error
        switch = None if takes_none else name_switch(model, refusal, example)
        if takes_none or switch:
            what = f"of {type(model).__name__} only its {found[0]} becomes adaptive."
            next = refusal.next if takes_none else f"keep that, or convert the whole network {switch}."
            warn(str(CannotConvert(what, where=refusal.where, why=refusal.why, next=next)))
        return found
    except CannotConvert as refusal:
        if example_input is not None:
            raise
        raise name_alternatives(model, refusal) from refusal


def _takes_an_example(model: nn.Module) -> bool:
    """True if a network runs on one of the examples that are tried where none is given."""
    for call in (call for one in default_examples(model) for call in _calls_like(model, one)):
        with contextlib.suppress(Exception), left_as_it_is(model), evaluating(model), torch.no_grad():
            _run(model, call)
            return True
    return False


def _without_example(model: nn.Module, refusal: CannotConvert) -> CannotConvert:
    """Return the refusal of a network that takes none of the examples."""
    sizes = ", ".join(f"{height} x {width}" for height, width in EXAMPLE_SIZES)
    return CannotConvert(
        f"{type(model).__name__} runs on none of the examples that are tried, images of {sizes}.",
        where=refusal.where,
        why=refusal.why,
        next="pass example_input=, a batch of images that it takes, or all arguments of a call as a tuple or a "
        "dictionary.",
    )


def _check_alone(example_input: object) -> None:
    """Refuse an example that is neither arguments nor an image batch, before a network is asked what it takes."""
    if not isinstance(example_input, (tuple, dict)) and not _has_several_images(example_input):
        check_image(example_input, "example_input")


def _check(example: Arguments, example_input: object) -> None:
    """Check the arguments of the example's call.

    Raises:
        InvalidInput: no image batch with values is among them.
        _TakesSeveralImages: an argument has more axes than an image batch, and none is an image batch.
    """
    image = image_of(example)
    try:
        check_image(image, "example_input")
    except InvalidInput as refusal:
        if not _has_several_images(example_input):
            raise
        why = "the images of a pair or clip come in one tensor; a mask says where one image keeps its resolution."
        raise _TakesSeveralImages(refusal.what, why=why, next=refusal.next) from refusal
    if image.is_meta:
        raise InvalidInput("example_input has no values: it is on the meta device.", next="give an image.")


def _has_several_images(example_input: object) -> bool:
    return any(isinstance(value, Tensor) and value.dim() > 4 for value in tree_leaves(example_input))


def _part_for_any_batch(model: nn.Module, facts: Facts) -> tuple[str, Facts] | None:
    """Return the part that reads the image, where the network can be followed for the batch of the example alone, as
    one that gathers what it finds in each image; None if it can be followed for others, or has no such part."""
    guards = [node for node in facts.graph.nodes if is_guard(node)]
    other = with_another_batch(facts.arguments) if guards else {}
    try:
        if guards:
            Pair(model, facts.graph).run_graph(other)
        return None
    except GuardFailed:
        try:
            read(model, other)
            return None
        except CannotFollow:
            return _named_part(model, facts.arguments) or _largest_part(model, facts.arguments)
        except CannotConvert:
            return None
    except Exception:  # the network may refuse another batch with any error
        return None


# -- the part that reads the image ------------------------------------------------------------------------


def _named_part(model: nn.Module, example: Arguments | None) -> tuple[str, Facts] | None:
    """Return name and facts of the part that has the name of a backbone in common libraries, if it can be traced."""
    for name in BACKBONE_NAMES:
        part = getattr(model, name, None)
        if isinstance(part, nn.Module):
            call = example and _example_of_part(model, part, example)
            with contextlib.suppress(CannotFollow, OtherFunction):
                if example is None or call is not None:
                    return name, read(part, call)
    return None


def _example_of_part(model: nn.Module, part: nn.Module, example: Arguments) -> Arguments | None:
    """Return the arguments of a call of a part: the image or, if the part does not take that, the map that the network
    makes of it, as a detector resizes its images; None if the image is several and the network makes no map of it."""
    image = image_of(example)
    arguments = take_image(part, image)
    with left_as_it_is(model), evaluating(model), torch.no_grad():
        try:
            run_forward(part, arguments)
        except Exception:  # the part may refuse the image with any error
            for call in _calls_like(model, example):
                with contextlib.suppress(Exception):
                    if (reached := reach(part, _run, model, call)) is not None:
                        return bind(part, *reached.inputs, **reached.named)
    return arguments if image.dim() == 4 else None


def _run(model: nn.Module, arguments: Arguments) -> Any:
    """Call a network, with the hooks of the network itself, which may prepare what its parts get."""
    return call_by_name(model, signature_of(model), tree_map_only(Tensor, Tensor.clone, arguments))


def _calls_like(model: nn.Module, example: Arguments) -> Iterator[Arguments]:
    """Yield an example, and a call with its image as a list, as detectors take images."""
    yield example
    if isinstance(image := image_of(example), Tensor):
        yield take_image(model, list(image))


def _largest_part(model: nn.Module, example: Arguments | None) -> tuple[str, Facts] | None:
    """Return name and facts of the largest part that reads an image, has most of the network's convolution weights, and
    can be converted; None if there is none."""
    least = _LEAST_SHARE * _convolution_weights(model)
    parts = {
        path: part
        for path, part in model.named_modules()
        if path and _convolution_weights(part) >= least and _is_strided(part)
    }
    calls = _received(model, parts, example)
    for path in sorted(calls, key=lambda path: -_convolution_weights(parts[path])):
        received, named = calls[path]
        with contextlib.suppress(CadError):
            facts = read(parts[path], bind(parts[path], *received, **named))
            make_plan(facts)
            return path, facts
    return None


def _convolution_weights(module: nn.Module) -> int:
    layers = (part for part in module.modules() if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)))
    return sum(layer.weight.numel() for layer in layers)


def _is_strided(module: nn.Module) -> bool:
    """True if more than one convolution of a module halves a map."""
    return sum(isinstance(part, nn.Conv2d) and max(part.stride) > 1 for part in module.modules()) > 1


def _received(model: nn.Module, parts: Mapping[str, nn.Module], example: Arguments | None) -> dict[str, Call]:
    """Return the arguments of the first call of each part that a network calls with an image, in a call of the
    network that succeeds."""
    examples = [example] if example is not None else default_examples(model) if parts else []
    for call in (call for one in examples for call in _calls_like(model, one)):
        found: dict[str, Call] = {}
        handles = [
            part.register_forward_pre_hook(partial(_note, found, path), with_kwargs=True)
            for path, part in parts.items()
        ]
        try:
            with left_as_it_is(model), evaluating(model), torch.no_grad():
                _run(model, call)
        except Exception:  # the network may refuse its input with any error
            continue
        finally:
            for handle in handles:
                handle.remove()
        images = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim() >= 3]
        channels = {image.shape[-3] for image in images}
        return {path: call for path, call in found.items() if _channels_of(call) in channels}
    return {}


def _note(
    found: dict[str, Call], path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    found.setdefault(path, (args, kwargs))


def _channels_of(call: Call) -> int:
    """Return the number of channels of the first value of a call, if that is a map; else 0."""
    value = next(iter((*call[0], *call[1].values())), None)
    if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
        return 0
    return value.shape[1]
