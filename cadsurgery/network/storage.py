"""Save and load converted networks: safetensors for tensors, JSON metadata for everything else."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cadsurgery.data.hub import fetch, is_address
from cadsurgery.data.networks import Source, build_again, channels_of, license_of
from cadsurgery.following.arguments import example_of, outside_inference_mode, values_of
from cadsurgery.masks import FixedMask, MaskProvider, resolve_mask
from cadsurgery.masks.spec import parse
from cadsurgery.masks.unit import Normalisation, Unit
from cadsurgery.network.adapters import MEANS, REFINEMENTS, adapter_kind
from cadsurgery.network.adaptify import adaptify, copy_network
from cadsurgery.network.adaptive_part import CallOfPart
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.unconvertible import check_network
from cadsurgery.support import files, kinds
from cadsurgery.support.errors import FileError, InvalidInput, first_line
from cadsurgery.support.files import as_file_error, write_whole
from cadsurgery.support.plain import check_fields
from cadsurgery.support.provenance import import_nothing_for, versions
from cadsurgery.surgery.plan import Plan

FORMAT = 3  # no release wrote the two before
KEY = kinds.CONVERTED_KEY
METHOD = "method"  # metadata key: name of the method, if the network was made by another one than adaptify
AGAIN = "fetch the file again, or write it again with cs.save."
_CHECKSUM = "sha256"  # metadata key: checksum of the other metadata, which include the tensors' checksum
_MASK = "cadsurgery.mask."  # prefix of the mask's tensors
_ADAPTERS = "cadsurgery.adapters."  # prefix of the adapters' tensors
_NO_MASK = "a function or provider of your own, which a file cannot hold"
LONGEST = 2**25  # limit of metadata characters and of example values in a file that the user does not trust
OTHER_MODEL = "pass the architecture it was converted from."
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OF_GEOMETRY = ("anchor", "fill", "pool", "patch", "statistics")
_OPTIONS = {
    "output_stride": tuple[int, int],
    "region": str | tuple[str, ...],
    **{name: hint for name, hint in get_type_hints(adaptify).items() if name in (*_OF_GEOMETRY, "outputs")},
}


def pack(net: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the content of a converted network's file: tensors by name, and metadata as plain values.

    Raises:
        InvalidInput: the network is not converted, or an optimised copy.
    """
    if not isinstance(net, AdaptiveModel):
        raise InvalidInput(
            f"{type(net).__name__} is not a converted network.",
            next="save what cs.adaptify gave; of another network torch.save(model.state_dict(), path).",
        )
    net.check_storable()
    net.program.check_modules()
    tensors = net.state_dict()
    for prefix, part in ((_MASK, net.mask), (_ADAPTERS, net.adapters)):
        values = part.state_dict() if part is not None else {}
        tensors |= {f"{prefix}{name}": value for name, value in values.items()}
    # A network by name would be built with the shapes that it had at first.
    source = None if net.has_other_shapes else net.source
    return tensors, {
        "mask": net.mask.spec() if net.mask.storable else None,
        "normalisation": net.normalisation and net.normalisation.to_dict(),
        **describe(net, tensors, source, _options_of(net), _plan_of(net)),
    }


def describe(
    net: nn.Module, tensors: Mapping[str, Tensor], source: Source | None, options: dict[str, Any], plan: Any
) -> dict[str, Any]:
    """Return the metadata that the files of all methods have, as plain values."""
    return {
        "format": FORMAT,
        "versions": versions(),
        "source": source.to_dict() if source is not None else None,
        "options": options,
        "plan": plan.to_json(),
        "tensors": checksum(tensors),
        **({"license": stated} if (stated := license_of(net)) else {}),
    }


def _options_of(net: AdaptiveModel) -> dict[str, Any]:
    """Return the options of `adaptify` with which the network was made."""
    return {
        "output_stride": net.plan.output_stride,
        "region": net.plan.region,
        **{name: getattr(net.geometry, name) for name in _OF_GEOMETRY},
        "outputs": net.plan.returned,
    }


def _plan_of(net: AdaptiveModel) -> Plan:
    """Return the plan of what runs: made anew if modules of other shapes were put in after the conversion.

    Raises:
        InvalidInput: these modules are in the adaptive part of a network that runs its own code.
    """
    if not net.adaptive_part.has_other_shapes:
        return net.plan
    if net.hosts_part:
        raise InvalidInput(
            f"parameters of {net.plan.part} have other shapes than at the conversion.",
            why="the file would hold the plan of the shapes before.",
            next="change the network first and convert it then: cs.adaptify(model).",
        )
    model, present = copy_network(net._original[0]), copy.deepcopy(net)
    for kind in ("_modules", "_parameters", "_buffers"):
        own, now = getattr(model, kind), getattr(present, kind)
        own.update({name: now[name] for name in own if name in now})
    example = example_for(net.plan, model)
    return adaptify(model.eval(), "none", **_options_of(net), example_input=example, verify_laws=False).plan


def example_for(plan: Any, model: nn.Module) -> Any:
    """Return an example of a plan (of any method) for a conversion, in the type of the network."""
    zeros = torch.zeros(plan.example_shape, dtype=next((p.dtype for p in model.parameters()), torch.float32))
    example = example_of(plan.call) if plan.call else zeros
    return CallOfPart(plan.part, example) if plan.part else example


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write copies of tensors to a safetensors file, atomically.

    Raises:
        FileError: the path cannot be written.
    """
    copies = {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}
    with write_whole(path) as temporary:
        try:
            save_file(copies, temporary, metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error


@outside_inference_mode
def load(
    path: str | Path, model: nn.Module | None = None, *, mask: object = None, trust: bool = False
) -> AdaptiveModel:
    """Load an adaptive network from a file of `save` or `push`; see `cadsurgery.load`."""
    if model is not None:
        check_network(model)
    header, tensors = open_file(path, True)
    return unpack(path, check_metadata(path, header), tensors, model, mask=mask, trust=trust)


def unpack(
    path: str | Path,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    model: nn.Module | None = None,
    *,
    mask: object = None,
    trust: bool = False,
) -> AdaptiveModel:
    """Rebuild the network from the content that `pack` returned, in evaluation mode; see `load`.

    Args:
        path: path of the file, for messages.
        values: the metadata.
        tensors: the tensors.
        model, mask, trust: see `load`.

    Raises:
        FileError: see `load`.
    """
    mask = None if mask is None else resolve_mask(mask)
    stated = read_stored(path, values, Adaptive, tensors, trust)
    mask_tensors, adapter_tensors = (
        {name[len(prefix) :]: tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
        for prefix in (_MASK, _ADAPTERS)
    )
    _check_kinds(path, adapter_tensors, stated)
    if mask is None and (spec := stated.fields["mask"]) is not None:
        mask = stored_mask(path, spec, mask_tensors, trust)
    if mask is None:
        raise FileError(
            f"{path} was saved with {_NO_MASK}.",
            next='give one: cs.load(path, mask="edges" or your function).',
        )
    source, stored = stated.source, stated.plan
    if model is None:
        model = build_stated(path, source, tensors)
    net = _convert_again(path, model, mask, stated)
    net.adaptive_part.restate(replace(net.plan.measured(stored.effect), work=stored.work))
    fill(path, net, tensors)
    if adapter_tensors:
        with as_file_error(f"the adapters in {path} do not fit the model.", OTHER_MODEL):
            fill(path, _add_adapters(net, adapter_tensors), adapter_tensors, "adapters")
    net.adaptive_part.use_channels_last()
    net.source = source and replace(source, channels=channels_of(net))
    net.license = stated.fields["license"]
    if (normalisation := stated.fields["normalisation"]) is not None:
        net._unit = Unit(normalisation)
    return net


def _convert_again(path: str | Path, model: nn.Module, mask: MaskProvider, stated: Stored) -> AdaptiveModel:
    """Convert a model as a file says.

    Raises:
        FileError: the model has another plan than the file.
    """
    stored = stated.plan
    options = {**stated.options, "output_stride": stored.output_stride}
    if stored.floors:
        options = {**options, "output_stride": None, "coarsest": stored.output_stride[1]}
    with as_file_error(f"{path} does not fit this model.", OTHER_MODEL):
        example = example_for(stored, model)
        net = adaptify(model.eval(), mask, **options, example_input=example, verify_laws=False)
    if net.plan != stored:
        raise FileError(
            f"{path} holds another plan than this model gives.",
            where=_first_difference(net.plan, stored),
            why=f"it was written with {_list(stated.fields['versions'])}; here are {_list(versions())}.",
            next="pass the model it was converted from, or convert again.",
        )
    return net


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read the metadata of a file, without its tensors.

    Raises:
        FileError: the file is missing, damaged or foreign.
    """
    values = check_metadata(path, open_file(path, False)[0])
    read_stored(path, values, Adaptive)
    return values


def read_method(path: str | Path) -> str:
    """Return the name of the method that made the network of a file; "" for `adaptify`.

    Raises:
        FileError: the file is missing, damaged or foreign.
    """
    return str(check_metadata(path, open_file(path, False)[0]).get(METHOD, ""))


def encode_with_checksum(metadata: Mapping[str, Any]) -> str:
    """Encode metadata with their checksum as one JSON text; safetensors does not keep the order of several texts."""
    return json.dumps({**metadata, _CHECKSUM: _hash(metadata)})


def _hash(metadata: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata).encode()).hexdigest()


@dataclass(frozen=True)
class Stored:
    """Metadata of a file, with every value converted to its type.

    Attributes:
        fields: all fields.
        options: the options of the method.
        plan: the plan of the network.
        source: where the network came from.
        trust: True if code that the file names may be imported, see `cadsurgery.load`.
    """

    fields: dict[str, Any]
    options: dict[str, Any]
    plan: Any
    source: Source | None
    trust: bool


_IN_FILE: dict[str, Any] = {  # of every method
    **{METHOD: str, "format": int, "versions": dict[str, str], "source": dict[str, Any] | None},
    **{"options": dict[str, Any], "plan": str, "tensors": str, "license": str},
}


class Adaptive:
    """What a file of an adaptive network holds, as `ConvertedModel` says it of other methods."""

    method, plan_type, option_types = "", Plan, _OPTIONS
    field_types: ClassVar[dict[str, Any]] = {"mask": str | None, "normalisation": Normalisation | None}


def read_stored(
    path: str | Path,
    values: Mapping[str, Any],
    kind: Any,
    tensors: Mapping[str, Tensor] | None = None,
    trust: bool = False,
) -> Stored:
    """Check the types of the metadata's values, and the tensors, if they are given.

    Args:
        path: path of the file, for messages.
        values: the metadata.
        kind: class of the method's networks; its `plan_type`, `option_types` and `field_types` say what a file holds.
        tensors: the tensors.
        trust: see `cadsurgery.load`.

    Raises:
        FileError: the file is damaged, or holds a network of another method; or the plan's example is too large to be
            created for a file that is not trusted.
    """
    with as_file_error(f"the metadata of {path} is damaged.", AGAIN):
        if values.get(METHOD, "") != kind.method:
            raise FileError(
                f"{path} holds a network of another method, {values[METHOD]!r:.60}.",
                why="an adaptive network is expected here.",
                next="cs.load(path) reads it; cadsurgery run, eval, macs and plan take it as it is.",
            )
        types = {**_IN_FILE, **kind.field_types}
        found = {METHOD: "", "license": "", "normalisation": None, **check_fields(values, types, "it")}
        fields = {name: found[name] for name in types}
        source = Source.from_dict(fields["source"]) if fields["source"] is not None else None
        options = check_fields(fields["options"], kind.option_types, "options")
        plan = kind.plan_type.from_json(fields["plan"])
    if tensors is not None:
        if fields["tensors"] != checksum(tensors):
            raise FileError(
                f"{path} is damaged.",
                why="its parameters are not those that were written: their checksum does not match.",
                next="fetch or write the file again.",
            )
        check_size(path, math.prod(plan.example_shape), trust)
        if plan.call:
            with as_file_error(f"the metadata of {path} is damaged.", AGAIN):
                check_size(path, values_of(plan.call), trust)
    return Stored(fields, options, plan, source and source.read_from(path, trust), trust)


def check_size(path: str | Path, values: int, trust: bool) -> None:
    """Refuse to allocate a very large number of values for an untrusted file.

    Raises:
        FileError: there are too many values, and the file is not trusted.
    """
    if values > LONGEST and not trust:
        raise FileError(
            f"the metadata of {path} is damaged.",
            why=f"an example of {values} values is too large to be made on the word of a file.",
            next="if you know the file, pass trust=True (--trust).",
        )


def check_width(path: str | Path, width: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse to create layers with more channels than any tensor of the file has.

    Raises:
        FileError: the layers would have more channels.
    """
    largest = max((side for value in tensors.values() for side in value.shape), default=0)
    if width > largest:
        raise FileError(
            f"the metadata of {path} is damaged.",
            why=f"it asks for layers of {width} channels, and no tensor in it has more than {largest}.",
            next=AGAIN,
        )


def open_file(path: str | Path, tensors: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and, with `tensors`, the tensors of a file."""
    place = fetch(str(path)) if is_address(path) else Path(path)
    if files.is_folder(place):
        kinds.check_kind(place, kinds.CONVERTED)
    if not files.is_file(place):
        raise files.absent(path)
    try:
        with safe_open(place, framework="pt") as file:
            header = file.metadata() or {}
            names = list(file.keys()) if tensors and KEY in header else []
            # Copied, because convolutions may round differently for the unaligned memory of a mapped file.
            values = {name: file.get_tensor(name).clone() for name in names}
    except Exception as error:  # of many types, e.g. for tensor types that torch does not have
        refusal = FileError(
            f"{path} is not a readable safetensors file.",
            why=f"{first_line(error)}; it may be truncated.",
            next="write it again with cs.save or cadsurgery convert.",
        )
        raise kinds.of_another_kind(path, kinds.CONVERTED) or refusal from error
    if KEY not in header:
        raise kinds.kind_refused(path, kinds.WEIGHTS, kinds.CONVERTED.words)
    return header, values


def check_metadata(path: str | Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Check the checksum and format of a file's metadata and return their values.

    Raises:
        FileError: the metadata are damaged, or were written by a later version or before the first release.
    """
    text = header[KEY]
    with as_file_error(f"the metadata of {path} is damaged.", AGAIN):
        if len(text) > LONGEST:
            raise ValueError(f"it has {len(text)} characters.")
        values = json.loads(text)
        checksum = values.pop(_CHECKSUM, None)
        if checksum is not None and checksum != _hash(values):
            raise ValueError("it is not what was written: its checksum does not match.")
        number = values["format"]
        if type(number) is int and number != FORMAT:
            raise FileError(
                f"{path} has format {number}, this version reads {FORMAT}.",
                next="update cadsurgery." if number > FORMAT else "convert the network again.",
            )
        if checksum is None:
            raise ValueError("it has no checksum.")
        return dict(values)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Return a checksum of the tensors' names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def build_stated(path: str | Path, source: Source | None, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Build the network that a file names.

    Raises:
        FileError: the file names no network, or it cannot be built.
    """
    if source is None:
        raise FileError(
            f"{path} does not say how to build its network.",
            why="the network was converted from a module, not by name, or given modules of other shapes since.",
            next="pass the original architecture: cs.load(path, model=...). On the command line a file needs a name: "
            "convert the network as module:function (cadsurgery convert module:function), and read the file with "
            "--trust.",
        )
    next = "pass the architecture it was converted from: cs.load(path, model=...)."
    with as_file_error(f"the network that {path} names cannot be built.", next, f"{source.name:.200}"):
        return build_again(source, tensors)


def stored_mask(path: str | Path, spec: str, tensors: dict[str, Tensor], trust: bool) -> MaskProvider | None:
    """Rebuild the mask of a spec with its tensors; None if the tensor of a fixed mask is missing."""
    other = 'give another mask: cs.load(path, mask="edges")'
    with contextlib.nullcontext() if trust else import_nothing_for(str(path)):
        next = f"register it first if it is one of your own, or {other}."
        with as_file_error(f"the mask in {path} cannot be made.", next, f"{spec:.200}"):
            mask = parse(spec, tensors=True)
    for name, part in mask.named_modules():
        if isinstance(part, FixedMask):
            key = f"{name}.levels".removeprefix(".")
            if key not in tensors:
                return None
            no_level = tensors[key].is_floating_point() or tensors[key].is_complex()
            if no_level or tensors[key].dim() not in (2, 3):
                raise FileError(
                    f"the tensor {key} of the mask in {path} is no level map.",
                    why=f"it is {tensors[key].dtype} of shape {tuple(tensors[key].shape)}.",
                    next=f"{other}.",
                )
            part.levels = tensors[key]
    _check_types(path, tensors, mask.state_dict())
    next = f"write the file again with cs.save, or {other}."
    with as_file_error(f"the tensors of mask {spec:.200} in {path} do not fit it.", next):
        mask.load_state_dict(tensors, assign=True)  # keeps the stored types
    return mask


def _add_adapters(net: AdaptiveModel, tensors: Mapping[str, Tensor]) -> nn.ModuleDict:
    """Add adapters of the stored kinds to a network."""
    kinds = {adapter_kind(name.partition(".")[0]): name for name in tensors}
    adapters = nn.ModuleDict()
    if REFINEMENTS in kinds:
        name = kinds[REFINEMENTS].partition(".")[0]
        adapters = net.add_refinement(len(tensors[f"{name}.mixed.weight"]))
    return net.add_mean_shifts() if MEANS in kinds else adapters


def _check_kinds(path: str | Path, tensors: Iterable[str], stated: Stored) -> None:
    """Refuse adapters of a kind that there is no longer."""
    if strange := [name for name in tensors if adapter_kind(name) is None]:
        version = _list(stated.fields["versions"])
        raise FileError(
            f"{path} has level adapters, which there are no longer.",
            where=f"{len(strange)} tensors, first {strange[0]}",
            why="trained, they gained nothing; what gained, a shift of means over the image, is "
            "cs.finetune.calibrate_means.",
            next=f"load it with the version that wrote it ({version}), or convert the network again.",
        )


def fill(
    path: str | Path, network: nn.Module, tensors: Mapping[str, Tensor], what: str = "parameters"
) -> None:
    """Load the tensors of a file into a network, with the stored types, e.g. bfloat16; none may be missing.

    Raises:
        FileError: the tensors do not fit the network.
    """
    expected = network.state_dict()
    _check_types(path, tensors, expected)
    with as_file_error(f"the {what} in {path} do not fit the model.", OTHER_MODEL):
        missing = [name for name in expected if name not in tensors]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        network.load_state_dict(tensors, assign=True)


def _check_types(path: str | Path, stored: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse integers where a network has floating-point numbers, and vice versa."""
    for name, value in stored.items():
        like = expected.get(name, value).dtype
        if value.dtype != like and not (value.dtype in _FLOATS and like in _FLOATS):
            raise FileError(
                f"the parameters in {path} do not fit the model.",
                where=name,
                why=f"it is {value.dtype}, in the model {like}.",
                next=OTHER_MODEL,
            )


def _list(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _first_difference(plan: Plan, stored: Plan) -> str:
    for new, old in zip(plan.decisions, stored.decisions, strict=False):
        if new != old:
            fields = [name for name, value in vars(old).items() if getattr(new, name) != value]
            changes = (f"{name} {getattr(old, name)!r}, now {getattr(new, name)!r}" for name in fields[:3])
            return f"{old.node} ({old.operation}): stored {'; '.join(changes)}"
    return f"{len(stored.decisions)} decisions stored, {len(plan.decisions)} now"
