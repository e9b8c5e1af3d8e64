"""Published cost of sampled inputs, and CamVid: accuracy of five sizes, sampled uniformly and where it matters.

    python recipes/resampling_mobilenetv2/recipe.py
    python recipes/resampling_mobilenetv2/recipe.py DATA RUNS [--every N] [--sizes 96 ...] [--output results.json]

Without DATA the multiply-accumulates of Tab. 3.7 alone. DATA is a folder with `camvid/` and `camvid_mobilenetv2_fcn/`,
RUNS what `train.py` wrote; networks that it has not are left out. One confusion matrix over the test split; `targets`
is the mean IoU of pole, sign, pedestrian, bicyclist and car. What the file holds already is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from cadsurgery.resampling import conv_macs

import cadsurgery as cs
from cadsurgery.masks import labelled
from cadsurgery.methods.resampling.shifts import ShiftNet
from cadsurgery.support.provenance import commit
from cadsurgery.support.timing import interleaved
from recipes.camvid_mobilenetv2.network import CLASSES, build, images
from recipes.resampling_mobilenetv2.train import SAMPLERS, SIZES, TARGETS, resampled

PUBLISHED_SIZES = (128, 160, 192, 224)
GIVEN, WHOLE = "given", "whole image"


def published_macs() -> dict[str, dict[str, int]]:
    """Multiply-accumulates of the published networks by both rules: at output stride 16 of 19 classes, as they were
    counted, and of the sampler."""
    network, sampler = ShiftNet(3, 19, 1.0, 16), ShiftNet()
    shaped = {f"network, {size}": (network, size) for size in PUBLISHED_SIZES} | {"sampler": (sampler, 64)}
    return {
        name: {
            rule: conv_macs(net, torch.empty(1, 3, size, size, device="meta"), rule=rule)
            for rule in ("published", "conv")
        }
        for name, (net, size) in shaped.items()
    }


def table_of_macs() -> str:
    """In Markdown."""
    lines = ["| | as published | carried out |", "|---|---|---|"]
    return "\n".join(
        lines
        + [f"| {name} | {row['published']:,} | {row['conv']:,} |" for name, row in published_macs().items()]
    )


def networks(data: Path, runs: Path, size: int) -> Iterator[tuple[str, str, cs.ResampledModel]]:
    """Which network, by which sampler, of a size. Edges and labels are also tried on the network that was trained with
    the learned sampler, unless one was trained with them."""
    for sampler in SAMPLERS:
        if sampler != "learned" or (runs / "locations").is_dir():
            yield GIVEN, sampler, resampled(data, runs, sampler, size)
        trained = runs / f"{sampler}-{size}" / "net.safetensors"
        likely = trained if trained.is_file() else runs / f"learned-{size}" / "net.safetensors"
        if likely.is_file() and (sampler != "uniform" or trained.is_file()):
            known: Any = cs.load(likely, build(data))
            net = resampled(data, runs, sampler, size)
            net.network.load_state_dict(known.network.state_dict())
            yield likely.parent.name, sampler, net


Predict = Callable[[Tensor], Tensor]


def evaluate(predict: Predict, found: cs.SegmentationData) -> dict[str, Any]:
    """Accuracy over a split."""
    metrics = cs.SegmentationMetrics(len(CLASSES))
    with torch.inference_mode():
        for place in range(len(found)):
            image, labels = found[place]
            with labelled(labels[None]):
                metrics.update(predict(image[None] * 2 - 1).argmax(1), labels[None])
    figures = metrics.compute()
    iou = dict(zip(CLASSES, figures["iou"], strict=True))
    return {
        "miou": figures["miou"],
        "targets": sum(iou[name] or 0 for name in TARGETS) / len(TARGETS),
        "iou": iou,
    }


def measure(data: Path, runs: Path, found: cs.SegmentationData, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time of inference copies on the first image, all in turn, the best round."""
    image, labels = found[0]
    nets = {
        f"{size} {sampler}": resampled(data, runs, sampler, size)
        for size in SIZES
        for sampler in SAMPLERS[:3]
    }
    fast = {name: net.optimize() for name, net in nets.items()}
    fast[WHOLE] = fast[f"{SIZES[0]} uniform"].network
    batch = image[None] * 2 - 1
    sides = {name: (lambda net=net: net(batch)) for name, net in fast.items()}
    with labelled(labels[None]):
        return {
            name: timing.best for name, timing in interleaved(sides, rounds, clock=time.process_time).items()
        }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown, shares in per cent."""
    lines = [
        "| size | network | sampled by | mIoU | targets | MACs | of whole |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = next((row["macs"] for row in rows if row["sampler"] == WHOLE), None)
    for row in rows:
        share = f"{row['macs'] / whole:.3f}" if whole else ""
        lines.append(
            f"| {row['size'] or ''} | {row['network']} | {row['sampler']} | {100 * row['miou']:.2f} | "
            f"{100 * row['targets']:.2f} | {row['macs']:.3e} | {share} |"
        )
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], milliseconds: dict[str, float], path: Path) -> None:
    """Mean IoU of the targets, and of all classes, against MACs; of the targets against time."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    kinds = list(dict.fromkeys((row["network"] == GIVEN, row["sampler"]) for row in rows if row["size"]))
    for is_given, sampler in kinds:
        own = [row for row in rows if row["sampler"] == sampler and (row["network"] == GIVEN) == is_given]
        label = f"{sampler}, {'given' if is_given else 'fine-tuned'}"
        style = {
            "ls": ":" if is_given else "-",
            "marker": "o",
            "ms": 3,
            "color": f"C{SAMPLERS.index(sampler)}",
        }
        for axes, name in zip(panels, ("targets", "miou"), strict=False):
            axes.plot([row["macs"] for row in own], [100 * row[name] for row in own], label=label, **style)
        timed = [(milliseconds.get(f"{row['size']} {sampler}"), 100 * row["targets"]) for row in own]
        if all(one[0] is not None for one in timed):
            panels[2].plot(*zip(*timed, strict=True), **style)
    for axes, x, y in zip(
        panels, ("MACs", "MACs", "ms of processor time"), ("targets", "all classes", "targets"), strict=True
    ):
        axes.set_xlabel(f"{x} of one image")
        axes.set_ylabel(f"mean IoU, %, {y}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables, write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, choices=SIZES)
    parser.add_argument("--networks", choices=["given", "trained", "all"], default="all")
    parser.add_argument("--every", type=int, default=1, help="take every N-th image of the test split")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--picture", type=Path, help="PNG of the curves")
    options = parser.parse_args()
    print(table_of_macs())
    if options.data is None or not (options.data / "camvid").is_dir():
        print(f"skipped: {options.data} holds no camvid folder")
        sys.exit(0)
    torch.set_num_threads(options.threads)
    found = images(options.data, "test")
    if options.every > 1:
        read, step, names = found.read, options.every, found.names[:: options.every]
        found = dataclasses.replace(found, names=names, read=lambda place: read(place * step))
    kept = json.loads(options.output.read_text()) if options.output and options.output.is_file() else {}
    rows: dict[str, dict[str, Any]] = kept.get("rows", {})
    times: dict[str, float] = kept.get("milliseconds", {})

    def note(key: str, predict: Predict, **told: Any) -> None:
        if key not in rows:
            rows[key] = {**told, **evaluate(predict, found)}
            print(f"{key}: mIoU {rows[key]['miou']:.4f}, targets {rows[key]['targets']:.4f}", flush=True)
            write()

    def write() -> None:
        if options.output is not None:
            document = {
                "data": found.name,
                "images": len(found),
                "torch": torch.__version__,
                "commit": commit(),
            }
            document |= {"threads": torch.get_num_threads(), "macs": published_macs(), "rows": rows}
            options.output.write_text(json.dumps(document | {"milliseconds": times}, indent=1) + "\n")

    first = found[0][0][None]
    for size in options.sizes:
        for network, sampler, net in networks(options.data, options.runs, size):
            if options.networks in ("all", "given" if network == GIVEN else "trained"):
                with labelled(found[0][1][None]):
                    work = net.macs(first * 2 - 1).total
                key = f"{size} {network} {sampler}"
                note(key, net.optimize(), size=size, network=network, sampler=sampler, macs=work)
    if options.networks != "trained":
        whole = resampled(options.data, options.runs, "uniform", SIZES[0])
        work = whole.macs(first).original
        note(WHOLE, whole.optimize().network, size=None, network=GIVEN, sampler=WHOLE, macs=work)
    if options.rounds and options.networks == "all":
        times = measure(options.data, options.runs, found, options.rounds)
        write()
    ordered = sorted(rows.values(), key=lambda row: (row["size"] or 10**9, row["network"], row["sampler"]))
    print(table(ordered))
    for name, value in times.items():
        print(f"{name}: {value:.0f} ms of processor time, best round")
    if options.picture is not None:
        draw(ordered, times, options.picture)


if __name__ == "__main__":
    main()
