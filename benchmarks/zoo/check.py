"""Coverage: build, convert and verify many networks, to find out which of them convert.

    python -m benchmarks.zoo.check "*resnet*" --output rows.jsonl      # networks of torchvision and timm
    python -m benchmarks.zoo.check --corpus --output rows.jsonl        # the corpus, tests/corpus
    python -m benchmarks.zoo.check mine.py --corpus                    # networks of your own, see corpus.py

Every network is checked in a separate process with limits on memory and time, and adds one JSON line to a file. A
check that is started again continues where it stopped. The file of the last full run is part of the package, which
`cadsurgery list` reads: `cadsurgery/tasks/zoo.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo.bands_check import check_in_bands
from benchmarks.zoo.corpus import Subject, beside, family_of, find_corpus, read_corpus, subject
from benchmarks.zoo.network_check import check_network
from cadsurgery.data.networks import list_models
from cadsurgery.support.errors import FileError
from cadsurgery.support.files import check_folder, check_writable, write_whole
from cadsurgery.support.provenance import commit, device_in_words, versions
from cadsurgery.tasks.zoo_record import Row, outlook, summary


@dataclass(frozen=True)
class Limits:
    """Limits of time and memory for one network."""

    seconds: float = 600.0
    memory_gib: float = 10.0


@dataclass(frozen=True)
class Check:
    """How networks are checked.

    Attributes:
        row_of: checks the network of a name in a process of its own, so that it must be picklable.
        known: what rows of each name have in any case, at least `family`.
        imported_first: modules that the processes share.
        corpus: file or folder from which modules can be imported.
    """

    row_of: Callable[[str], Row]
    known: Mapping[str, Row]
    imported_first: tuple[str, ...]
    corpus: Path | None = None


# -- many networks, one process each -------------------------------------------------------------------


def check_networks(
    names: Sequence[str],
    path: Path,
    *,
    corpus: Path | None = None,
    check: Check | None = None,
    workers: int = 2,
    limits: Limits = Limits(),
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Check networks and append a line for each to a file; networks that are in the file are not checked again.

    Args:
        names: names of the networks.
        path: JSON Lines file; its first line contains versions and machine.
        corpus: file or folder that defines the networks; None for networks of torchvision and timm.
        check: how a network is checked; default: `check_network`, of the corpus or by its name.
        workers: number of simultaneous processes.
        limits: limits for each network; a network that exceeds them gets a row that says so.
        on_row: called with each new row.

    Returns:
        The rows of the named networks, old and new, in the order of the names.

    Raises:
        FileError: the file cannot be read or written, or was written with other versions.
    """
    rows = {row["model"]: row for row in _resume(path)}
    with check_writable(path).open("a", encoding="utf-8") as file:
        here = commit()
        missing = [name for name in names if name not in rows]
        for row in _in_processes(missing, check or _usual_check(missing, corpus), workers, limits):
            row["commit"] = here
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows[row["model"]] = row
            on_row(row)
    return [rows[name] for name in names]


def _resume(path: Path) -> list[Row]:
    """Return the rows of an existing file; a line that was cut off when a run was stopped is dropped."""
    check_folder(path)
    header = {
        "versions": versions(),
        "machine": f"{device_in_words(torch.device('cpu'))}; one thread per network",
    }
    values: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                values.append(json.loads(line))
    if values and values[0].get("versions") != header["versions"]:
        raise FileError(
            f"{path} was written with {values[0].get('versions', 'something else')}.",
            why=f"here are {header['versions']}; rows of different versions do not belong together.",
            next="choose another --output, or remove the file.",
        )
    rows = [value for value in values[1:] if "model" in value]
    with write_whole(path) as temporary:
        text = "".join(json.dumps(value) + "\n" for value in (header, *rows))
        Path(temporary).write_text(text, encoding="utf-8")
    return rows


def _usual_check(
    names: Sequence[str], corpus: Path | None, check_one: Callable[[Subject], Row] = check_network
) -> Check:
    families = {name: name.partition(":")[0] if corpus else family_of(name) for name in names}
    files = sorted(set(families.values())) if corpus else []
    row_of = partial(_check_named, corpus=corpus, check_one=check_one)
    known = {name: {"family": family} for name, family in families.items()}
    return Check(row_of, known, ("benchmarks.zoo.check", "timm", "torchvision", *files), corpus)


def _check_named(name: str, corpus: Path | None, check_one: Callable[[Subject], Row]) -> Row:
    return check_one(subject(name, corpus))


def _in_processes(names: Sequence[str], check: Check, workers: int, limits: Limits) -> Iterator[Row]:
    """Yield a row for each network as soon as it is finished; each runs in its own process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(check.imported_first))
    pool = ThreadPoolExecutor(workers)
    try:
        with beside(check.corpus) if check.corpus else contextlib.nullcontext():
            running = [pool.submit(_alone, name, check, limits, context) for name in names]
            yield from (future.result() for future in as_completed(running))
    finally:
        pool.shutdown(cancel_futures=True)


def _alone(name: str, check: Check, limits: Limits, context: Any) -> Row:
    """Check a network in its own process and return its row, which says so if a limit was exceeded."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(name, check.row_of, limits.memory_gib, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    in_time, row = receiver.poll(limits.seconds), None
    if in_time:
        with contextlib.suppress(EOFError):  # the process ended without a row
            row = receiver.recv()
        process.join(10)
    code = process.exitcode or 0
    process.kill()
    process.join()
    if row is not None:
        return {**row, **check.known[name]}
    result, why = "not checked", f"took more than {limits.seconds:.0f} s"
    if in_time and code:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        result, why = "broken", f"its process {ended}"
    elif in_time:
        why = f"needed more than {limits.memory_gib:g} GiB"
    seconds = round(time.perf_counter() - start, 1)
    return {"model": name, **check.known[name], "result": result, "why": why, "seconds": seconds}


def _work(name: str, row_of: Callable[[str], Row], memory_gib: float, sender: Any) -> None:
    with contextlib.suppress(ImportError):  # not available on Windows
        import resource

        cap = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (cap, cap))
    torch.set_num_threads(1)
    with contextlib.suppress(MemoryError):  # the parent process reports it
        sender.send(row_of(name))


def main() -> None:
    """Check networks, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "pattern", nargs="?", default="*", help="of names; with --corpus also a file or folder"
    )
    parser.add_argument("--library", default="", help="torchvision or timm; default both")
    parser.add_argument("--corpus", action="store_true", help="check networks of Python files, which are run")
    parser.add_argument(
        "--bands", action="store_true", help="compare pictures in bands of rows with whole ones"
    )
    parser.add_argument("--output", type=Path, default=Path("zoo.jsonl"))
    parser.add_argument("--workers", type=int, default=2, help="number of networks at a time")
    parser.add_argument("--memory", type=float, default=Limits.memory_gib, help="limit for a network, in GiB")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="limit for a network")
    options = parser.parse_args()
    folder, pattern = find_corpus(options.pattern) if options.corpus else (None, options.pattern)
    if folder is None:
        names = list_models(pattern, options.library)
    else:
        names = [subject.name for subject in read_corpus(folder, pattern)]

    def tell(row: Row) -> None:
        print(f"{row['model']:40} {outlook(row)}", flush=True)

    limits = Limits(options.seconds, options.memory)
    check = _usual_check(names, folder, check_in_bands) if options.bands else None
    rows = check_networks(
        names, options.output, corpus=folder, check=check, workers=options.workers, limits=limits, on_row=tell
    )
    print(summary(rows))


if __name__ == "__main__":
    main()
