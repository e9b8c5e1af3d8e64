"""Coverage: which networks convert, found out by building, converting and verifying each of them.

Every network gets a process of its own with a cap on memory and time, and one JSON line in a file. A check that is
started again goes on where it stopped. The file of the last full run comes with the package: `recorded`.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cadsurgery.data.networks import build_model, family_of
from cadsurgery.network.adaptify import adaptify, traceable_part
from cadsurgery.network.model import AdaptiveModel
from cadsurgery.support.errors import CadError, CannotConvert, FileError, first_line
from cadsurgery.support.files import check_folder, write_whole
from cadsurgery.support.provenance import commit, versions
from cadsurgery.surgery.facts import scale
from cadsurgery.surgery.flow import flow_forward
from cadsurgery.surgery.plan import Plan
from cadsurgery.surgery.refusals import position_mixers
from cadsurgery.surgery.trace import evaluating
from cadsurgery.surgery.treatment import operation_name
from cadsurgery.surgery.verify import TOLERANCE, at_own_samples

Row = dict[str, Any]

RECORDED = Path(__file__).with_name("zoo.jsonl")

# Small, odd and not square; networks that do not take them are converted on what they do take.
EXAMPLE_SIZE, OTHER_SIZE = (65, 97), (81, 113)


@dataclass(frozen=True)
class Limits:
    """What one network may use."""

    seconds: float = 600.0
    memory_gib: float = 10.0


def check_network(name: str) -> Row:
    """Build a network with random weights and statistics, convert it, and verify laws 1, 2 and 5.

    Returns:
        One row: `result` (`converts`, `refused`, `broken` or `not built`), why, strides, what stays dense, shares of
        the MACs, errors of the laws, seconds.

    Raises:
        MemoryError: there is not enough memory for it.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    row: Row = {"model": name, "family": family_of(name)}
    try:
        model = build_model(name, "none")
    except Exception as error:  # a builder of a foreign library can fail in any way
        _check_memory(error)
        return {**row, "result": "not built", "why": f"{type(error).__name__}: {first_line(error)}"}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    try:
        settle(model, row)
        row |= _compare(model)
    except CadError as error:
        _check_memory(error)
        row |= {"result": "refused", **error.to_dict()}
    except Exception as error:  # the report says so; nothing is left out
        _check_memory(error)
        row |= {"result": "broken", "why": f"{type(error).__name__}: {first_line(error)}"}
    return {**row, "seconds": round(time.perf_counter() - start, 1)}


def _check_memory(error: BaseException | None) -> None:
    """What came from a lack of memory is no result; torch has no type of its own for that on the CPU."""
    while error is not None:
        if isinstance(error, MemoryError) or (
            isinstance(error, RuntimeError) and "allocate memory" in str(error)
        ):
            raise MemoryError from error
        error = error.__cause__


def settle(model: nn.Module, row: Row | None = None) -> None:
    """Random parameters that hide nothing and a network whose values stay moderate.

    Constant parameters (norms, biases, layer scales) get random values, so that no branch is dead; batch norm gets the
    statistics of a random image, slightly disturbed, and weights below one: with weights of one, deep random networks
    amplify rounding errors a thousandfold and more. What kind of network it is is noted in `row`.
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
        _, facts = traceable_part(model, None)
    except CannotConvert:
        row["kind"] = "not traced"
        return
    mixers = position_mixers(flow_forward(facts))
    row["kind"] = "attention" if mixers else "cnn"
    if mixers:
        row["mixers"] = sorted({operation_name(node, facts) for node in mixers})
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad(), evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        facts.model(facts.example)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None and norm.running_mean is not None:
            spread = norm.running_var.sqrt()
            norm.running_mean += 0.1 * spread * torch.randn(spread.shape, generator=generator)
            norm.running_var *= 0.8 + 0.4 * torch.rand(spread.shape, generator=generator)
        if norm.weight is not None:
            norm.weight.data.copy_(0.2 + 0.3 * torch.rand(norm.weight.shape, generator=generator))


def _compare(model: nn.Module) -> Row:
    """Convert and compare; the conversion itself repeats in float64 what float32 is not precise enough to tell."""
    net = _convert(model)
    plan = net.plan
    dtype = next(parameter.dtype for parameter in model.parameters())
    tolerance = TOLERANCE[dtype]
    errors = {"1": 0.0, "2": 0.0}
    for check in net.checks:
        errors[str(check.number)] = max(errors[str(check.number)], check.error)
    sizes = [check.size for check in net.checks if check.number == 1]
    image = _image(model, plan, dtype)
    if dtype == torch.float32 and not _is_finite(net, image):  # random weights let some networks overflow
        return {**_compare(model.double()), "dtype": "float64"}
    errors["5"] = _batch_error(net, image)
    if sizes and not plan.part:
        errors["1"] = max(errors["1"], _identity_error(model, net, image))
        sizes.append((image.shape[2], image.shape[3]))
    broken = [law for law, error in errors.items() if not error <= tolerance]
    return {
        "result": "broken" if broken else "converts",
        "why": f"law {', '.join(broken)} does not hold" if broken else "",
        "output_stride": list(plan.output_stride),
        "strides": list(plan.strides),
        "possible": [list(pair) for pair in plan.possible],
        "identity_level": plan.identity_level,
        "part": plan.part,
        "macs": sum(decision.macs for decision in plan.decisions),
        "share_in_region": round(plan.share("adapt", "keep"), 4),
        "share_after_first_stage": round(plan.share_after_first_stage, 4),
        "dense": _dense(plan),
        "outputs": [list(entry) for entry in plan.standing()],
        "errors": {law: float(f"{error:.1e}") for law, error in errors.items()},
        "image": list(image.shape),
        "sizes": [list(size) for size in dict.fromkeys(sizes)],
    }


def _convert(model: nn.Module) -> AdaptiveModel:
    """On a small example, or on what the network takes."""
    generator = torch.Generator().manual_seed(0)
    for first in model.modules():
        if isinstance(first, nn.Conv2d):
            example = torch.randn(2, first.in_channels, *EXAMPLE_SIZE, generator=generator)
            example = example.to(first.weight.dtype)
            return adaptify(model, "random", example_input=example if _takes(model, example) else None)
    return adaptify(model, "random")  # which refuses it


def _takes(model: nn.Module, image: Tensor) -> bool:
    """Whether a network runs on an image batch; it says in its own way what it takes."""
    with contextlib.suppress(Exception), torch.no_grad(), evaluating(model):
        model(image)
        return True
    return False


def _image(model: nn.Module, plan: Plan, dtype: torch.dtype) -> Tensor:
    """An image batch of another size than the example's, if the network takes one."""
    generator = torch.Generator().manual_seed(1)
    batch, channels, *size = plan.example_shape
    for chosen in (OTHER_SIZE, size):
        image = torch.randn(batch, channels, *chosen, generator=generator).to(dtype)
        if _takes(model.get_submodule(plan.part) if plan.part else model, image):
            break
    return image


def _is_finite(net: AdaptiveModel, image: Tensor) -> bool:
    part = net.adaptive_part
    with torch.no_grad():
        return all(bool(leaf.isfinite().all()) for leaf in _tensors(part(image, mask="none")))


def _batch_error(net: AdaptiveModel, image: Tensor) -> float:
    """Law 5: a batch, each image with its own random level map, against its images one by one."""
    part = net.adaptive_part
    torch.manual_seed(2)
    with torch.no_grad():
        together = part(image, mask="random")
        levels = part.levels
        apart = [part(image[i : i + 1], mask=levels[i : i + 1]) for i in range(len(image))]
    worst = 0.0
    for leaves in zip(*(_tensors(value) for value in (together, *apart)), strict=True):
        worst = max(worst, _error(leaves[0], torch.cat(leaves[1:])))
    return worst


def _identity_error(model: nn.Module, net: AdaptiveModel, image: Tensor) -> float:
    """Law 1 at another size than the example's: the outputs on the network's own grid."""
    level = net.plan.identity_level
    if level is None:
        return 0.0
    with torch.no_grad():
        uniform = net.run(lambda _, features: net.geometry.uniform_like(features, level), image)
        uniform = at_own_samples(uniform, net.graph, net.plan)
        expected = model(image)
    return max(_error(*pair) for pair in zip(_tensors(uniform), _tensors(expected), strict=True))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _error(values: Tensor, expected: Tensor) -> float:
    if values.shape != expected.shape:
        return float("inf")
    error = float((values - expected).abs().max()) / max(scale(expected), 1e-30)
    return error if error == error else float("inf")  # `max` would pass over a NaN


def _dense(plan: Plan) -> list[Row]:
    """The operations that end the region, the most expensive first."""
    total = max(1, sum(decision.macs for decision in plan.decisions))
    ends = sorted(plan.chosen("barrier"), key=lambda decision: -decision.cost)
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


# -- many networks, a process each ---------------------------------------------------------------------


def check_networks(
    names: Sequence[str],
    path: Path,
    *,
    workers: int = 2,
    limits: Limits = Limits(),
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Check networks and append a line for each to a file; those it has already are not checked again.

    Args:
        names: of the networks.
        path: JSON Lines; its first line tells versions and machine.
        workers: processes at a time.
        limits: for each network; one that exceeds them gets a row that says so.
        on_row: called with each new row.

    Returns:
        The rows of the named networks, old and new, in the order of the names.

    Raises:
        FileError: the file cannot be read or written, or is of other versions.
    """
    rows = {row["model"]: row for row in _resume(path)}
    with path.open("a", encoding="utf-8") as file:
        here = commit()
        for row in _in_processes([name for name in names if name not in rows], workers, limits):
            row["commit"] = here
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows[row["model"]] = row
            on_row(row)
    return [rows[name] for name in names]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file written by `check_networks`, without its first line.

    Raises:
        FileError: it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines[1:]]
    except (OSError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read as checked networks.",
            why=first_line(error),
            next="write it with cadsurgery list --check.",
        ) from error


def recorded() -> dict[str, Row]:
    """The rows of the full run that comes with the package, by name."""
    return {row["model"]: row for row in read_rows(RECORDED)} if RECORDED.exists() else {}


def outlook(row: Row) -> str:
    """What a row says, in a line."""
    if row["result"] != "converts":
        why = row.get("why") or row.get("what", "")
        return f"{row['result']}{': ' if why else ''}{why}"
    high, low = row["output_stride"]
    part = f" ({row['part']})" if row["part"] else ""
    dense = "".join(f"; dense: {end['operation']} ({end['why']})" for end in row["dense"][:1])
    return f"converts{part}, {high} to {low}, {row['share_in_region']:.0%} of the MACs in the region{dense}"


def summary(rows: Sequence[Row]) -> str:
    """How many networks have which result."""
    counts = Counter(row["result"] for row in rows)
    return f"{len(rows)} networks: " + ", ".join(
        f"{count} {result}" for result, count in counts.most_common()
    )


def setting() -> Row:
    """Versions and machine: the first line of a file."""
    return {"versions": versions(), "machine": f"{platform.machine()} CPU, one thread per network"}


def _resume(path: Path) -> list[Row]:
    """The rows a file has already; a line that was cut off when a run was stopped is dropped."""
    check_folder(path)
    kept, header = [], setting()
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        values = [value for line in lines if (value := _json_or_none(line)) is not None]
        if values and values[0].get("versions") != header["versions"]:
            raise FileError(
                f"{path} was written with {values[0].get('versions', 'something else')}.",
                why=f"here are {header['versions']}; rows of different versions do not belong together.",
                next="choose another --output, or remove the file.",
            )
        kept = [value for value in values[1:] if "model" in value]
    with write_whole(path) as temporary:
        text = "".join(json.dumps(value) + "\n" for value in (header, *kept))
        Path(temporary).write_text(text, encoding="utf-8")
    return kept


def _json_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _in_processes(names: Sequence[str], workers: int, limits: Limits) -> Iterator[Row]:
    """A row for each network as soon as it is there; each has a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cadsurgery.tasks.zoo_check", "timm", "torchvision"])
    pool = ThreadPoolExecutor(workers)
    try:
        running = [pool.submit(_alone, name, limits, context) for name in names]
        yield from (future.result() for future in as_completed(running))
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(name: str, limits: Limits, context: Any) -> Row:
    """The row of a network that is checked in a process of its own, or that it exceeded a limit."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, limits.memory_gib, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    in_time, row = receiver.poll(limits.seconds), None
    if in_time:
        with contextlib.suppress(EOFError):  # the process has ended without a row
            row = receiver.recv()
    process.kill()
    process.join()
    if row is not None:
        return row
    exceeded = (
        f"needed more than {limits.memory_gib:g} GiB" if in_time else f"took more than {limits.seconds:.0f} s"
    )
    seconds = round(time.perf_counter() - start, 1)
    return {
        **{"model": name, "family": family_of(name), "result": "not checked", "why": exceeded},
        "seconds": seconds,
    }


def _work(name: str, memory_gib: float, sender: Any) -> None:
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        cap = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    torch.set_num_threads(1)
    with contextlib.suppress(MemoryError):  # reported by the parent
        sender.send(check_network(name))
