"""Convert a network to a program: carry out a plan, and convert again for a call that takes another path."""

from __future__ import annotations

import contextlib

from torch import Tensor, fx, nn

from cadsurgery.elements.lattice import Geometry
from cadsurgery.following.arguments import Arguments, Inputs, outside_inference_mode
from cadsurgery.following.call_entry import signature_of
from cadsurgery.following.facts import Facts
from cadsurgery.following.graphs import called_modules
from cadsurgery.following.guards import GuardFailed
from cadsurgery.following.hooks import find_watched, parameter, prepare_weights
from cadsurgery.following.outside_values import Outside
from cadsurgery.following.tracer import is_constant
from cadsurgery.network.program import Program
from cadsurgery.support.errors import CadError, InvalidInput
from cadsurgery.surgery.decide import make_plan
from cadsurgery.surgery.flow import Flow
from cadsurgery.surgery.plan import Plan
from cadsurgery.surgery.rewrite import rewrite, unchanged_graph
from cadsurgery.surgery.rules import read
from cadsurgery.surgery.verify import Case, verify


def carry_out(plan: Plan, flow: Flow, geometry: Geometry) -> Program:
    """Build the program of a planned network."""
    runs_own = (plan.part or plan.floors) and plan.identity_level is not None
    unchanged = unchanged_graph(flow, plan) if runs_own else None
    used = [node for node in flow.graph.nodes if node.op in ("call_module", "get_attr")]
    inside = {decision.node for decision in plan.decisions if decision.on_elements}
    operations = [str(node.target) for node in used if node.op == "call_module" and node.name in inside]
    graph = rewrite(flow, plan, guided=geometry.fill == "guided")
    return Program(
        graph,
        plan,
        geometry,
        signature_of(flow.model),
        flow.container,
        unchanged,
        find_watched(flow.model, operations, [str(node.target) for node in used], _live(graph)),
        Inputs.of(flow.model, flow.arguments).kinds,
        Outside.of(
            flow.model,
            called_modules(graph),
            flow.caches.written if flow.caches is not None else (),
            any(map(is_constant, used)),
        ),
    )


def _live(graph: fx.Graph) -> set[str]:
    """Return the names of modules that a rewritten graph calls, or passes on as modules."""
    live = called_modules(graph)
    for node in graph.nodes:
        if node.target is prepare_weights and any(user.target is not parameter for user in node.users):
            live.add(str(node.args[0].target))
    return live


@outside_inference_mode
def convert_for_call(
    model: nn.Module, program: Program, arguments: Arguments, refusal: GuardFailed
) -> Program:
    """Convert and verify a network for calls that take another path through it than the converted one.

    Args:
        model: the original network.
        program: its program; the new program is bound to the same adaptive network.
        arguments: arguments of such a call, by name.
        refusal: the guard error of the existing program.

    Raises:
        GuardFailed: `refusal`, if the path cannot be verified, or not be converted with the same strides and the same
            identity level.
    """
    net, plan = program.net, program.plan
    for kind in ("_parameters", "_buffers"):  # the network may have been moved
        vars(model)[kind].update({name: vars(net)[kind][name] for name in vars(model)[kind]})
    defaults = {name: parameter.default for name, parameter in program.signature.parameters.items()}
    call = {name: value for name, value in arguments.items() if value is not defaults[name]}
    try:
        facts = read(model, call, exactly=True)
        chosen, flow = _plan_like(plan, facts)
        if chosen.strides != plan.strides[: len(chosen.strides)]:
            raise refusal
        own = plan.identity_level
        if own is not None and chosen.identity_level != min(own, chosen.max_level):
            raise refusal  # the same level map would mean another network
        carried = carry_out(chosen, flow, program.geometry)
        with facts.forgetting():
            verify(Case.of(facts, carried.graph, chosen, program.geometry))
    except CadError as error:
        if error is refusal:
            raise
        found = f"{refusal.why.removesuffix('.')}. Read for this call, the network is refused: {error.what} {error.why}"
        parts = {"where": refusal.where or error.where, "why": found.strip(), "next": refusal.next}
        raise GuardFailed(refusal.what, **parts) from error
    # Constants of this path, which torch.fx keeps as attributes of the network.
    net._constants.update({name: value for name, value in vars(model).items() if isinstance(value, Tensor)})
    return carried.bind_to(net)


def _plan_like(plan: Plan, facts: Facts) -> tuple[Plan, Flow]:
    """Plan another path through a network with cells of the same sizes, as far as the path has them."""
    rest = (plan.region, plan.part, plan.returned)
    if plan.floors:
        return make_plan(facts, None, *rest, coarsest=plan.output_stride[1])
    with contextlib.suppress(InvalidInput):
        chosen, flow = make_plan(facts, plan.output_stride, *rest)
        if chosen.strides == plan.strides:
            return chosen, flow
    high, up_to = plan.output_stride[0], plan.output_stride[0]
    lows = sorted(low for first, low in make_plan(facts, None, *rest)[0].possible if first == high)
    for stride, low in zip(plan.strides[1:], lows, strict=False):
        if stride != low:
            break
        up_to = stride
    return make_plan(facts, (high, min(up_to, plan.output_stride[1])), *rest, up_to=up_to)
