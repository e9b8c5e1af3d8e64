"""A network whose residual branches are computed where gates are open, and interpolated elsewhere."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from cadsurgery.data.networks import source_of
from cadsurgery.methods.converted import ConvertedModel, GraphModel, register
from cadsurgery.methods.sampling.branches import Branch, find_branches
from cadsurgery.methods.sampling.gates import DECAY, GRID, TEMPERATURE, Gate
from cadsurgery.methods.sampling.program import Block, Gated, SampledProgram, gather, reconstruct
from cadsurgery.methods.sampling.report import BranchPlan, GatePlan, SampledMacs, SamplingPlan, count
from cadsurgery.methods.sampling.run import Run
from cadsurgery.methods.spatial import Spatial
from cadsurgery.network.adaptify import Example, copy_network, traceable_part
from cadsurgery.network.hosted import check_used, reach
from cadsurgery.support.errors import InvalidInput
from cadsurgery.surgery.arguments import image_of
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.hooks import copying
from cadsurgery.surgery.trace import evaluating

GATES = "sampling_gates"  # the child that holds them
_LAST = 0.75  # of a branch's share in the sparse loss its last gate has, as published


def sample(
    model: nn.Module,
    where: str | Sequence[str] = "auto",
    grid: int = GRID,
    temperature: float = TEMPERATURE,
    noise: bool = False,
    *,
    example_input: Example | None = None,
) -> SampledModel:
    """The same network with gates in its residual branches: convolutions are computed where a gate is open, the rest
    of a branch's map is interpolated, and the addition is whole (Xie et al., ECCV 2020).

    The argument is not changed; parameters keep names and values, and its state dict loads into the result. Gates are
    new and start open, so that the result is the original until they are trained (`finetune`, objective `sparse`).

    Args:
        model: a network with residual branches, or one that torch.fx cannot follow whole, such as a detector, whose
            backbone is then converted inside it.
        where: `"auto"`, every residual branch; or names of modules, for the residual branches within, or of
            convolutions, for these alone, which may lie in no residual branch.
        grid: every so many-th position of both axes is computed whatever a gate says; 0 for none.
        temperature: of the gates in evaluation; while training each has its own, which starts at 1 and falls.
        noise: True if gates draw noise in evaluation, as published; the same for each call, see `SampledModel.seed`.
        example_input: an image batch (B, C, H, W), or all arguments of a call; default: small random images.

    Raises:
        CannotConvert: a network that torch.fx cannot follow, or without residual branches for `auto`.
        UnknownName: no such module.
        InvalidInput: a module whose positions cannot be chosen, or an option out of range.
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
    graph, gates, gated, blocks = facts.graph, nn.ModuleList(), list[Gated](), list[Block]()
    like = next(facts.model.parameters())
    filled = dict[fx.Node, fx.Node]()
    for branch in branches:
        source = filled.get(branch.source, branch.source)
        blocks.append(Block(branch.name, tuple(range(len(gates), len(gates) + len(branch.places)))))
        for place in branch.places:
            with graph.inserting_after(place.tail):
                node = graph.call_function(reconstruct, (place.tail, source), {"gate": len(gates)})
            place.tail.replace_all_uses_with(node, partial(operator.is_not, node))
            filled[place.tail] = node
            path, end = str(place.node.target), tuple(one.name for one in place.end)
            gated.append(Gated(place.node.name, path, place.window, place.stride, end, place.is_linear))
            gates.append(Gate(facts.shapes[branch.source][1], like))
    graph.lint()
    facts.model.add_module(GATES, gates.train(facts.model.training))
    signature = inspect.signature(facts.model.forward)
    return gather(graph, tuple(gated), tuple(blocks), permutes, signature, facts.container)


def _make_plan(net: SampledModel, branches: Sequence[Branch], facts: Facts, path: str) -> SamplingPlan:
    defaults = {name: one.default for name, one in net.program.signature.parameters.items()}
    macs = net._count({**defaults, **facts.arguments}, "conv", dict.fromkeys(range(len(net.gates)), 1.0))
    rows, planned = iter(macs), []
    for branch in branches:
        gates = []
        for place, row in zip(branch.places, rows, strict=False):
            follows = tuple(str(node.target) for node in place.end if node.op == "call_module")
            gates.append(GatePlan(row.conv, place.stride, follows, row.dense))
        planned.append(BranchPlan(branch.name, branch.source.name, tuple(gates), branch.apart))
    return SamplingPlan(
        branches=tuple(planned),
        macs=macs.dense,
        gate_macs=sum(gate.gate for gate in macs),
        example_shape=tuple(facts.example.shape),
        part=path,
    )


@register
class SampledModel(GraphModel):
    """A network with gates; called as the original, it returns what that does.

    In training mode everything is computed and each position counts by the share its gate gives it, which gradients
    reach; noise is drawn from `seed`, `step` and the number of the gate. In evaluation mode convolutions are computed
    where gates are open.

    Attributes:
        plan: what was made of the network.
        options: of `sample`, as values.
        grid: distance of the positions that are always computed; 0 for none.
        temperature: of the gates in evaluation.
        noise: True if they draw noise in evaluation.
        seed: of the noise.
        step: of the noise; each call in training adds 1.
        decay: what each gate's temperature is multiplied by after each call in training, as published .99998.
        score_override: gives the score (B, h, w) of a gate in place of its own, by its number, such as `gates.Opened`;
            None, as at first: nothing does.
        source: where the network came from, if it was built by name.
    """

    method, converted_by, already = "sampling", "cs.sample", "this network has gates already."
    convert, plan_type = staticmethod(sample), SamplingPlan
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
    _is_dense = False
    _last: Run | None = None

    def __init__(self, model: nn.Module, program: Any, options: dict[str, Any], **settings: Any) -> None:
        """Take over the modules of `model`, the gates among them; use `cadsurgery.sample` to get one."""
        of_its_own = {"seed": 0, "step": 0, "decay": DECAY, "score_override": None}
        super().__init__(model, program, options, **{**of_its_own, **settings})

    @classmethod
    def is_own(cls, name: str) -> bool:
        """True for what is of a gate."""
        return GATES in name.split(".")

    @property
    def part(self) -> SampledModel:
        """The network that has the gates: this one, or the part of it that was converted."""
        return self

    @property
    def gates(self) -> tuple[Gate, ...]:
        """In order of execution."""
        gates = self.part._modules[GATES]
        assert isinstance(gates, nn.ModuleList)
        return tuple(gates)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network as the original is called.

        Args:
            args: as the original is called; the first is the image batch (B, C, H, W).
            kwargs: as the original is called.

        Raises:
            InvalidInput: what is no image batch.
        """
        run = Run(self, self.bind(args, kwargs), self._is_dense)
        output = run()
        if self._is_dense:
            return output
        if self.training:
            self.step += 1
            with torch.no_grad():
                for gate in self.gates:
                    gate.temperature *= self.decay
        self._last = run
        return output

    def dense(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network with everything computed: its gates are not asked.

        Args:
            args, kwargs: as of a call.
        """
        part = self.part
        part._is_dense = True
        try:
            return self(*args, **kwargs)
        finally:
            part._is_dense = False

    # -- of the last call --------------------------------------------------------------------------

    @property
    def shares(self) -> dict[str, Tensor]:
        """(B, h, w) of each gated convolution in the last call: how much of each position counted as computed.

        Raises:
            InvalidInput: there was none.
        """
        run = self._called()
        return {
            gated.path: run.shares[number].detach() for number, gated in enumerate(self.part.program.gates)
        }

    @property
    def densities(self) -> dict[str, float]:
        """Share of the positions of each gated convolution that were open in the last call."""
        return {name: float((share >= 0.5).float().mean()) for name, share in self.shares.items()}

    def sparse_loss(self) -> Tensor:
        """How open the gates were in the last call, 0..1, with its gradient: in each branch a quarter of the mean
        probability of its gates and three quarters of that of its last (published: two gates), meaned over branches.
        """
        run, blocks = self._called(), self.part.program.blocks
        total = run.open[0].new_zeros(())
        for _, numbers in blocks:
            *others, last = (run.open[number] for number in numbers)
            rest = torch.stack(others).mean() if others else last
            total = total + _LAST * last + (1 - _LAST) * rest
        return total / len(blocks)

    def _called(self) -> Run:
        run = self.part._last
        if run is None:
            raise InvalidInput("the network has not been called.", next="call it on an image batch first.")
        return run

    # -- what it costs -----------------------------------------------------------------------------

    def macs(self, *args: Any, rule: str = "conv", **kwargs: Any) -> SampledMacs:
        """Multiply-accumulates on an image, which is run: where its gates are open, and of the dense network.

        Args:
            args, kwargs: as of a call. On the meta device nothing is run: everything counts as computed.
            rule: `conv`, or `published`, see `SampledMacs`.

        Raises:
            UnknownName: no such rule.
        """
        arguments = self.bind(args, kwargs, rule)
        densities = dict.fromkeys(range(len(self.gates)), 1.0)
        if not image_of(arguments).is_meta:
            with torch.no_grad(), evaluating(self):
                self(*args, **kwargs)
            densities = dict(enumerate(self.densities.values()))
        return self._count(arguments, rule, densities)

    def _count(self, arguments: dict[str, Any], rule: str, densities: dict[int, float]) -> SampledMacs:
        shape = tuple(image_of(arguments).shape)
        return count(self.program, self.work(arguments), densities, rule, shape)

    # -- other forms -------------------------------------------------------------------------------

    def optimize(self) -> SampledModel:
        """An inference copy: batch norm folded, residuals and activations fused, weights packed."""
        fused, known = self.fused(GATES), self.program
        parts = (known.gates, known.blocks, known.permutes, known.signature, known.container)
        net = self.inference_copy(fused, gather(fused.graph, *parts, fused.origins))
        net.step = self.step
        return net

    @property
    def is_optimized(self) -> bool:
        """True if it is an inference copy."""
        return self.part.program.is_fused


class HostedSampled(SampledModel):
    """A network that is run as it is, with one part of it sampled, such as the backbone of a detector.

    It is called as the original is. Plan, gates and MACs are those of the part.
    """

    hosts_part = True

    def __init__(self, host: nn.Module, path: str, part: SampledModel) -> None:
        """Put `part` into `host` at `path`; use `cadsurgery.sample` to get one."""
        ConvertedModel.__init__(self)
        host.set_submodule(path, part)
        self._host = (host,)  # a tuple: its modules are this network's own, not a child's
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[kind] = host.__dict__[kind]
        self._path = path
        self.training = host.training
        self.plan, self.source, self.options = part.plan, part.source, part.options

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network as the original is called."""
        host = self._host[0]
        host.training = self.training
        return host(*args, **kwargs)

    @property
    def part(self) -> SampledModel:
        """The part that has the gates."""
        part = self.get_submodule(self._path)
        assert isinstance(part, SampledModel)
        return part

    def macs(self, *args: Any, rule: str = "conv", **kwargs: Any) -> SampledMacs:
        """Multiply-accumulates of the part on what it gets when the network is called with these arguments.

        Raises:
            UnknownName: no such rule.
            InvalidInput: the network did not call the part.
        """
        with evaluating(self):
            inside = reach(self.part, self, *args, **kwargs)
        if inside is None:
            raise InvalidInput(f"the network did not call its {self._path}.", next="check the arguments.")
        inputs, named = inside
        return self.part.macs(*inputs, rule=rule, **named)

    def optimize(self) -> HostedSampled:
        """A copy with the part optimised; see `SampledModel.optimize`."""
        host = copy.deepcopy(self._host[0], copying(self)).eval().requires_grad_(False)
        return HostedSampled(host, self._path, self.part.optimize())

    def __getattr__(self, name: str) -> Any:
        if name in _OF_PART:
            return getattr(self.part, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OF_PART:
            setattr(self.part, name, value)
        else:
            super().__setattr__(name, value)


# What may be set on a network that hosts its part, too.
_OF_PART = ("grid", "temperature", "noise", "seed", "step", "decay", "score_override", "program")
