"""A network whose residual branches are computed where gates are open, and interpolated elsewhere."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from cadsurgery.data.networks import source_of
from cadsurgery.following.arguments import describe_call, image_of, outside_inference_mode
from cadsurgery.following.call_entry import signature_of
from cadsurgery.following.facts import Facts
from cadsurgery.following.trace import evaluating
from cadsurgery.methods.converted import ConvertedModel, GraphModel, register
from cadsurgery.methods.sampling.branches import Branch, find_branches
from cadsurgery.methods.sampling.gates import DECAY, GRID, TEMPERATURE, Gate, hard_shares, shares, uniform
from cadsurgery.methods.sampling.program import Gated, SampledProgram, reconstruct
from cadsurgery.methods.sampling.report import BranchPlan, GateMacs, GatePlan, SampledMacs, SamplingPlan
from cadsurgery.methods.sampling.sampled_calls import SampledRun
from cadsurgery.network.adaptify import copy_network
from cadsurgery.network.adaptive_part import Example, traceable_part
from cadsurgery.network.hosted import Host, check_used
from cadsurgery.network.signature import Forward
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.spatial import Spatial

GATES = "sampling_gates"  # name of the child module that holds the gates
_LAST = 0.75  # weight of a branch's last gate in the sparse loss, as published


@outside_inference_mode
def sample(
    model: nn.Module,
    where: str | Sequence[str] = "auto",
    grid: int = GRID,
    temperature: float = TEMPERATURE,
    noise: bool = False,
    *,
    example_input: Example | None = None,
) -> SampledModel:
    """Add gates to the residual branches of a network: convolutions are computed where a gate is open, the rest of a
    branch's map is interpolated, and the addition runs on the whole map (Xie et al., ECCV 2020).

    The argument is not changed; parameters keep names and values, and its state dict loads into the result. The new
    gates start open, so that the result equals the original until they are trained (`finetune`, objective `sparse`).

    Args:
        model: a network with residual branches. If torch.fx cannot trace it as a whole, such as a detector, its
            backbone is converted inside a copy of it.
        where: `"auto"` for every residual branch; or names of modules, for the residual branches inside, or of single
            convolutions, which need not lie in a residual branch.
        grid: spacing of the positions, along both axes, that are computed even if a gate is closed; 0 for none.
        temperature: temperature of the gates in evaluation; in training each gate has its own, falling from 1.
        noise: True if gates draw noise in evaluation, as published; the same in each call, see `SampledModel.seed`.
        example_input: an image batch (B, C, H, W), or all arguments of a call; default: small random images.

    Raises:
        CannotConvert: torch.fx cannot trace the network, or `auto` finds no residual branches.
        UnknownName: there is no such module.
        InvalidInput: a module cannot be computed at chosen positions, or an option is out of range.
    """
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 0:
        raise InvalidInput(f"grid={grid!r}.", next="give a distance of at least 1, or 0 for no grid.")
    if not temperature > 0:
        raise InvalidInput(f"temperature={temperature}.", next="it must be above 0.")
    SampledModel.refuse_again(model)
    whole = copy_network(model)
    path, facts = traceable_part(whole, example_input)
    if path:
        check_used(whole, path, facts.example)
        within = [where] if isinstance(where, str) else list(where)
        where = where if where == "auto" else [name.removeprefix(f"{path}.") for name in within]
    spatial = Spatial(facts)
    branches = find_branches(spatial, where)
    permutes = frozenset(node.name for node in facts.graph.nodes if spatial.kind(node).kind == "permute")
    program = _add_gates(facts, branches, permutes)
    options = {"where": where if isinstance(where, str) else list(where)}
    net = SampledModel(facts.model, program, options, grid=grid, temperature=temperature, noise=noise)
    net.plan, net.source = _make_plan(net, branches, facts, path), source_of(model)
    return HostedSampled(whole, path, net) if path else net


def _add_gates(facts: Facts, branches: Sequence[Branch], permutes: frozenset[str]) -> SampledProgram:
    graph, gates, gated = facts.graph, nn.ModuleList(), list[Gated]()
    nodes = {node.name: node for node in graph.nodes}
    like = next(facts.model.parameters())
    filled = dict[fx.Node, fx.Node]()
    for branch in branches:
        source = filled.get(branch.source, branch.source)
        for place in branch.places:
            tail = nodes[place.tail]
            with graph.inserting_after(tail):
                node = graph.call_function(reconstruct, (tail, source), {"gate": len(gates)})
            tail.replace_all_uses_with(node, partial(operator.is_not, node))
            filled[tail] = node
            gated.append(place)
            gates.append(Gate(facts.shapes[branch.source][1], like))
    graph.lint()
    facts.model.add_module(GATES, gates.train(facts.model.training))
    return SampledProgram(
        graph=graph,
        signature=signature_of(facts.model),
        container=facts.container,
        gates=tuple(gated),
        permutes=permutes,
    )


def _make_plan(net: SampledModel, branches: Sequence[Branch], facts: Facts, path: str) -> SamplingPlan:
    macs = net._count({**net.defaults, **facts.arguments}, dict.fromkeys(range(len(net.gates)), 1.0))
    rows, planned, nodes = iter(macs), [], {node.name: node for node in facts.graph.nodes}
    for branch in branches:
        gates = []
        for place, row in zip(branch.places, rows, strict=False):
            end = (nodes[name] for name in place.end)
            follows = tuple(str(node.target) for node in end if node.op == "call_module")
            gates.append(GatePlan(row.conv, place.stride, follows, row.dense))
        planned.append(BranchPlan(branch.name, branch.source.name, tuple(gates), branch.apart))
    return SamplingPlan(
        branches=tuple(planned),
        macs=macs.dense,
        gate_macs=sum(gate.gate for gate in macs),
        example_shape=tuple(facts.example.shape),
        call=describe_call(facts.model, facts.arguments),
        part=path,
    )


@register
class SampledModel(GraphModel):
    """A network with gates, with the arguments and return values of the original.

    In training mode everything is computed, and each position is weighted by the share that its gate predicts, so that
    gradients reach the gates. Noise depends on `seed`, `step` and the number of the gate. In evaluation mode
    convolutions are computed where gates are open.

    Attributes:
        plan: the branches and gates of the network, with their costs.
        options: options of `sample`.
        grid: spacing of the positions that are always computed; 0 for none.
        temperature: temperature of the gates in evaluation.
        noise: True if gates draw noise in evaluation.
        seed: seed of the noise.
        step: step of the noise; each call in training adds 1.
        decay: factor on each gate's temperature after each call in training; .99998 as published.
        score_override: function of a gate's number and score (B, h, w) that returns another score, such as
            `gates.Opened`; None (default) for the gate's own score.
        source: origin of the network, if it was built by name.
    """

    method, converted_by, already = "sampling", "cs.sample", "this network has gates already."
    convert, plan_type = staticmethod(sample), SamplingPlan
    group, group_in_words, child, objective = "gates", "a network with gates", GATES, "sparse"
    by_length = True
    option_types: ClassVar[dict[str, Any]] = {
        **{"where": str | tuple[str, ...], "grid": int, "temperature": float, "noise": bool, "seed": int}
    }
    plan: SamplingPlan
    program: SampledProgram
    hosts_part = False
    _transient: ClassVar[dict[str, Any]] = {**GraphModel._transient, "_last": None}

    grid: int
    temperature: float
    noise: bool
    seed: int
    step: int
    decay: float
    score_override: Callable[[int, Tensor], Tensor] | None
    is_dense = False
    _last: SampledRun | None = None

    def __init__(self, model: nn.Module, program: Any, options: dict[str, Any], **settings: Any) -> None:
        """Take over the modules of `model`, including the gates; users call `cadsurgery.sample` instead."""
        of_its_own = {"seed": 0, "step": 0, "decay": DECAY, "score_override": None}
        super().__init__(model, program, options, **{**of_its_own, **settings})

    @classmethod
    def is_own(cls, name: str) -> bool:
        """Return True if a name belongs to a gate."""
        return GATES in name.split(".")

    @property
    def decided_by(self) -> str:
        """The number of gates."""
        return f"{len(self.gates)} gates"

    def identity(self) -> dict[str, Any]:
        """Return the spacing of positions that are always computed."""
        return {"grid": self.grid}

    def train_part(self) -> None:
        """Train the gates. The network that has them is in training mode, too, in which gates decide by shares."""
        self.part.training = True

    @property
    def part(self) -> SampledModel:
        """The network with the gates: this network, or its converted part."""
        return self

    @property
    def gates(self) -> tuple[Gate, ...]:
        """All gates, in order of execution."""
        gates = self.part._modules[GATES]
        assert isinstance(gates, nn.ModuleList)
        return tuple(gates)  # type: ignore[arg-type]

    @Forward
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with the arguments of the original.

        Args:
            args: arguments of the original; the first is the image batch (B, C, H, W).
            kwargs: keyword arguments of the original.

        Raises:
            InvalidInput: the first argument is not an image batch.
        """
        arguments = self.bind(args, kwargs)
        run = SampledRun(self, arguments)
        output = run()
        if self.is_dense:
            return output
        if self.training:
            self.step += 1
            with torch.no_grad():
                for gate in self.gates:
                    gate.temperature *= self.decay
        self._last = run
        return output

    def decide(self, number: int, score: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean probability of a gate, and the share of each position that counts as computed."""
        score = score if self.score_override is None else self.score_override(number, score)
        noise = uniform((self.seed, self.step, number), score) if self.training or self.noise else None
        temperature = self.gates[number].temperature.clone() if self.training else self.temperature
        share = shares(score, temperature, noise, self.grid)
        return score.sigmoid().mean(), share if self.training else hard_shares(share)

    def dense(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with everything computed, without evaluating the gates.

        Args:
            args, kwargs: arguments of a call.
        """
        part = self.part
        part.is_dense = True
        try:
            return self(*args, **kwargs)
        finally:
            part.is_dense = False

    # -- of the last call --------------------------------------------------------------------------

    @property
    def shares(self) -> dict[str, Tensor]:
        """Share (B, h, w) of each position that counted as computed in the last call, by gated convolution; one that
        the network calls again is named by its calls: `conv`, `conv (call 2)`.

        Raises:
            InvalidInput: the network has not been called.
        """
        run, calls, shares = self._called(), Counter[str](), dict[str, Tensor]()
        for number, gated in enumerate(self.program.gates):
            calls[gated.path] += 1
            again = f" (call {calls[gated.path]})" if calls[gated.path] > 1 else ""
            shares[gated.path + again] = run.shares[number].detach()
        return shares

    @property
    def densities(self) -> dict[str, float]:
        """Share of the positions of each gated convolution that were open in the last call."""
        return {name: float((share >= 0.5).float().mean()) for name, share in self.shares.items()}

    def sparse_loss(self) -> Tensor:
        """Return how open the gates were in the last call, 0..1, with gradients. A branch counts 3/4 of the mean
        probability of its last gate plus 1/4 of that of its other gates (published for two); branches are averaged.
        """
        run, branches = self._called(), self.plan.branches
        opened = (run.open[number] for number in range(len(run.open)))
        total = run.open[0].new_zeros(())
        for branch in branches:
            *others, last = islice(opened, len(branch.gates))
            rest = torch.stack(others).mean() if others else last
            total = total + _LAST * last + (1 - _LAST) * rest
        return total / len(branches)

    def _called(self) -> SampledRun:
        run = self.part._last
        if run is None:
            raise InvalidInput("the network has not been called.", next="call it on an image batch first.")
        return run

    # -- what it costs -----------------------------------------------------------------------------

    def macs(self, *args: Any, **kwargs: Any) -> SampledMacs:
        """Run the network on an image and count multiply-accumulates: where gates are open, and of the dense network.

        Args:
            args, kwargs: arguments of a call. On the meta device nothing is run, and everything counts as computed.
        """
        arguments = self.bind(args, kwargs)
        densities = dict.fromkeys(range(len(self.gates)), 1.0)
        if not image_of(arguments).is_meta:
            with torch.no_grad(), evaluating(self):
                self(*args, **kwargs)
            densities = dict(enumerate(self.densities.values()))
        return self._count(arguments, densities)

    def _count(self, arguments: dict[str, Any], densities: dict[int, float]) -> SampledMacs:
        """Count the MACs of a call from the share of open positions of each gate."""
        program, work, rows = self.program, self.work(arguments), list[GateMacs]()
        source = {gate: name for name, gates in program.readers.items() for gate in gates}
        for number, (gated, chain) in enumerate(zip(program.gates, program.chains, strict=True)):
            density = densities[number]
            dense = sum(work.macs[step.name] for step in chain.steps)
            batch, _, height, width = work.shapes[source[number]]
            own = batch * height * width * self.gates[number].weight.numel()
            rows.append(GateMacs(gated.path, density, round(dense * density), dense, own))
        return SampledMacs(
            gates=tuple(rows),
            rest=sum(work.macs.values()) - sum(row.dense for row in rows),
            shape=tuple(image_of(arguments).shape),
            not_counted=work.not_counted,
        )

    # -- other forms -------------------------------------------------------------------------------

    def optimize(self) -> SampledModel:
        """Return an inference copy: batch norm folded, residuals and activations fused, weights packed."""
        fused = self.fused()
        net = self.inference_copy(fused, origins=fused.origins)
        net.step = self.step
        return net


class HostedSampled(Host, SampledModel):
    """A network in which only one part is sampled, such as the backbone of a detector.

    Arguments and return values are those of the original. Plan, gates and MACs refer to the part.
    """

    of_part = ("grid", "temperature", "noise", "seed", "step", "decay", "score_override", "program")

    def __init__(self, host: nn.Module, path: str, part: SampledModel) -> None:
        """Put `part` into `host` at `path`; users call `cadsurgery.sample` instead."""
        ConvertedModel.__init__(self)
        self.put(host, path, part)
        self.plan, self.source, self.options = part.plan, part.source, part.options

    @Forward
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with the arguments of the original."""
        return self.run_host(*args, **kwargs)

    def macs(self, *args: Any, **kwargs: Any) -> SampledMacs:
        """Count the multiply-accumulates of the part on its inputs when the network is called with these arguments.

        Raises:
            InvalidInput: the network did not call the part.
        """
        with evaluating(self):
            inputs, named, _ = self.reach_part(*args, **kwargs)
        return self.part.macs(*inputs, **named)

    def optimize(self) -> HostedSampled:
        """Return a copy with the part optimised; see `SampledModel.optimize`."""
        return self.with_part(self.part.optimize())
