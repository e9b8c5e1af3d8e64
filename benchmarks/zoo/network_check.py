"""Check one network: build it, convert it, and compare the result with the original; the findings are a row."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.zoo.corpus import Subject
from cadsurgery.following.arguments import run_forward
from cadsurgery.following.facts import EXAMPLE_SIZES, scale
from cadsurgery.following.guards import GuardFailed
from cadsurgery.following.trace import drop_cached, evaluating
from cadsurgery.network.adaptify import adaptify, plan
from cadsurgery.network.adaptive_part import traceable_part
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.divergence import tensors_of
from cadsurgery.support.errors import (
    CadError,
    CadWarning,
    CannotConvert,
    describe_error,
    first_line,
)
from cadsurgery.surgery.flow import flow_forward
from cadsurgery.surgery.plan import Plan
from cadsurgery.surgery.refusals import position_mixers
from cadsurgery.surgery.treatment import operation_name
from cadsurgery.surgery.verify import DISCRETE, TOLERANCE, at_own_samples
from cadsurgery.tasks.zoo_record import Row

# Sizes of the check: the first odd and the first even size that a network accepts. Decoders may need multiples.
ODD_SIZES = ((81, 113), (97, 145))
EVEN_SIZES = ((100, 132), (96, 160), (128, 192), (160, 224))

# A conversion that leaves a smaller share of the work than this in the region has no effect.
LEAST_SHARE = 0.01


def check_network(subject: Subject) -> Row:
    """Build a network with random weights and statistics, convert it with defaults, and compare the two networks.

    Compared, on batches of two, are: the outputs at the network's own level (law 1) at the example's size, at a size
    of the other parity, and at an odd and an even size if it accepts them; the other uniform levels with dense
    networks (law 2); a batch with its images one by one, each with its own level map (law 5); law 1 with other
    weights loaded into both; and the optimised copy at random levels.

    Returns:
        One row: `result` (`converts`, `refused`, `broken` or `not built`), the reason, strides, what stays dense,
        shares of the MACs, whether the conversion has an effect, warnings, errors of the comparisons, seconds.

    Raises:
        MemoryError: there is not enough memory.
    """
    return try_network(subject, partial(_convert_and_compare, subject))


def try_network(subject: Subject, compare: Callable[[nn.Module, Any, Row], None]) -> Row:
    """Build a network with random weights and settled statistics, and compare it with its conversion.

    Args:
        subject: the network.
        compare: converts the network, given the conversion's example and the row, to which it adds what it finds.

    Returns:
        The row; `result` is `not built`, `refused` or `broken` where building, converting or comparing fails.

    Raises:
        MemoryError: there is not enough memory.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    row: Row = {"model": subject.name, "family": subject.family}
    if subject.idioms:
        row |= {"idioms": list(subject.idioms), "about": subject.about}
    try:
        model = subject.build().eval()
    except Exception as error:  # a builder of a third-party library can fail in any way
        raise_memory_errors(error)
        seconds = round(time.perf_counter() - start, 1)
        return {**row, "result": "not built", "why": describe_error(error), "seconds": seconds}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    try:
        example = example_of(subject, model)
        settle(model, row, example)
        compare(model, example, row)
    except CadError as error:
        raise_memory_errors(error)
        row |= {"result": "refused", **error.to_dict()}
    except Exception as error:  # any failure of the conversion is a finding
        raise_memory_errors(error)
        row |= {"result": "broken", "why": describe_error(error)}
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def raise_memory_errors(error: BaseException | None) -> None:
    """Raise MemoryError if an error was caused by a lack of memory, for which torch has no type on the CPU."""
    while error is not None:
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "allocate memory" in str(error)
        ):
            raise MemoryError from error
        error = error.__cause__


def settle(model: nn.Module, row: Row | None = None, example: Any = None) -> None:
    """Give a network random parameters, with no dead branch and with values of moderate size.

    Constant parameters (norms, biases, layer scales) become random, so that every branch contributes. Batch norm
    gets the statistics of a random image, slightly disturbed, and weights below one: with weights of one, deep
    random networks amplify rounding errors a thousandfold and more. `row` records the kind of network and the
    seconds of tracing.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        values = parameter.detach()
        if values.numel() and bool((values == values.flatten()[0]).all()):
            noise = torch.rand(values.shape, generator=generator)
            start = 1.0 if float(values.flatten()[0]) == 1 else 0.3
            parameter.data = (0.2 * noise - 0.1 if not values.any() else start * (0.6 + 0.8 * noise)).to(
                values
            )
    row = {} if row is None else row
    try:
        with _timing(row, "trace"):
            _, facts = traceable_part(model, example)
    except CannotConvert:
        row["kind"] = "not traced"
        return
    mixers = position_mixers(flow_forward(facts))
    row["kind"] = "attention" if mixers else "cnn"
    if mixers:
        row["mixers"] = sorted({operation_name(node, facts) for node in mixers})
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if not isinstance(norm, nn.SyncBatchNorm)]  # trains on GPUs only
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        run_forward(facts.model, facts.arguments)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None and norm.running_mean is not None:
            spread = norm.running_var.sqrt()
            norm.running_mean += 0.1 * spread * torch.randn(spread.shape, generator=generator)
            norm.running_var *= 0.8 + 0.4 * torch.rand(spread.shape, generator=generator)
        if norm.weight is not None:
            norm.weight.data.copy_(0.2 + 0.3 * torch.rand(norm.weight.shape, generator=generator))


@contextlib.contextmanager
def _timing(row: Row, what: str) -> Iterator[None]:
    """Record the seconds of the `with` block, if it succeeds."""
    begin = time.perf_counter()
    yield
    row.setdefault("seconds_to", {})[what] = round(time.perf_counter() - begin, 2)


# -- converting ----------------------------------------------------------------------------------------


def example_of(subject: Subject, model: nn.Module) -> Any:
    """Return the conversion's example; None (built-in images) unless the call needs more arguments or a size."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or (subject.call is None and subject.size is None):
        return None
    generator = torch.Generator().manual_seed(0)
    channels = first.in_channels if subject.call is None else 3
    for size in (subject.size,) if subject.size else EXAMPLE_SIZES:
        image = torch.randn(2, channels, *size, generator=generator).to(first.weight.dtype)
        arguments = subject.arguments(image)
        if takes(model, arguments):
            return arguments
    return None  # the conversion will refuse it


def takes(model: nn.Module, arguments: Any) -> bool:
    """True if a network runs on these arguments; networks refuse sizes with errors of many types."""
    with contextlib.suppress(Exception), torch.no_grad(), evaluating(model):
        call_network(model, arguments)
        return True
    return False


def call_network(model: nn.Module, arguments: Any, mask: object = None) -> Any:
    """Call a model with arguments as in `adaptify(example_input=)`, which a network that changes
    its image in place leaves as they are; a mask is set separately from the arguments."""
    is_masked = isinstance(model, AdaptiveModel) and mask is not None
    args, kwargs = _split(tree_map_only(Tensor, Tensor.clone, arguments))
    with model.masked(mask) if is_masked else contextlib.nullcontext():  # type: ignore[operator]
        return model(*args, **kwargs)


def _split(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split a tensor, a tuple of arguments, or keywords into positional and named arguments."""
    if isinstance(arguments, dict):
        return (), arguments
    return arguments if isinstance(arguments, tuple) else (arguments,), {}


def _convert_and_compare(subject: Subject, model: nn.Module, example: Any, row: Row) -> None:
    """Plan, convert and compare, in float64 if float32 is not precise enough; what is found goes into the row."""
    with _timing(row, "plan"):
        plan(model, example_input=example)
    row["planned"] = True  # so `adaptify` must not refuse it
    with _timing(row, "convert"), warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        net = adaptify(model, "random", example_input=example)
    warned = [first_line(entry.message) for entry in raised if issubclass(entry.category, CadWarning)]
    result = _compare(subject, model, net)
    if result["result"] == "broken" and next(model.parameters()).dtype == torch.float32:
        wide = model.double()
        doubled = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, example)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = _compare(subject, wide, adaptify(wide, "random", example_input=doubled))
        result["dtype"] = "float64"
    effect = _has_effect(net.plan)
    if result["result"] == "converts" and not effect and not warned:
        result |= {"result": "broken", "why": "it has no effect, and nothing says so"}
    row |= {**result, "effect": effect, "warned": warned}


def _has_effect(chosen: Plan) -> bool:
    """True if keeping resolution changes the outputs, and enough work runs on elements to matter."""
    return chosen.matters and chosen.share("adapt", "keep") >= LEAST_SHARE


# -- comparing -----------------------------------------------------------------------------------------


def _compare(subject: Subject, model: nn.Module, net: AdaptiveModel) -> Row:
    """Run all comparisons and return a row; this changes the weights of both networks."""
    chosen = net.plan
    dtype = next(parameter.dtype for parameter in model.parameters())
    errors = {"1": 0.0, "2": 0.0}
    for check in net.checks:
        errors[str(check.number)] = max(errors[str(check.number)], check.error)
    sizes = [check.size for check in net.checks if check.number == 1]
    part = (model.get_submodule(chosen.part), net.adaptive_part) if chosen.part else (model, net)
    batches = _batches(subject, part[0], chosen, dtype)
    outputs = 0
    for arguments, size in batches:
        if chosen.identity_level is not None:
            error, outputs = _identity_error(*part, arguments)
            errors["1"] = max(errors["1"], error)
            sizes.append(size)
    arguments, size = batches[0]
    errors["5"] = _batch_error(part[1], arguments)
    state = _other_weights(model.state_dict())
    for one in (model, net):
        one.load_state_dict(state)
    drop_cached(model)  # as a converted network does
    if chosen.identity_level is not None:
        errors["weights"], _ = _identity_error(*part, arguments)
    image = torch.randn(chosen.example_shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    example = image if chosen.part else subject.arguments(image[:, :3] if subject.call else image)
    errors["optimize"] = _optimized_error(part[1], [*(arguments for arguments, _ in batches), example])
    if chosen.part:
        hosted = _batches(subject, model, replace(chosen, part=""), dtype)
        for host_arguments, _ in hosted[:1]:  # one batch only, because they take long
            errors["host"] = _host_error(model, net, host_arguments)
    broken = [name for name, error in errors.items() if not error <= TOLERANCE[dtype]]
    return {
        "result": "broken" if broken else "converts",
        "why": " and ".join(_BROKEN[name] for name in broken),
        "output_stride": list(chosen.output_stride),
        "strides": list(chosen.strides),
        "possible": [list(pair) for pair in chosen.possible],
        "identity_level": chosen.identity_level,
        "part": chosen.part,
        "macs": sum(decision.macs for decision in chosen.decisions),
        "share_in_region": round(chosen.share("adapt", "keep"), 4),
        "share_after_first_stage": round(chosen.share_after_first_stage, 4),
        "matters": chosen.matters,
        "dense": _dense(chosen),
        "outputs": [list(entry) for entry in chosen.standing()],
        "outputs_compared": outputs,
        "errors": {law: float(f"{error:.1e}") for law, error in errors.items()},
        "image": [2, chosen.example_shape[1], *size],
        "sizes": [list(size) for size in dict.fromkeys(sizes)],
    }


# Explanation of a comparison that fails.
_BROKEN = {
    "1": "law 1 does not hold",
    "2": "law 2 does not hold",
    "5": "law 5 does not hold",
    "weights": "law 1 does not hold after load_state_dict",
    "optimize": "optimize() computes something else",
    "host": "the network around the converted part computes something else",
}


def _batches(
    subject: Subject, model: nn.Module, chosen: Plan, dtype: torch.dtype
) -> list[tuple[Any, tuple[int, int]]]:
    """Return arguments and size of batches of two images, with an odd and an even size other than the example's.

    If the network accepts no other size, the example's size is used.
    """
    generator = torch.Generator().manual_seed(1)
    channels, height, width = chosen.example_shape[1:]
    example = (height, width)
    whole = not chosen.part  # a part is called with its image alone
    channels = channels if subject.call is None or not whole else 3

    def arguments(size: tuple[int, int]) -> Any:
        image = torch.randn(2, channels, *size, generator=generator).to(dtype)
        return subject.arguments(image) if whole else image

    batches: list[tuple[Any, tuple[int, int]]] = []
    for sizes in (ODD_SIZES, EVEN_SIZES):
        drawn = ((arguments(size), size) for size in sizes)
        usable = ((values, size) for values, size in drawn if size != example and takes(model, values))
        batches += islice(usable, 1)
    return batches or [(arguments(example), example)]


def _identity_error(model: nn.Module, net: AdaptiveModel, arguments: Any) -> tuple[float, int]:
    """Check law 1 at the network's own level, directly and through kernel maps; also count the outputs."""
    level = net.plan.identity_level or 0
    with torch.no_grad():
        expected = call_network(model, arguments)
        mask: str | Tensor | None = _word_of(net)
        if mask is None:
            call_network(net, arguments, mask="random")
            mask = torch.full_like(net.levels, level)
        outputs = [call_network(net, arguments, mask=mask)]
        if type(outputs[0]) is not type(expected):
            return float("inf"), 0
        mapped = replace(net.geometry, dense_shortcut=False)
        args, kwargs = _split(arguments)
        outputs.append(net.run(lambda _, f: mapped.uniform_like(f, level), *args, **kwargs))
        outputs = [at_own_samples(output, net.graph, net.plan) for output in outputs]
    return max(largest_error(output, expected) for output in outputs), len(tensors_of(expected))


def _batch_error(net: AdaptiveModel, arguments: Any) -> float:
    """Check law 5: a batch, each image with its own random level map, against its images one by one."""
    torch.manual_seed(2)
    with torch.no_grad():
        together = tensors_of(call_network(net, arguments, mask="random"))
        levels = net.levels
        apart = [call_network(net, _image(arguments, i), mask=levels[i : i + 1]) for i in range(len(levels))]
    if any(len(value) == 0 for value in together):
        return float("inf")
    each = zip(*map(tensors_of, apart), strict=True)
    joined = [torch.cat(values) if values[0].dim() else values[0] for values in each]
    return largest_error(together, joined)


def _optimized_error(net: AdaptiveModel, batches: list[Any]) -> float:
    """Compare the optimised copy with the network at random levels, on the first batch that passes its guards."""
    torch.manual_seed(3)
    optimized = net.optimize()
    for arguments in batches:
        with torch.no_grad(), contextlib.suppress(GuardFailed):
            expected = call_network(net, arguments, mask="random")
            return largest_error(call_network(optimized, arguments, mask=net.levels), expected)
    return float("inf")


def _host_error(model: nn.Module, net: AdaptiveModel, arguments: Any) -> float:
    """Compare the whole network, whose converted part runs at its own level, with the original."""
    mask = _word_of(net)
    if mask is None:
        return 0.0
    with torch.no_grad():
        return largest_error(call_network(net, arguments, mask=mask), call_network(model, arguments))


def _word_of(net: AdaptiveModel) -> str | None:
    """Return the name of the mask that keeps the network's own level everywhere, if there is one."""
    return {net.plan.max_level: "none", 0: "all"}.get(net.plan.identity_level or 0)


def _other_weights(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict with every number changed by at most a fifth, so that variances stay positive."""
    generator = torch.Generator().manual_seed(4)

    def change(values: Any) -> Any:
        if not isinstance(values, Tensor) or not values.is_floating_point():
            return values
        return values * (0.8 + 0.4 * torch.rand(values.shape, generator=generator)).to(values)

    changed = copy.copy(state)  # with the versions of modules, for which some of them ask
    changed.update({name: change(values) for name, values in state.items()})
    return changed


def _image(arguments: Any, position: int) -> Any:
    """Return the arguments of one image of a batch."""
    return tree_map_only(Tensor, lambda values: values[position : position + 1], arguments)


def largest_error(output: Any, expected: Any) -> float:
    """Return the largest error of the tensors and, where a network gives these, arrays, numbers and words; infinite if
    there are none, or not as many as expected."""
    ours, theirs = _values_of(output), _values_of(expected)
    if len(ours) != len(theirs):
        return float("inf")
    return max(map(_error, ours, theirs), default=float("inf"))


def _values_of(output: Any) -> list[Tensor]:
    def as_tensor(value: Any) -> Tensor:
        return torch.as_tensor(list(value.encode()) if isinstance(value, str) else value)

    return tensors_of(tree_map_only((numpy.ndarray, float, int, str), as_tensor, output))


def _error(values: Tensor, expected: Tensor) -> float:
    if values.shape != expected.shape:
        return float("inf")
    if not expected.numel():  # a detector that found nothing
        return 0.0
    if not expected.is_floating_point():  # class numbers: rounding decides between equal scores
        differing = float((values != expected).double().mean())
        return 0.0 if differing <= DISCRETE else float("inf")
    error = float((values - expected).abs().max()) / max(scale(expected), 1e-30)
    return error if error == error else float("inf")  # `max` would ignore a NaN


def _dense(chosen: Plan) -> list[Row]:
    """List the operations that end the region, the most expensive first."""
    total = max(1, sum(decision.macs for decision in chosen.decisions))
    ends = sorted(chosen.chosen("barrier"), key=lambda decision: -decision.cost)
    return [
        {
            "node": decision.node,
            "operation": decision.operation,
            "source": decision.source,
            "why": decision.reason.partition(";")[0],
            "share": round(decision.cost / total, 4),
        }
        for decision in ends[:3]
    ]
