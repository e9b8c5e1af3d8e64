"""A network whose residual branches are computed where gates are open, and interpolated elsewhere."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from cadsurgery.data.networks import Source, source_of
from cadsurgery.masks.masking import check_image
from cadsurgery.methods.converted import ConvertedModel
from cadsurgery.methods.sampling.branches import Branch, find_branches
from cadsurgery.methods.sampling.gates import DECAY, GRID, TEMPERATURE, Gate
from cadsurgery.methods.sampling.macs import RULES, SampledMacs, Work, count, work_of
from cadsurgery.methods.sampling.plan import BranchPlan, GatePlan, SamplingPlan
from cadsurgery.methods.sampling.program import Block, Gated, Program, Segment, reconstruct
from cadsurgery.methods.sampling.run import Deciding, Run
from cadsurgery.network.adaptify import Example, copy_network, traceable_part
from cadsurgery.network.fuse import KERNELS, fuse, split_norms
from cadsurgery.network.hosted import check_used, reach
from cadsurgery.network.macs import meta_copy
from cadsurgery.support.errors import InvalidInput, check_name
from cadsurgery.surgery.arguments import image_of
from cadsurgery.surgery.facts import Facts
from cadsurgery.surgery.hooks import copying, freeze_computed_weights
from cadsurgery.surgery.trace import evaluating

GATES = "sampling_gates"  # the child that holds them
_LAST = 0.75  # of a branch's share in the sparse loss its last gate has, as published
_REMEMBERED = 16  # shapes of calls, and kernel maps


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
        noise: whether gates draw noise in evaluation, as published; the same for each call, see `SampledModel.seed`.
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
    if any(
        isinstance(one, SampledModel) for one in (model.modules() if isinstance(model, nn.Module) else ())
    ):
        raise InvalidInput("this network has gates already.", next="pass the network it was made from.")
    whole = copy_network(model)
    path, facts = traceable_part(whole, example_input)
    if path:
        check_used(whole, path, facts.example)
        within = [where] if isinstance(where, str) else list(where)
        where = where if where == "auto" else [name.removeprefix(f"{path}.") for name in within]
    branches = find_branches(facts, where)
    part, plans = facts.model, _plan_gates(facts, branches)
    program = _add_gates(facts, branches)
    options = {"where": where if isinstance(where, str) else list(where)}
    net = SampledModel(part, program, options, grid, temperature, noise)
    net.plan = _make_plan(net, plans, facts, path)
    net.source = source_of(model)
    return HostedSampled(whole, path, net) if path else net


def _plan_gates(facts: Facts, branches: Sequence[Branch]) -> list[BranchPlan]:
    """The branches, with gates whose work is not known yet."""
    return [
        BranchPlan(
            branch.name,
            branch.source.name,
            tuple(GatePlan(str(place.node.target), place.stride, (), 0) for place in branch.places),
            branch.apart,
        )
        for branch in branches
    ]


def _add_gates(facts: Facts, branches: Sequence[Branch]) -> Program:
    """The graph with gates, which the network gets."""
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
            gated.append(
                Gated(place.node.name, str(place.node.target), place.window, place.stride, place.layout)
            )
            gates.append(Gate(facts.shapes[branch.source][1], like))
    graph.lint()
    facts.model.add_module(GATES, gates.train(facts.model.training))
    signature = inspect.signature(facts.model.forward)
    program = Program(graph, tuple(gated), tuple(blocks), signature, facts.container)
    return program.find(facts.model)


def _make_plan(net: SampledModel, branches: list[BranchPlan], facts: Facts, path: str) -> SamplingPlan:
    run = net._bind(facts.arguments)
    macs = net._count(run, "conv", dict.fromkeys(range(len(net.gates)), 1.0))
    segments = {item.run.gate: item.run for item in net.program.items if isinstance(item.run, Segment)}
    number, planned = 0, []
    for branch in branches:
        gates = []
        for gate in branch.gates:
            segment = segments[number]
            follows = tuple(str(step.target) for step in segment.end if step.op == "call_module")
            gates.append(GatePlan(gate.conv, gate.stride, follows, macs.gates[number].dense))
            number += 1
        planned.append(BranchPlan(branch.name, branch.source, tuple(gates), branch.apart))
    own = sum(gate.gate for gate in macs)
    return SamplingPlan(tuple(planned), macs.dense, own, tuple(facts.example.shape), path)


class SampledModel(ConvertedModel):
    """A network with gates; called as the original, it returns what that does.

    In training mode everything is computed and each position counts by the share its gate gives it, which gradients
    reach; noise is drawn from `seed`, `step` and the number of the gate. In evaluation mode convolutions are computed
    where gates are open.

    Attributes:
        plan: what was made of the network.
        options: of `sample`, as values.
        grid: distance of the positions that are always computed; 0 for none.
        temperature: of the gates in evaluation.
        noise: whether they draw noise in evaluation.
        seed: of the noise.
        step: of the noise; each call in training adds 1.
        decay: what each gate's temperature is multiplied by after each call in training, as published .99998.
        instead: what stands for the score (B, h, w) of a gate, by its number, such as `opened.Opened`; None, as at
            first: nothing does.
        source: where the network came from, if it was built by name.
    """

    converted_by = "cs.sample"
    plan: SamplingPlan
    source: Source | None
    hosts_part = False

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        options: dict[str, Any],
        grid: int,
        temperature: float,
        noise: bool,
    ) -> None:
        """Take over the modules of `model`, the gates among them; use `cadsurgery.sample` to get one."""
        super().__init__()
        self.take_over(model)
        self.program, self.options = program, options
        self.grid, self.temperature, self.noise = grid, temperature, noise
        self.seed, self.step, self.decay = 0, 0, DECAY
        self.instead: Callable[[int, Tensor], Tensor] | None = None
        self._is_dense = False
        self._last: Run | None = None
        self._forget()
        self.register_load_state_dict_post_hook(_own_not_missing)

    @property
    def part(self) -> SampledModel:
        """The network that has the gates: this one, or the part of it that was converted."""
        return self

    @property
    def gates(self) -> tuple[Gate, ...]:
        """In order of execution."""
        gates = self._modules[GATES]
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
        arguments = self._bind_call(args, kwargs)
        check_image(image_of(arguments))
        run = self._run(arguments)
        output = run()
        run.env.clear()
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
        """What the network gives with everything computed: its gates are not asked.

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
        check_name("counting rule", rule, RULES)
        arguments = self._bind_call(args, kwargs)
        densities = dict.fromkeys(range(len(self.gates)), 1.0)
        if not image_of(arguments).is_meta:
            with torch.no_grad(), evaluating(self):
                self(*args, **kwargs)
            densities = dict(enumerate(self.densities.values()))
        return self._count(arguments, rule, densities)

    def _count(self, arguments: dict[str, Any], rule: str, densities: dict[int, float]) -> SampledMacs:
        shape = tuple(image_of(arguments).shape)
        return count(self.program, self._work(arguments), densities, rule, shape)

    def _work(self, arguments: dict[str, Any]) -> Work:
        """The work of a call; remembered for the last few shapes."""
        key = tuple(
            (name, tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (name, repr(value))
            for name, value in arguments.items()
        )
        return self._remember(("work", key), lambda: work_of(self.program, meta_copy(self), arguments))

    # -- other forms -------------------------------------------------------------------------------

    def optimize(self) -> SampledModel:
        """An inference copy: batch norm folded, residuals and activations fused, weights packed."""
        source = copy.deepcopy(self, copying(self)).eval().requires_grad_(False)
        graph = self.program.graph
        freeze_computed_weights(
            source,
            {"", *(str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))},
        )
        for name, value in self.constants.items():
            source.register_buffer(name, value)
        graph, _ = split_norms(graph, source)
        fused, kernels = fuse(graph, source)
        source.add_module(KERNELS, kernels)
        module = fx.GraphModule(source, fused)
        module.add_module(GATES, source._modules[GATES])
        known = self.program
        program = Program(fused, known.gates, known.blocks, known.signature, known.container, True)
        net = SampledModel(
            module, program.find(module), self.options, self.grid, self.temperature, self.noise
        )
        net.plan, net.source, net.seed, net.step = self.plan, self.source, self.seed, self.step
        return net.eval()

    @property
    def is_optimized(self) -> bool:
        """Whether it is an inference copy."""
        return self.part.program.is_fused

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """What the original does not have, by name: those of the gates."""
        return {name: value for name, value in self.named_parameters() if is_own(name)}

    # -- running -----------------------------------------------------------------------------------

    def _bind_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = self.program.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _bind(self, given: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name, with defaults."""
        defaults = {name: one.default for name, one in self.program.signature.parameters.items()}
        return {**defaults, **given}

    def _run(self, arguments: dict[str, Any]) -> Run:
        noise = (self.seed, self.step) if self.training or self.noise else None
        temperature = None if self.training else self.temperature
        deciding = None if self._is_dense else Deciding(temperature, noise, self.grid, self.instead)
        return Run(self, self.gates, self.program, arguments, deciding, self._remember)

    def _remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, for the last few keys."""
        if key not in self._known:
            while len(self._known) >= _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = make()
        return self._known[key]

    def _forget(self) -> None:
        self._known: dict[Any, Any] = {}
        self._last = None

    def _apply(self, fn: Any, recurse: bool = True) -> SampledModel:
        self._forget()  # of another type, or elsewhere
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_known": {}, "_last": None}


class HostedSampled(SampledModel):
    """A network that is run as it is, with one part of it sampled, such as the backbone of a detector.

    It is called as the original is. Plan, gates and MACs are those of the part.
    """

    hosts_part = True

    def __init__(self, host: nn.Module, path: str, part: SampledModel) -> None:
        """Put `part` into `host` at `path`; use `cadsurgery.sample` to get one."""
        nn.Module.__init__(self)
        host.set_submodule(path, part)
        self._host = (host,)  # a tuple: its modules are this network's own, not a child's
        for kind in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[kind] = host.__dict__[kind]
        self._path = path
        self.training = host.training
        self.plan, self.source, self.options = part.plan, part.source, part.options
        self.register_load_state_dict_post_hook(_own_not_missing)

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

    @property
    def gates(self) -> tuple[Gate, ...]:
        """Of the part."""
        return self.part.gates

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

    def _apply(self, fn: Any, recurse: bool = True) -> HostedSampled:
        nn.Module._apply(self, fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return nn.Module.__getstate__(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostedSampled:
        memo.update({**copying(self), **memo})
        return HostedSampled(copy.deepcopy(self._host[0], memo), self._path, copy.deepcopy(self.part, memo))


# What may be set on a network that hosts its part, too.
_OF_PART = ("grid", "temperature", "noise", "seed", "step", "decay", "instead", "program")


def is_own(name: str) -> bool:
    """Whether a parameter or buffer is not the original's: of a gate."""
    return GATES in name.split(".")


def _own_not_missing(model: nn.Module, keys: Any) -> None:
    """A state dict of the original loads: it has no gates."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not is_own(name)]
