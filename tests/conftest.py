"""What the tests share: the command line, images, level maps, comparisons. Networks: `networks.py`."""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, combinations, product
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

# Workers share the cores: one thread each, in the processes they start too. Read when torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    gc.disable()  # until all is imported and collected: that stays, and searching it takes seconds

import pytest
import torch
from _pytest.mark import ParameterSet
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.cli import screen
from cadsurgery.kernels import dispatch, isa
from cadsurgery.network.storage import checksum, encode_with_checksum
from cadsurgery.support.processor import processor_in_words
from cadsurgery.surgery import treatment

pytest.register_assert_rewrite("stand_ins", "random_laws")  # before a test imports them

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
# `torch.manual_seed` looks for every kind of device, a millisecond each time.
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
# Whose tests take longest: they begin first, so that none is left at the end, when other workers have nothing to do.
LONGEST = ("test_examples.py", "test_layers.py", "test_docs.py", "test_every_file.py", "test_measuring.py")
MEMORY = {"not slow": 4 << 30, "slow": 8 << 30}  # bytes that a worker and what it starts take at most


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto`: a worker for each core, as far as memory goes."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY.get(config.option.markexpr, MEMORY["slow"])))


def pytest_report_header() -> str:
    """On what the tests run."""
    return f"processor: {processor_in_words() or 'unknown'}; {isa.in_words()}"


def left_out(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """What CADSURGERY_FEW leaves out, as `.ci/run` sets it: tests marked `thorough`; with `few=n` every n-th case of a
    test stays."""
    seen, left = Counter[str](), []
    for item in items:
        mark, test = item.get_closest_marker("thorough"), item.nodeid.partition("[")[0]
        if mark is not None:
            few = mark.kwargs.get("few", 0)
            if not few or seen[test] % few:
                left.append(item)
            seen[test] += 1
    return left


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let warnings be errors in the tests that everybody runs: the slow ones write files of, and compile, networks for
    which the package warns on purpose. And let the longest begin first."""
    if "CADSURGERY_FEW" in os.environ:
        config.hook.pytest_deselected(items=(others := left_out(items)))
        gone = set(others)
        items[:] = [item for item in items if item not in gone]
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        if item.get_closest_marker("thorough"):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.filterwarnings("default"))


def pytest_collection_finish() -> None:
    """What is there now stays; only what tests make is searched for garbage."""
    gc.freeze()
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m smoke` imports only the files that have such a test."""
    if config.option.markexpr != "smoke" or not collection_path.name.startswith("test_"):
        return None
    return "mark.smoke" not in collection_path.read_text(encoding="utf-8") or None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """At the end all of it goes, as ever; the last line is `in_words`."""
    gc.unfreeze()
    result = yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(in_words(reporter.stats))
    return result


def in_words(stats: Mapping[str, Sequence[Any]]) -> str:
    """How many tests failed, passed and were skipped, and why they were: reports by outcome."""
    kinds = ("failed", "error", "passed", "skipped")
    counts = ", ".join(f"{len(stats[kind]):,} {kind}" for kind in kinds if stats.get(kind))
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", ()))
    why = "; ".join(f"{count} since {reason}" for reason, count in reasons.most_common())
    return f"{counts or 'no tests'}{': ' if why else ''}{why}"


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    SEED(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch computes in one thread until the end of the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window: of the system, or of Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as running:
        try:
            chromium = running.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
        except playwright.Error as error:
            pytest.skip(f"there is no Chromium here: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@contextmanager
def without_kernels() -> Iterator[None]:
    """What is called within runs by torch's operations, as where there is no compiler."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CADSURGERY_NATIVE", "0")
            dispatch.forget()
            yield
    finally:
        dispatch.forget()


Cap = Callable[[str], None]


@pytest.fixture
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `recommend` run what it would compile by torch.compile, which takes many seconds a network, as it is."""
    from cadsurgery.tasks.recommend.calls import Calls

    monkeypatch.setattr(Calls, "_compiled", lambda calls, _: calls._given)


@pytest.fixture
def cap_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cap]:
    """A function that caps the kernels to an instruction set until the end of the test; "" is no cap."""

    def cap(name: str) -> None:
        monkeypatch.setenv(isa.VARIABLE, name)
        dispatch.forget()

    yield cap
    monkeypatch.undo()
    dispatch.forget()


class Result(NamedTuple):
    """Exit code and what a command printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, as values."""
        return json.loads(self.out)


Run = Callable[..., Result]


def slow(*values: Any) -> ParameterSet:
    """Parameters of a case that only the slow part runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def thorough(*values: Any, few: int = 0) -> ParameterSet:
    """Parameters of a case that only the slow part runs, and `.ci/run` does not: others prove nearly the same. With
    `few` it runs one case of so many."""
    return pytest.param(*values, marks=pytest.mark.thorough(few=few))


def some(values: Iterable[Any], every: int = 2, rows: bool = False) -> list[Any]:
    """One case of so many, from the first on, for the default suite; the others of the same law are slow, of which
    `.ci/run` runs one of three. With `rows` each is a tuple of several parameters."""

    def case(value: Any) -> Any:
        if isinstance(value, ParameterSet):
            return pytest.param(*value.values, marks=[*value.marks, pytest.mark.thorough(few=3)], id=value.id)
        return thorough(*value, few=3) if rows else thorough(value, few=3)

    return [case(value) if place % every else value for place, value in enumerate(values)]


def covering(*axes: Sequence[Any], few: int = 3) -> list[ParameterSet]:
    """Combinations of parameters that have each pair of values once: a fault of two that meet is found.

    The default suite runs so few that each value is in one; the others are slow, of which `.ci/run` runs one of `few`,
    or none where that is 0. Values that are marked themselves, as `pytest.param`, keep their marks and are in none of
    the few.
    """
    marks = [[value.marks if isinstance(value, ParameterSet) else () for value in axis] for axis in axes]
    values = [
        [value.values[0] if isinstance(value, ParameterSet) else value for value in axis] for axis in axes
    ]
    plain = [[place for place, mark in enumerate(axis) if not mark] for axis in marks]
    first = [tuple(axis[k % len(axis)] for axis in plain) for k in range(max(map(len, plain)))]
    cases = []
    for places in sorted(_with_each_pair(first, [range(len(axis)) for axis in axes])):
        given = [axis[place] for axis, place in zip(values, places, strict=True)]
        own = [mark for axis, place in zip(marks, places, strict=True) for mark in axis[place]]
        cases.append(
            pytest.param(
                *given,
                marks=own if places in first else [*own, pytest.mark.thorough(few=few)],
                id="-".join(map(_short, given)),
            )
        )
    return cases


def _short(value: Any) -> str:
    return type(value).__name__ if isinstance(value, nn.Module) else getattr(value, "__name__", str(value))


def _with_each_pair(few: Sequence[tuple[int, ...]], axes: Sequence[range]) -> set[tuple[int, ...]]:
    """The few, and of all combinations always the one that has most pairs which are in none yet."""
    pairs = {places: set(combinations(enumerate(places), 2)) for places in product(*axes)}
    taken = set(few)
    left = set().union(*pairs.values()).difference(*(pairs[places] for places in few))
    while left:
        best = max(pairs, key=lambda places: len(pairs[places] & left))
        taken.add(best)
        left -= pairs[best]
    return taken


@pytest.fixture
def command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `cadsurgery ARGS`, or the command line of `module`, here or in several processes.

    The working folder is an empty one, whose modules can be imported.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "usernets", raising=False)
    monkeypatch.setattr(screen, "out", Console(width=200))
    monkeypatch.setattr(screen, "err", Console(width=200, stderr=True))

    def call(*arguments: object, processes: int = 1, module: str = "cadsurgery.cli") -> Result:
        if processes > 1:
            torchrun = ("torch.distributed.run", "--standalone", f"--nproc_per_node={processes}")
            done = subprocess.run(
                [sys.executable, "-m", *torchrun, "-m", module, *map(str, arguments)],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(map(str, (ROOT, tmp_path))),
                    "OMP_NUM_THREADS": "1",
                },
                capture_output=True,
                text=True,
            )
            return Result(done.returncode, done.stdout, done.stderr)
        monkeypatch.setattr(sys, "argv", ["cadsurgery", *map(str, arguments)])
        capsys.readouterr()
        code: Any = 0
        try:
            importlib.import_module(module).main()
        except SystemExit as request:
            code = request.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def printed(report: Any) -> str:
    """A report as the terminal shows it."""
    console = Console(file=io.StringIO(), width=200)
    console.print(report.render())
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The file of a converted network with other metadata, and the checksums that belong to what is in it now."""
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["cadsurgery"])
    tensors = load_file(path)
    metadata["tensors"] = checksum(tensors)
    change(metadata)
    del metadata["sha256"]
    save_file(tensors, path, {"cadsurgery": encode_with_checksum(metadata)})
    return path


def images(batch: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random images (B, 3, H, W)."""
    return torch.randn(batch, 3, height, width, dtype=dtype)


def picture(batch: int, height: int, width: int) -> Tensor:
    """Noise above, smooth below: every mask keeps a part."""
    image = images(batch, height, width)
    image[:, :, height // 2 :] = torch.nn.functional.avg_pool2d(image, 9, 1, 4)[:, :, height // 2 :] / 4
    return image


def random_levels(
    batch: int,
    size: tuple[int, int],
    strides: tuple[int, ...],
    *,
    max_level: int | None = None,
    patch: str = "quadtree",
    split: float = 0.5,
) -> Tensor:
    """A legal level map (B, H, W), another one for each image; cells may stick out of the map.

    quadtree: from blocks of the largest side on, each is split into those of the level before or kept.
    block: each block of the largest side is at level 0 or at `max_level` as a whole.
    """
    sides = list(accumulate(strides, mul, initial=1))
    top = len(strides) if max_level is None else max_level
    if patch == "block":
        return torch.where(_coin(batch, size, sides[-1], split), 0, top)
    levels = torch.full((batch, *size), top)
    for level in range(top, 0, -1):
        levels[(levels == level) & _coin(batch, size, sides[level], split)] = level - 1
    return levels


def _coin(batch: int, size: tuple[int, int], side: int, chance: float) -> Tensor:
    """A random bool map (B, H, W), constant on aligned blocks."""
    blocks = torch.rand(batch, -(-size[0] // side), -(-size[1] // side)) < chance
    return blocks.repeat_interleave(side, 1).repeat_interleave(side, 2)[:, : size[0], : size[1]]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|; infinite if the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


@contextmanager
def pointwise_rule(kind: type[nn.Module]) -> Iterator[None]:
    """A rule of a user's own for the block: modules of this class act on each value alone."""

    @cs.rule(kind)
    def pointwise(node: Any, facts: Any) -> cs.Treatment:
        """Acts on each value alone."""
        return cs.Treatment("pointwise")

    yield
    del treatment._RULES[kind]


def assert_same(found: Any, expected: Any, tolerance: float | None = None) -> None:
    """Two tensors, or dictionaries, lists and tuples of them, are equal up to rounding of their type."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = [found[key] for key in expected], [*expected.values()]
    if isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance)
        return
    assert found.shape == expected.shape, f"{tuple(found.shape)} against {tuple(expected.shape)}"
    assert found.dtype == expected.dtype
    limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    error = relative_error(found, expected)
    assert error < limit, f"relative error {error:.2e}"
