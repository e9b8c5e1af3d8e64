"""The two main functions: `plan`, the dry run, and `adaptify`, the conversion."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from cadsurgery.data.networks import license_of, source_of, stated_statistics
from cadsurgery.elements.lattice import Anchor, Fill, Geometry, Patch, Pool, Statistics
from cadsurgery.following.arguments import image_of, outside_inference_mode
from cadsurgery.following.facts import Facts
from cadsurgery.following.hooks import copying, take_over, why_not_copied
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.masks.unit import Normalisation, estimate, is_picture, read_normalisation
from cadsurgery.network.adaptive_part import Example, traceable_part
from cadsurgery.network.conversion import carry_out
from cadsurgery.network.hosted import HostedModel, check_used
from cadsurgery.network.invocations import find_lattice
from cadsurgery.network.macs import PICTURE, count_planned
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.network.unconvertible import check_network
from cadsurgery.support.defaults import DEFAULT_MASK
from cadsurgery.support.errors import CadError, CannotConvert, InvalidInput, describe_error, warn
from cadsurgery.support.progress import Step, waiting
from cadsurgery.surgery.decide import FLOOR, floors_prospect, make_plan
from cadsurgery.surgery.flow import Flow
from cadsurgery.surgery.plan import Outputs, Plan
from cadsurgery.surgery.verify import Case, measure_effect, verify

_LITTLE_SAVED = 0.9  # floors that leave more of the MACs than this are not named in errors


def plan(
    model: nn.Module,
    output_stride: tuple[int, int] | None = None,
    region: str | Sequence[str] = "auto",
    example_input: Example | None = None,
    outputs: Outputs = "fine",
    coarsest: int | None = None,
) -> Plan:
    """Plan a conversion without carrying it out: `print(plan)` shows every node's decision and reason.

    Args:
        model: a convolutional network; it is not changed.
        output_stride: (high, low); see `adaptify`.
        region: see `adaptify`.
        example_input: an image batch (B, C, H, W) that the network accepts, or all arguments of a call: a tuple of
            positional arguments, or a dictionary by name; default: small random images.
        outputs: see `adaptify`.
        coarsest: see `adaptify`.

    Raises:
        CannotConvert: the network cannot be traced, or has nothing that can be made adaptive.
        InvalidInput: an impossible output stride; the possible ones are listed.
    """
    whole = copy_network(model)
    path, facts = traceable_part(whole, example_input)
    if path:
        check_used(whole, path, facts.example)
    _refuse_both(output_stride, coarsest)
    chosen, flow = _plan_or_name_floors(facts, output_stride, _within(path, region), path, outputs, coarsest)
    with contextlib.suppress(Exception):  # a plan stands even where its work cannot be counted
        geometry = Geometry(chosen.stage_strides, chosen.max_level, floors=chosen.floors)
        program = carry_out(chosen, flow, geometry)
        chosen = _with_work(AdaptiveModel(facts.model, program, "none"), facts, example_input is None).plan
    return _with_prospect(chosen, facts)


def _refuse_both(output_stride: object, coarsest: object) -> None:
    if output_stride is not None and coarsest is not None:
        raise InvalidInput(
            f"output_stride={output_stride!r} and coarsest={coarsest!r} are two conversions.",
            why="the first makes maps finer than those of a strided network, or coarser down to strides that it had; "
            "the second keeps the network's own grid and makes maps coarser than it.",
            next="give one of them.",
        )


def _plan_or_name_floors(
    facts: Facts,
    output_stride: tuple[int, int] | None,
    region: str | Sequence[str],
    part: str,
    outputs: Outputs,
    coarsest: int | None,
) -> tuple[Plan, Flow]:
    """Make the plan. Where nothing can be made finer and floors would save work, the error names them."""
    try:
        return make_plan(facts, output_stride, region, part, outputs, coarsest=coarsest)
    except CannotConvert as refusal:
        prospect = None
        with contextlib.suppress(CadError):
            if coarsest is None and make_plan(facts, None, region, part, outputs, coarsest=FLOOR):
                prospect = floors_prospect(facts, region, PICTURE)
        if prospect is None or prospect.nothing_kept > _LITTLE_SAVED:
            raise
        parts = {name: getattr(refusal, name) for name in ("where", "why")}
        next_step = f"{prospect.describe()}. Otherwise {refusal.next}"
        raise CannotConvert(refusal.what, **parts, next=next_step) from refusal


def _with_prospect(plan: Plan, facts: Facts) -> Plan:
    """Complete a plan with what floors would save instead."""
    if plan.floors:
        return plan
    size = plan.work.shape[2:] if plan.work is not None else PICTURE
    with contextlib.suppress(Exception):  # an estimate; the plan stands without it
        return replace(plan, prospect=floors_prospect(facts, plan.region, size))
    return plan


def _with_work(net: AdaptiveModel, facts: Facts, is_example: bool) -> AdaptiveModel:
    """Complete the plan of a network with its work."""
    net.restate(replace(net.plan, work=count_planned(net.program, facts.arguments, is_example)))
    return net


@outside_inference_mode
def adaptify(
    model: nn.Module,
    mask: object = DEFAULT_MASK,
    *,
    output_stride: tuple[int, int] | None = None,
    coarsest: int | None = None,
    region: str | Sequence[str] = "auto",
    anchor: Anchor = "corner",
    fill: Fill = "linear",
    pool: Pool = "atrous",
    patch: Patch = "quadtree",
    statistics: Statistics = "area",
    outputs: Outputs = "fine",
    normalisation: object = None,
    example_input: Example | None = None,
    strict: bool = False,
    verify_laws: bool = True,
) -> AdaptiveModel:
    """Convert a network to content-adaptive downsampling (Hesse et al., CVPRW 2023, Fig. 8c).

    Features stay at the high output stride where the mask says so and are downsampled elsewhere, in one
    pass, with the same weights and receptive field. The argument is not changed; parameters keep names
    and values.

    Args:
        model: a convolutional network, strided or already dilated. If torch.fx cannot follow the whole network, as in
            a detector, its backbone is converted inside it: the part of that name, or the largest that reads an image.
        mask: a name (`"edges"`, `"edges:threshold=0.15,dilation=11"`, `"all"`, `"none"`, `"random"`), a
            provider, a callable image -> map, or a tensor; see `list_masks`.
        output_stride: (high, low), input pixels per sample where the mask is high and elsewhere. Default:
            (native / 4, native) for a strided network, (current, undilated) for a dilated one.
        coarsest: keep every map on the network's own grid where the mask says so, and compute none finer than so many
            input pixels elsewhere: for pictures that are mostly empty. Instead of `output_stride`.
        region: part of the network that runs on elements. `"auto"` extends it as far as there are rules and the taps
            of windows fall on cells, `"heads"` also through windows of a dilated network whose taps are closer
            together, `"backbone"` ends it with the backbone (as published); or a list of node or module names.
        anchor: `"corner"`, or `"center"` to reproduce the published code and its checkpoints.
        fill: interpolation inside a cell: `"linear"`, `"nearest"` (as published), or `"guided"`: linear, but where a
            map leaves the region a pixel takes more from neighbours whose input features are similar to its own.
        pool: `"atrous"`, or `"drop"` to pass kept elements through max-pool stages (as published).
        patch: shape of the areas kept high, `"quadtree"` or `"block"` (as published).
        statistics: weights of elements in batch norm's training statistics: their `"area"`, or the same for each
            `"element"` (as published).
        outputs: size of maps that leave the region and are returned unchanged: `"fine"`, one sample per high
            output stride, or `"native"`, the size in the original network. Maps that the network itself resizes keep
            their size.
        normalisation: (mean, std), numbers or one per channel, by which pictures in 0..1 are normalised for the
            network. Masks undo it, so that their thresholds mean the same on every network (`masks.unit`). Default: the
            values of its library or `pretrained_cfg`, else an estimate from `example_input` or from the first picture
            of a call; see `net.normalisation`. `"raw"`: masks read the input unchanged.
        example_input: an image batch (B, C, H, W) to plan and verify on, or all arguments of a call: a tuple of
            positional arguments, or a dictionary by name; default: small random images. Of a network that takes pairs
            or clips in one tensor (B, T, C, H, W), that tensor.
        strict: raise an error if an operation without a rule ends the region, or if masks have no effect on the
            outputs; otherwise the latter is a `CadWarning`.
        verify_laws: verify on the example that uniform level maps give the dense networks exactly.

    Returns:
        An `AdaptiveModel`, in the training or evaluation mode of `model`.

    Raises:
        CannotConvert: nothing can be made adaptive, or a condition of `strict` is not met.
        InvalidInput: an impossible option; the message lists the possible ones.
        UnknownName: an unknown mask, option or region; the message lists the closest names.
    """
    provider = resolve_mask(mask)
    with waiting() as step:
        step("tracing the network")
        whole = copy_network(model)
        path, facts = traceable_part(whole, example_input)
        if path and verify_laws:
            check_used(whole, path, facts.example)
        _refuse_both(output_stride, coarsest)
        chosen, flow = _plan_or_name_floors(
            facts, output_stride, _within(path, region), path, outputs, coarsest
        )
        if strict:
            _refuse_barriers(chosen)
        geometry = Geometry(
            chosen.stage_strides,
            chosen.max_level,
            fill,
            anchor,
            pool,
            patch,
            statistics,
            floors=chosen.floors,
        )
        program = carry_out(chosen, flow, geometry)
        net = AdaptiveModel(facts.model, program, provider)
        net.source = getattr(model, "cad_source", None)
        _set_unit(net, whole if path else model, path, normalisation, example_input is not None, facts)
        if normalisation is not None and not path and net.source is not None:
            net.source = source_of(net)  # pictures are prepared as was said
        take_over(net, facts.model)
        if example_input is not None:
            _report_empty_mask(net, facts)
        if verify_laws:
            chosen = _verify_and_measure(net, facts, step)
            _with_work(net, facts, example_input is None)
        if chosen.hardly_matters:
            chosen = _with_prospect(chosen, facts)
            _report_no_effect(chosen, strict and not chosen.matters)
        made = HostedModel(whole, path, net) if path else net
        made.license = license_of(model)
        return made


def _verify_and_measure(net: AdaptiveModel, facts: Facts, step: Step) -> Plan:
    """Verify the laws and measure what masks change; return the plan with that."""
    with facts.forgetting():
        case = Case.of(facts, net.program.graph, net.plan, net.geometry)
        step("verifying that uniform maps give the dense networks")
        net.checks = verify(case)
        step("measuring what the mask changes")
        net.restate(net.plan.measured(measure_effect(case)))
    return net.plan


def _set_unit(
    net: AdaptiveModel, model: nn.Module, path: str, normalisation: object, has_example: bool, facts: Facts
) -> None:
    """Set the normalisation of a network's input: from the argument, a statement, or an estimate on the example."""
    channels = net.plan.example_shape[1]
    stated_unit: Normalisation | None = None
    if normalisation is not None:
        stated_unit = read_normalisation(normalisation, channels)
    elif path:  # the host normalises the input of the part, as torchvision's detectors do
        transform = getattr(model, "transform", None)
        parts = [getattr(transform, name, None) for name in ("image_mean", "image_std")]
        if all(isinstance(part, (list, tuple)) for part in parts):
            mean, std = (tuple(part or ()) for part in parts)
            stated_unit = Normalisation(mean, std, "stated by its transform")
    elif stated := stated_statistics(model):
        stated_unit = Normalisation(*stated)
    elif has_example:
        stated_unit = estimate(image_of(facts.arguments))
    net._unit.set_once(stated_unit)


def _report_empty_mask(net: AdaptiveModel, facts: Facts) -> None:
    """Warn if a mask with a threshold keeps nothing of the example, and name contrast and threshold."""
    program, mask = net.program, net.mask
    unasked = not mask.sees_image or mask.sees_features or mask.dependence or mask.looks_ahead
    if unasked or not is_picture(program.image(facts.arguments).detach().float()):
        return
    masking = program.masking(mask)
    try:
        with facts.forgetting():
            lattice = find_lattice(program, masking, program.bind(**facts.arguments))
        contrasts = masking.contrasts(program.image(facts.arguments))
    except CadError:  # what does not fit is refused where the mask is used
        return
    keeps_some = bool((lattice.pyramid.levels < program.geometry.max_level).any())
    if keeps_some or not contrasts:
        return
    part, largest, threshold = contrasts[0]
    refusal = InvalidInput(
        f"mask {mask.spec()} keeps nothing of the example.",
        why=f"{part.name} finds a contrast of at most {largest:.3g} in it, and its threshold is {threshold:.3g}, in "
        f"the unit of masks: {net.normalisation or 'the input as it comes'}.",
        next="state how your pictures are normalised, adaptify(normalisation=(mean, std)) with mean and standard "
        f"deviation of your pictures in 0..1, or lower the threshold; options of {part.name}: cadsurgery list masks.",
    )
    warn(str(refusal))


def _within(path: str, region: str | Sequence[str]) -> str | Sequence[str]:
    """Return the requested region; "auto" if the converted part itself is the requested backbone."""
    return "auto" if path and region == "backbone" else region


def copy_network(model: object) -> nn.Module:
    """Return a deep copy of a network, with every module in its own mode."""
    model = check_network(model)
    try:
        clone = copy.deepcopy(model, copying(model))
    except Exception as error:  # objects that a network holds may raise any error
        raise CannotConvert(
            f"{type(model).__name__} cannot be copied, and a conversion leaves the network itself as it is.",
            where=why_not_copied(model),
            why=describe_error(error),
            next="take that attribute off before the conversion, or give its class a __deepcopy__.",
        ) from error
    clone.train(model.training)  # copies of torchvision's feature extractors lose their mode
    for copied, module in zip(clone.modules(), model.modules(), strict=True):
        copied.training = module.training
    return clone


def _report_no_effect(plan: Plan, strict: bool) -> None:
    """Warn about a conversion whose masks have (almost) no effect; raise an error if strict."""
    what = "no mask can improve what this network returns: everything leaves the region at its native size."
    if plan.effect:
        what = f"masks hardly change what this network returns: {plan.effect_in_words}."
    elif plan.finest < plan.output_stride[1]:
        what = f"no mask can improve what this network returns: {plan.effect_in_words}."
    ends = plan.region_end[0].place if plan.region_end else ""
    why = 'keeping more high costs work; mask="none", the network itself, is as good and cheaper.'
    finer = ', return the maps finer with outputs="fine"' * (plan.returned == "native" and not plan.part)
    step = (
        f"convert the network together with what follows{finer}, or teach the operation that ends the region: "
        "see docs/extending.md."
    )
    if not plan.region_end:  # a decoder leads back to the high output stride
        why = (
            "its decoder leads back to the high output stride by transposed convolutions or pixel shuffles, "
            f"which read only samples of the network's own grid; {why}"
        )
        step = (
            "use the network as it is, or one whose decoder interpolates (nn.Upsample and a convolution); "
            "see docs/concepts/decoders.md."
        )
    if plan.effect:  # a small effect was measured
        why = (
            "on the example what is computed in the region hardly reaches the output, as in networks whose weights are "
            "not trained; keeping more high costs work."
        )
        step = (
            "convert it with its trained weights, and give an image of yours: example_input=image. If it stays so, "
            'use the network as it is, or mask="none".'
        )
    elif plan.effect is not None:
        step = (
            f"{step} Weights that are not trained can hide an effect: convert with trained ones to be sure."
        )
    if plan.prospect is not None:
        step = f"{step} And {plan.prospect.describe()}."
    refusal = CannotConvert(what, where=ends, why=why, next=step)
    if strict:
        raise refusal
    warn(str(refusal))


def _refuse_barriers(plan: Plan) -> None:
    barriers = plan.chosen("barrier")
    if barriers:
        first = barriers[0]
        raise CannotConvert(
            f"{first.node} ends the region.",
            where=first.place,
            why=f"{first.reason}; {plan.dense_after:.0%} of the MACs run dense after the region.",
            next='pass strict=False to accept that, or end the region on purpose: region="backbone" or names.',
        )
