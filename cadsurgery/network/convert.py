"""From a network to a program: reading it, carrying out a plan, and following a call that takes another way."""

from __future__ import annotations

import contextlib
import inspect

from torch import nn

from cadsurgery.elements.lattice import Geometry
from cadsurgery.network.program import Program
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.surgery.arguments import Arguments
from cadsurgery.surgery.decide import make_plan
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.flow import Flow
from cadsurgery.surgery.guards import GuardFailed
from cadsurgery.surgery.hooks import Watched, find_watched
from cadsurgery.surgery.plan import Plan
from cadsurgery.surgery.read import read
from cadsurgery.surgery.rewrite import rewrite, unchanged_graph
from cadsurgery.surgery.verify import verify


def carry_out(plan: Plan, flow: Flow, geometry: Geometry) -> Program:
    """The program that a plan makes of a network."""
    facts = flow.facts
    as_it_was = unchanged_graph(facts, plan) if plan.part and plan.identity_level is not None else None
    return Program(
        rewrite(flow, plan, guided=geometry.fill == "guided"),
        plan,
        geometry,
        inspect.signature(facts.model.forward),
        facts.container,
        as_it_was,
        _relied_on(facts, plan),
    )


def _relied_on(facts: Facts, plan: Plan) -> tuple[Watched, ...]:
    """The modules that stand for what was rewritten."""
    used = [node for node in facts.graph.nodes if node.op in ("call_module", "get_attr")]
    inside = {decision.node for decision in plan.decisions if decision.action in ("adapt", "keep")}
    operations = [str(node.target) for node in used if node.op == "call_module" and node.name in inside]
    return find_watched(facts.model, operations, [str(node.target) for node in used])


def convert_for_call(
    model: nn.Module, program: Program, arguments: Arguments, refusal: GuardFailed
) -> Program:
    """The program for calls that take another way through a network than the one it was converted on, verified.

    Args:
        model: the network as it was before.
        program: that it was converted to; the new one is bound to the same network.
        arguments: of such a call, by name.
        refusal: what its own program said.

    Raises:
        GuardFailed: the refusal, where that way is not exact, or cannot be converted with the same strides and the same
            level of its own.
    """
    net, plan = program.net, program.plan
    for kind in ("_parameters", "_buffers"):  # the network may have been moved
        vars(model)[kind].update({name: vars(net)[kind][name] for name in vars(model)[kind]})
    defaults = {name: one.default for name, one in program.signature.parameters.items()}
    call = {name: value for name, value in arguments.items() if value is not defaults[name]}
    try:
        facts = read(model, call, exactly=True)
        chosen, flow = _plan_like(plan, facts)
        if chosen.strides != plan.strides[: len(chosen.strides)]:
            raise refusal
        own = plan.identity_level
        if own is not None and chosen.identity_level != min(own, chosen.max_level):
            raise refusal  # the same level map would mean another network
        found = carry_out(chosen, flow, program.geometry)
        verify(facts.model, facts.graph, found.graph, chosen, program.geometry, facts.arguments)
    except CadError as error:
        raise refusal from (error if error is not refusal else None)
    return found.bind_to(net)


def _plan_like(plan: Plan, facts: Facts) -> tuple[Plan, Flow]:
    """The plan of another way through a network, on cells of the same sizes as far as it has them."""
    rest = (plan.region, plan.part, plan.returned)
    with contextlib.suppress(InvalidInput):
        chosen, flow = make_plan(facts, plan.output_stride, *rest)
        if chosen.strides == plan.strides:
            return chosen, flow
    high, coarsest = plan.output_stride[0], plan.output_stride[0]
    own = sorted(low for first, low in make_plan(facts, None, *rest)[0].possible if first == high)
    for ours, theirs in zip(plan.strides[1:], own, strict=False):
        if ours != theirs:
            break
        coarsest = ours
    return make_plan(facts, (high, min(coarsest, plan.output_stride[1])), *rest, coarsest=coarsest)
