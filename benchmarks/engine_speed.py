"""Time converted and dense networks in ONNX Runtime and OpenVINO, in float32 and int8, with and without our kernels.

    python -m benchmarks.engine_speed FOLDER --write [--data DATA]               # files: minutes for each network
    python -m benchmarks.engine_speed FOLDER --time [--isa avx2] [--rounds 3]    # on a quiet machine
    python -m benchmarks.engine_speed --table                                    # those of docs/data/deploy.md alone

Networks of torchvision have random weights, `edges | budget:fraction=0.34`, output strides 8 to 32, linear fill, one
image of 512 x 1024; `camvid` (with --data) is the trained network of recipes/camvid_mobilenetv2,
`detail | budget:fraction=0.1`, 8 to 16, guided (`camvid_linear`: linear), on an image of 360 x 480. The sides: the
converted network, dense high and dense low, and dense high on a picture of .7 of the size. All sides of a network and a
precision run in turn in each round, on one thread, in a process of its own. Files lie in FOLDER and are kept; int8 is
calibrated by the image itself.
Results: docs/engines.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

import cadsurgery as cs
from benchmarks.instruction_sets import environment_of
from benchmarks.trained import NETWORKS as TRAINED
from cadsurgery.data.images import street_scene
from cadsurgery.kernels import isa
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.network.export import onnx
from cadsurgery.network.export.engines import ENGINES, engine_for
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.support.files import make_folder, write_whole
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved
from cadsurgery.tasks.sides.dense_file import write_dense
from cadsurgery.tasks.sides.engine_sides import scaled_size

RESULTS = Path(__file__).parents[1] / "docs" / "engines.json"
PAGE = RESULTS.with_name("data") / "deploy.md"
MARK_OF_TABLES, MARK_OF_SUMMARY, END = "<!-- engine speed -->", "<!-- engine summary -->", "<!-- end -->"
NETWORKS = (
    "camvid",
    "camvid_linear",
    "mobilenet_v2",
    "regnet_y_400mf",
    "resnet50",
    "convnext_tiny",
    "deeplabv3_resnet101",
)
PRECISIONS = ("float32", "int8")
PLAIN = ("onnx", "openvino")
SMALLER = 0.7
CONVERTED, WITH_KERNELS, HIGH, LOW, SMALL = (
    "converted",
    "converted, kernels",
    "dense high",
    "dense low",
    "dense high, smaller",
)


def converted(name: str, data: Path | None) -> tuple[cs.AdaptiveModel, Tensor]:
    """Return a converted network and its image."""
    torch.manual_seed(0)
    if name.startswith("camvid"):
        assert data is not None, "camvid needs --data"
        model, pictures = TRAINED["camvid-8"](data)
        image, mask, strides = pictures[0][0][None], "detail | budget:fraction=0.1", (8, 16)
        fill = "linear" if name.endswith("linear") else "guided"
    else:
        about = {"weights_backbone": None} if "deeplab" in name else {}
        model = torchvision.models.get_model(name, weights=None, **about).eval()
        image, mask = street_scene(512, 1024)[None], "edges | budget:fraction=0.34"
        strides, fill = (8, 32), "linear"
    options = {"output_stride": strides, "fill": fill, "example_input": image, "verify_laws": False}
    return cs.adaptify(model, mask, **options), image  # type: ignore[arg-type]


def shrink(image: Tensor, low: int) -> Tensor:
    """Return a smaller picture."""
    size = scaled_size(image.shape[2:], SMALLER, low)
    return F.interpolate(image, size, mode="bilinear", antialias=True)


# -- files -----------------------------------------------------------------------------------------------


def write(name: str, folder: Path, data: Path | None, precisions: Sequence[str]) -> None:
    """Write what is missing of a network's files: in float32 one for both engines, in int8 one for each."""
    net, image = converted(name, data)
    small = shrink(image, net.plan.output_stride[1])
    dense = {HIGH: (0, image), LOW: (net.geometry.max_level, image), SMALL: (0, small)}
    for side in (CONVERTED, WITH_KERNELS, *dense):
        path = path_of(folder, name, side, "float32", "onnx")
        if not path.exists():
            print(name, side, flush=True)
            if side in dense:
                write_dense(net, *dense[side], path, ENGINES["onnx"])
            else:
                cs.export(net, image, path, with_kernels=side == WITH_KERNELS)
        for engine in PLAIN if "int8" in precisions else ():
            rounded = path_of(folder, name, side, "int8", engine)
            if rounded.exists():
                continue
            print(name, side, "int8", engine, flush=True)
            run = engine_for(engine, with_kernels=side == WITH_KERNELS)
            started = rounded.with_name(f"started-{rounded.name}")
            if side in dense:
                shutil.copy(path, started)
                print(to_8_bits(started, run, [(dense[side][1],)]), flush=True)
            else:  # in other forms than in float32
                onnx.write(net, image, None, started, False, False, False, run, (image,))
            started.replace(rounded)


def path_of(folder: Path, name: str, side: str, precision: str, engine: str) -> Path:
    """Return the file of a side."""
    of_engine = "" if precision == "float32" else f"-{engine}"
    words = side.replace(", ", "-").replace(" ", "-")
    return make_folder(folder / name) / f"{words}-{precision}{of_engine}.onnx"


# -- times -----------------------------------------------------------------------------------------------


def measure(name: str, precision: str, folder: Path, data: Path | None, rounds: int) -> dict[str, Any]:
    """Time all sides of a network in a precision, on one thread."""
    torch.set_num_threads(1)
    net, image = converted(name, data)
    small = shrink(image, net.plan.output_stride[1])
    counted = net.macs(image)
    work = dict.fromkeys((CONVERTED, WITH_KERNELS), counted.mask)
    work |= {HIGH: counted.high, LOW: counted.low, SMALL: net.macs(small, mask="none").high}
    calls: dict[str, Callable[[], Any]] = {}
    for side in work:
        for engine in PLAIN:
            path = path_of(folder, name, side, precision, engine)
            if path.exists():
                run = engine_for(engine, with_kernels=side == WITH_KERNELS)(path, 1)
                calls[f"{side} in {engine}"] = partial(run, small if side == SMALL else image)
    if precision == "float32":
        calls[f"{CONVERTED} in torch"] = partial(net.optimize(), image)
        for side, level in ((HIGH, 0), (LOW, net.geometry.max_level)):
            calls[f"{side} in torch"] = partial(dense_twin(net, level, image), image)
    times = interleaved(calls, rounds=rounds)
    rows = [
        {
            "side": side,
            "engine": engine,
            "work": work[side] / counted.high,
            "milliseconds": times[key].best,
            "median": times[key].median,
        }
        for key in calls
        for side, engine in [key.rsplit(" in ", 1)]
    ]
    return {
        **describe_run(torch.device("cpu")),
        "rounds": rounds,
        "given": counted.given / counted.high,
        "rows": rows,
    }


# -- the page --------------------------------------------------------------------------------------------


NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
COLUMNS = (HIGH, LOW, SMALL, CONVERTED, WITH_KERNELS)
FILES = {CONVERTED: "standard operations", WITH_KERNELS: "[with kernels](#with-this-packages-kernels)"}


def key_of(cap: str, precision: str, device: str) -> str:
    """Return the key of a measurement: one for each instruction set, precision and processor."""
    model = re.search(r"family \d+ model \d+", device)
    return f"{cap}, {precision}, {model[0] if model else device}"


def summary(found: Mapping[str, Any]) -> str:
    """Return the table of what is realised of the ratio, for processors that were not capped."""
    runs = {name: {k: run for k, run in of.items() if not _is_capped(run)} for name, of in found.items()}
    processors = sorted({(key.split(", ")[0], key.split(", ")[2]) for of in runs.values() for key in of})
    heads = [f"{NAMES[engine]}, {cap}, {model}" for cap, model in processors for engine in PLAIN]
    lines = [f"| network | precision | file | {' | '.join(heads)} |", "|---" * (3 + len(heads)) + "|"]
    for name in [name for name in NETWORKS if name in runs]:
        for precision in PRECISIONS:
            for side, words in FILES.items():
                cells = [
                    _realised(runs[name].get(f"{cap}, {precision}, {model}"), engine, side)
                    for cap, model in processors
                    for engine in PLAIN
                ]
                if any(cells):
                    lines.append(f"| {name} | {precision} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _is_capped(run: Mapping[str, Any]) -> bool:
    return isa.VARIABLE in run["instruction_sets"]


def _realised(run: Mapping[str, Any] | None, engine: str, side: str) -> str:
    """Return the speed-up over dense high times the work, in words; empty if it was not measured."""
    rows = {row["side"]: row for row in run["rows"] if row["engine"] == engine} if run else {}
    if side not in rows:
        return ""
    speed_up = rows[HIGH]["milliseconds"] / rows[side]["milliseconds"]
    slower = ": slower" if speed_up < 1 else ""
    return f"{speed_up * rows[side]['work']:.2f}{slower}"


def tables(found: Mapping[str, Any]) -> str:
    """Return a table for each instruction set, processor and precision."""
    parts = []
    for key in sorted({key for runs in found.values() for key in runs}, key=_order):
        runs = {name: found[name][key] for name in NETWORKS if key in found.get(name, {})}
        cap, precision, _ = key.split(", ")
        versions = {name: run["versions"] for name, run in runs.items()}
        parts.append(
            f"**{precision}, {cap}.** {_all(runs, 'device')}; torch {_all(versions, 'torch')}; "
            f"{_all(runs, 'rounds')} rounds; commit {_all(runs, 'commit')}.\n\n"
            "| network | work | engine | dense high | dense low | dense high at .7 | converted | with kernels | "
            "speed-up | of the ratio |\n|---|---|---|---|---|---|---|---|---|---|\n"
            + "".join(line for name, run in runs.items() for line in _lines(name, run))
        )
    return "\n".join(parts)


def _order(key: str) -> tuple[str, str, str]:
    cap, precision, model = key.split(", ")
    return cap, model, precision


def _all(runs: Mapping[str, Any], what: str) -> str:
    """Return the different values of several runs in words."""
    return " and ".join(dict.fromkeys(str(run[what]) for run in runs.values()))


def _lines(name: str, run: Mapping[str, Any]) -> Iterator[str]:
    """Yield a row for each engine; the speed-up is that of the faster converted file.

    Caps do not bind ONNX Runtime's own operations, so that a run under one says nothing of it.
    """
    is_capped = _is_capped(run)
    for engine, words in NAMES.items():
        if is_capped and engine == "onnx":
            continue
        rows = {row["side"]: row for row in run["rows"] if row["engine"] == engine}
        work, high = rows[WITH_KERNELS]["work"], rows[HIGH]["milliseconds"]
        best = high / min(rows[side]["milliseconds"] for side in (CONVERTED, WITH_KERNELS) if side in rows)
        cells = [
            f"{rows[side]['milliseconds']:.0f} ({rows[side]['median']:.0f})" if side in rows else ""
            for side in COLUMNS
        ]
        first = (name, f"{work:.2f}") if engine == "onnx" or is_capped else ("", "")
        yield f"| {' | '.join([*first, words, *cells, f'{best:.2f}', f'{best * work:.2f}'])} |\n"


def write_page() -> None:
    """Put the tables into the page."""
    page = PAGE.read_text(encoding="utf-8")
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    for mark, made in ((MARK_OF_SUMMARY, summary(found)), (MARK_OF_TABLES, tables(found))):
        before, rest = page.split(f"{mark}\n")
        page = f"{before}{mark}\n{made}{END}{rest.partition(END)[2]}"
    with write_whole(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def main() -> None:
    """Write files, time them, or print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument(
        "--isa", default="", help="cap of torch, oneDNN, OpenVINO and our kernels; not of ONNX Runtime"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--table", action="store_true", help="write the tables from docs/engines.json alone")
    parser.add_argument("--one", nargs=2, metavar=("NETWORK", "PRECISION"), help="one measurement, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.folder, options.data, options.rounds)))
        return
    for name in options.networks.split(",") if options.write or options.time else ():
        if options.write:
            write(name, options.folder, options.data, options.precisions.split(","))
        for precision in options.precisions.split(",") if options.time else ():
            command = [sys.executable, "-m", "benchmarks.engine_speed", str(options.folder)]
            command += ["--one", name, precision, "--rounds", str(options.rounds)]
            command += ["--data", str(options.data)] if options.data else []
            environment = {**os.environ, **(environment_of(options.isa) if options.isa else {})}
            done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            cap = options.isa or isa.used()
            found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
            run = json.loads(done.stdout.splitlines()[-1])
            found.setdefault(name, {})[key_of(cap, precision, run["device"])] = run
            with write_whole(RESULTS) as temporary:
                temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(name, precision, "measured", flush=True)
    if options.time or options.table:
        write_page()


if __name__ == "__main__":
    main()
