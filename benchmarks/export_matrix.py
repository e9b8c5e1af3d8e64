"""Write networks, masks and fills as ONNX files and record which ones work: the table of docs/data/deploy.md.

    python benchmarks/export_matrix.py [--only TEXT ...] [--cells N]   # continues an interrupted run
    python benchmarks/export_matrix.py --report

Each cell is exported in a separate process with `cs.export`, which compares the file with PyTorch in ONNX Runtime: a
dynamic file on four batches of other sizes, one of them odd, a static file on three other batches. Weights are
random; batch norms get the statistics of an image where features would fade otherwise. `effect` is how much the mask
can change the output. The first third of the cells contains every pair of network, mask, fill and format.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS, DOCS = ROOT / "docs" / "bench" / "exports.jsonl", ROOT / "docs" / "data" / "deploy.md"
SIZE, OTHER = (128, 160), 1  # size of the example, and seed of the comparison
LEAST_EFFECT, SECONDS = 1e-2, 3600.0  # the time of a cell

NETWORKS = {
    "deeplabv3_resnet50": {},
    "fcn_resnet50": {},
    "lraspp_mobilenet_v3_large": {"output_stride": (8, 32)},
    "benchmarks.networks:mobilenet_v2_fcn": {},
    "benchmarks.networks:vgg16_trunk": {"output_stride": (1, 8)},
    "convnext_tiny": {},
    "efficientnet_b0": {},
    "benchmarks.networks:resnet18_unet": {},
}
GRADED = "edges:threshold=0.35/0.1,dilation=11/21"
# Masks of a static and of a dynamic file; a fixed map of any size is an input.
MASKS = {
    "edges": ("edges | budget:fraction=0.3", "edges"),
    "graded edges": (f"{GRADED} | budget:fraction=0.1/0.3", GRADED),
    "detail": ("detail | budget:fraction=0.3", "detail"),
    "learned": ("learned", "learned"),
    "fixed map": ("", ""),
}
FILLS = ("linear", "nearest", "guided")
FORMATS = ("static", "dynamic")

Cell = tuple[str, str, str, str]


def cells() -> list[Cell]:
    """List network, mask, fill and format of all cells; a Latin square of fills first."""
    return [
        (network, mask, FILLS[(row + column + turn) % len(FILLS)], kind)
        for turn in range(len(FILLS))
        for kind in reversed(FORMATS)
        for (row, network), (column, mask) in itertools.product(enumerate(NETWORKS), enumerate(MASKS))
    ]


def export(cell: Cell) -> dict[str, Any]:
    """Export a cell in this process and return its row."""
    import torch

    import cadsurgery as cs
    from cadsurgery.tasks.open import example_batch, open_converted

    network, mask, fill, kind = cell
    torch.set_num_threads(1)
    options = {"fill": fill, **NETWORKS[network]}
    net = open_converted(network, MASKS[mask][FORMATS.index(kind)], options).eval()
    image, other = (example_batch(net.source, None, SIZE, seed) for seed in (0, OTHER))
    if effect(net, other) < LEAST_EFFECT:
        settle(net, image)
    with torch.no_grad():
        net(image)  # creates the weights of a learned mask
    if mask == "fixed map":
        generator = torch.Generator().manual_seed(0)
        net.mask = torch.randint(net.geometry.max_level + 1, net.levels.shape[1:], generator=generator)
    dynamic = kind == "dynamic"
    with tempfile.TemporaryDirectory() as folder:
        report = cs.export(
            net,
            image,
            Path(folder) / "net.onnx",
            dynamic=dynamic,
            level_map=dynamic and mask == "fixed map",
            other=other,
        )
    with torch.no_grad():
        net(other)
        fraction = net.active_fraction
    return {
        "effect": effect(net, other),
        "result": "agrees",
        "difference": report.difference,
        "compared": report.compared,
        "image": report.image,
        "active_fraction": fraction,
        "bytes": report.bytes,
    }


def effect(net: Any, image: Any) -> float:
    """Return how much the mask can change the output, relative to its largest value."""
    import torch
    from torch.utils._pytree import tree_leaves

    with torch.no_grad():
        high, low = (tree_leaves(net(image, mask=mask))[0] for mask in ("all", "none"))
    return float((high - low).abs().max() / high.abs().max())


def settle(net: Any, image: Any) -> None:
    """Give batch norms the statistics of their inputs, as in a trained network.

    With random weights and initial statistics, features of some networks fade, and the mask would have no effect on
    the output. This is not done for all networks: in a deep one with random weights, such statistics amplify
    rounding errors, to 1e-4 in PyTorch itself.
    """
    import torch

    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        net.train(bool(norms))(torch.cat((image, image.flip(2), image.flip(3), -image)), mask="all")
    net.eval()


def run(cell: Cell) -> dict[str, Any]:
    """Export a cell in a separate process and return its row."""
    start, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=ROOT)
        line = done.stdout.strip().splitlines()[-1:] or [""]
        row = (
            json.loads(line[0])
            if line[0].startswith("{")
            else {"result": "broken", "why": done.stderr[-500:]}
        )
    except subprocess.TimeoutExpired:
        row = {"result": "not finished", "why": f"more than {SECONDS:.0f} s"}
    spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
    made = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(spent, 1)}
    return dict(zip(("network", "mask", "fill", "format"), cell, strict=True)) | row | made


def known() -> dict[Cell, dict[str, Any]]:
    """Return the existing rows; for repeated cells the last one."""
    lines = ROWS.read_text(encoding="utf-8").splitlines() if ROWS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["network"], row["mask"], row["fill"], row["format"]): row for row in rows}


def report() -> str:
    """Return the table: a line per network and format, a column per mask, a letter per fill."""
    rows = known()
    lines = ["| network | file | " + " | ".join(MASKS) + " |", "|---|---|" + "---|" * len(MASKS)]
    for network, kind in itertools.product(NETWORKS, FORMATS):
        entries = []
        for mask in MASKS:
            found = [(fill, rows.get((network, mask, fill, kind))) for fill in FILLS]
            words = [f"{fill} {_entry(row)}" for fill, row in found if row is not None]
            entries.append("<br>".join(words) or "not run")
        lines.append(f"| {network.rpartition(':')[2]} | {kind} | {' | '.join(entries)} |")
    agree = [row for row in rows.values() if row["result"] == "agrees"]
    failed = [row for row in rows.values() if row["result"] != "agrees"]
    largest = max((row["difference"] for row in agree), default=float("nan"))
    effect = min((row["effect"] for row in agree), default=float("nan"))
    seconds = sorted(row["cpu_seconds"] for row in agree)
    commits = sorted({row["commit"][:7] for row in rows.values()})
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in ("torch", "onnx", "onnxscript", "onnxruntime")
    )
    words = [
        f"{len(rows)} of {len(cells())} cells written, {len(agree)} agree; largest difference {largest:.0e} of the "
        f"largest output, of which the mask can change {effect:.0e} or more; "
        f"{seconds[len(seconds) // 2]:.0f} s of CPU time for each (median). {versions}; CPU; "
        f"commits {', '.join(commits)}.",
        "",
        *lines,
    ]
    words += (
        ["", *(f"- {_name(row)}: {row['result']}: {row.get('why', '')}" for row in failed)] if failed else []
    )
    return "\n".join(words)


def _entry(row: dict[str, Any]) -> str:
    return f"{row['difference']:.0e}" if row["result"] == "agrees" else f"**{row['result']}**"


def _name(row: dict[str, Any]) -> str:
    return ", ".join(row[name] for name in ("network", "mask", "fill", "format"))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="only cells with all of these: mask, fill, format, or part of a network's name",
    )
    parser.add_argument("--cells", type=int, default=None, help="stop after this number of cells")
    parser.add_argument("--report", action="store_true", help="put the table into docs/data/deploy.md")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if options.cell:
        from cadsurgery.support.errors import CadError

        try:
            row = export(tuple(json.loads(options.cell)))
        except CadError as error:
            row = {
                "result": "refused" if "differs" not in error.what else "differs",
                "why": f"{error.what} {error.why}",
            }
        print(json.dumps(row))
        return
    if options.report:
        text = DOCS.read_text(encoding="utf-8")
        pattern = re.compile(r"(<!-- exports -->\n).*?(<!-- end -->)", re.DOTALL)
        DOCS.write_text(
            pattern.sub(lambda match: f"{match[1]}{report()}\n{match[2]}", text), encoding="utf-8"
        )
        return
    from cadsurgery.support.provenance import commit

    there = known()
    selected = [
        cell
        for cell in cells()
        if all(text in cell or text in cell[0] for text in options.only)
        and there.get(cell, {}).get("result") != "agrees"
    ]
    for cell in selected[: options.cells]:
        row = run(cell) | {"commit": commit()}
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(_name(row), row["result"], row.get("difference", row.get("why")), row["seconds"], flush=True)


if __name__ == "__main__":
    main()
