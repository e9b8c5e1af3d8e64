"""CamVid accuracy of a MobileNetV2 + FCN network: dense, converted without training, and fine-tuned.

    python recipes/camvid_mobilenetv2/recipe.py DATA [--runs RUNS] [--only NAME ...] [--limit N] [--output results.json]

DATA is a folder with `camvid/` and `camvid_mobilenetv2_fcn/` (see the README beside this file), RUNS the output of
`train.py`. One confusion matrix over the test split, mean IoU of the 11 classes. Cost: MACs of the whole network,
including the mask's own, relative to the network as given, which is everything high; beside it that of the adaptive
region alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from network import CLASSES, THIN, Segmenter, build, images
from rich.console import Console
from stem import body_of, stem_outputs
from torch import Tensor

import cadsurgery as cs
from cadsurgery.masks import MaskProvider, labelled, resolve_mask
from cadsurgery.network.macs import dense_macs
from cadsurgery.support.timing import interleaved

EDGES, GRADED = "edges:threshold=0.35,dilation=11", "edges:threshold=0.95/0.1,dilation=5/15"
BUDGET = 0.13  # share of the patches, at output strides 8 and 16: .355 of the region
# Fields of the tables; the network as given is everything high.
SHARES = ("active_fraction", "macs_of_high", "region_of_high")
PUBLISHED: dict[str, Any] = {"fill": "nearest", "patch": "block"}
GUIDED: dict[str, Any] = {"fill": "guided"}
HEADS = {**GUIDED, "region": "heads"}
# Masks see -1..1 unchanged, as when the figures were measured: an edge of .35 is one of about .78 in the masks' unit.
RAW: dict[str, Any] = {"normalisation": "raw"}
UNIT: dict[str, Any] = {"normalisation": (0.5, 0.5)}


@dataclass(frozen=True)
class Group:
    """Masks evaluated together on one converted network, with everything high and everything low.

    Attributes:
        strides: high and low output stride.
        options: further options of `adaptify`.
        masks: masks by label.
        runs: name of a fine-tuning run, whose networks are used, one per seed; empty for the given weights.
    """

    strides: tuple[int, int]
    options: dict[str, Any]
    masks: dict[str, str] = field(default_factory=dict)
    runs: str = ""


def budgets(mask: str, *fractions: float) -> dict[str, str]:
    """Return a mask at several budgets, by label."""
    return {f"{mask}, budget {fraction:g}": f"{mask} | budget:fraction={fraction}" for fraction in fractions}


GROUPS = {
    "published": Group((8, 32), PUBLISHED, {"edges .35 (published)": EDGES}),
    "linear 8-32": Group((8, 32), {}, {"graded edges .95/.1": GRADED}),
    "linear 8-16": Group((8, 16), {}, {"edges .35": EDGES}),
    "raw 8-32": Group((8, 32), {}, {"edges .35, raw": EDGES, "graded edges .95/.1, raw": GRADED}),
    "unit 8-32": Group((8, 32), UNIT, {"edges .35, unit": EDGES, "graded edges .95/.1, unit": GRADED}),
    "guided 8-16": Group(
        (8, 16),
        GUIDED,
        {**budgets("detail", 0.05, 0.1, BUDGET), **budgets("edges", BUDGET), **budgets("trimap", BUDGET)},
    ),
    "guided 8-32": Group((8, 32), GUIDED, {"confidence": "confidence | budget:fraction=0.08/0.45"}),
    "heads 8-16": Group((8, 16), HEADS, budgets("detail", 0.05, 0.1, BUDGET)),
    "heads 8-32": Group((8, 32), HEADS, budgets("detail", 0.1)),
    "dense, fine-tuned": Group((8, 16), GUIDED, {}, "dense"),
    "detail, fine-tuned": Group((8, 16), GUIDED, budgets("detail", BUDGET), "detail"),
    "any-budget, with labels": Group((8, 16), GUIDED, budgets("detail", BUDGET, 0.25, 0.5), "any-budget"),
    "any-budget": Group((8, 16), GUIDED, budgets("detail", 0.05, 0.1, BUDGET, 0.25, 0.5), "distilled"),
    "learned": Group((8, 16), GUIDED, {"learned": ""}, "learned"),
    "learned mask alone": Group((8, 16), GUIDED, {"learned": ""}, "mask"),
}


def prepared(found: cs.SegmentationData, index: int) -> Tensor:
    """Normalise an image for the network, as a batch of one."""
    return found[index][0][None] * 2 - 1


def networks(group: Group, runs: Path | None) -> Iterator[tuple[str, Path | None]]:
    """Yield the names and files of a group's networks; None for the given weights."""
    if not group.runs:
        yield "given", None
    elif runs is not None:
        for folder in sorted(runs.glob(f"{group.runs}-[0-9]*")):
            if (folder / "net.safetensors").is_file():
                yield folder.name, folder / "net.safetensors"


def evaluate(
    data: Path, group: Group, file: Path | None, found: cs.SegmentationData, step: Any
) -> list[dict[str, Any]]:
    """Return the rows of a group for one network."""
    model: Any = build(data, file)
    masks: dict[str, Any] = dict(group.masks)
    if "learned" in masks:
        assert file is not None
        masks["learned"] = cs.load(file, build(data)).mask
        masks |= equal_cost(model, group, masks["learned"], found)
    report = cs.evaluate(
        *(model, found, list(masks.values()) or ["all"]),
        output_stride=[group.strides],
        options=RAW | group.options,
        rounds=0,
        batch=4,
        step=step,
    )
    labels = ["everything high", *masks, "everything low"]
    return [
        {"label": label, "thin": sum(row.iou[name] or 0.0 for name in THIN) / len(THIN), **row.to_dict()}
        for label, row in zip(labels, report.rows, strict=True)
    ]


def equal_cost(model: Segmenter, group: Group, learned: Any, found: cs.SegmentationData) -> dict[str, str]:
    """Return budgets of other masks with the cost of the learned mask, including its own, on some of the images."""
    options = {**RAW, **group.options, "verify_laws": False}
    net = cs.adaptify(model, learned, output_stride=group.strides, **options)
    inside = {decision.node for decision in net.plan.chosen("adapt", "keep")}
    cost = low = high = 0
    for index in range(0, len(found), max(1, len(found) // 16)):
        report = net.macs(prepared(found, index))
        layers = [layer for layer in report.layers if layer.layer in inside]
        cost += report.of_mask + sum(layer.mask for layer in layers)
        high += sum(layer.high for layer in layers)
        low += sum(layer.low for layer in layers)
    fraction = round((cost - low) / (high - low), 4)
    return {f"{name}, same cost": f"{name} | budget:fraction={fraction}" for name in ("edges", "detail")}


def dense(data: Path, found: cs.SegmentationData, stride: int) -> dict[str, Any]:
    """Return the accuracy of the dense network built at an output stride, with the given weights."""
    model, metrics = Segmenter(stride), cs.SegmentationMetrics(len(CLASSES))
    model.load_state_dict(build(data).state_dict())
    model.eval()
    with torch.inference_mode():
        for index in range(len(found)):
            metrics.update(model(prepared(found, index)).argmax(1), found[index][1][None])
    figures = metrics.compute()
    thin = sum(figures["iou"][CLASSES.index(name)] or 0.0 for name in THIN) / len(THIN)
    macs, given = (dense_macs(net, prepared(found, 0)) for net in (model, Segmenter().eval()))
    work = {"macs": macs, "macs_of_high": macs / given}
    return {"label": f"dense network, output stride {stride}", "thin": thin, **work, **figures}


def region_times(data: Path, found: cs.SegmentationData, runs: Path | None, rounds: int) -> dict[str, Any]:
    """Time everything after the stem, including the mask, for all settings in turn, on four images one by one."""
    places = range(0, len(found), -(-len(found) // 4))
    sides: dict[str, Callable[[], Any]] = {}

    def side(
        body: cs.AdaptiveModel, inputs: list[tuple[Tensor, ...]], mask: MaskProvider
    ) -> Callable[[], Any]:
        def run() -> None:
            for place, values in zip(places, inputs, strict=True):
                with labelled(found[place][1][None]):
                    body(*values, mask=mask)

        return run

    for name, group in GROUPS.items():
        for network, file in list(networks(group, runs))[
            : 1 if "learned" in group.masks else 0 if group.runs else 1
        ]:
            options = RAW | group.options
            net = cs.adaptify(build(data, file), "all", output_stride=group.strides, **options)
            body, inputs = body_of(net).optimize(), [stem_outputs(net, prepared(found, p)) for p in places]
            masks: dict[str, Any] = {"everything high": "all", **group.masks, "everything low": "none"}
            if file is not None:
                masks["learned"] = cs.load(file, build(data)).mask
            for label, mask in masks.items():
                sides[f"{name}, {network}: {label}"] = side(body, inputs, resolve_mask(mask))
    # MACs that every setting has after the region, dense: the head and the resizing.
    fixed, (_, _, height, width) = build(data), inputs[0][0].shape
    left = torch.randn(1, 320, -(-height // 8), -(-width // 8)).contiguous(memory_format=torch.channels_last)
    sides["after the region"] = lambda: [
        F.interpolate(fixed.head(left), size=(height, width), mode="bilinear") for _ in places
    ]
    return {name: vars(time) for name, time in interleaved(sides, rounds).items()}


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows in Markdown, shares in per cent."""
    lines = [
        "| network | setting | mIoU | thin classes | boundary IoU | trimap IoU | active | cost | in the region |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [f"{100 * row[name]:.2f}" for name in ("miou", "thin", "boundary_iou", "trimap_iou")]
        shares = [f"{row[name]:.3f}" if name in row else "" for name in SHARES]
        strides = "{}-{}".format(*row["output_stride"]) if "output_stride" in row else ""
        lines.append(f"| {row['network']} {strides} | {row['label']} | {' | '.join((*figures, *shares))} |")
    return "\n".join(lines)


def spread(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Format, for each fine-tuned setting over its seeds, the mean, minimum and maximum mIoU and the mean cost, in
    Markdown."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for group in rows.values():
        for row in group:
            name, dash, seed = row["network"].rpartition("-")
            if dash and seed.isdigit():
                label = (
                    "same cost, " + row["label"].partition(",")[0] if "same" in row["label"] else row["label"]
                )
                found.setdefault((name, label), []).append(row)
    lines = [
        "| run | setting | seeds | mIoU | least, largest | active | cost | in the region |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, label), same in found.items():
        miou = [100 * row["miou"] for row in same]
        shares = " | ".join(f"{sum(row[key] for row in same) / len(same):.3f}" for key in SHARES)
        ends = f"{min(miou):.2f}, {max(miou):.2f}"
        lines.append(f"| {name} | {label} | {len(same)} | {sum(miou) / len(miou):.2f} | {ends} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Print the tables and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--runs", type=Path, help="folder of fine-tuned networks")
    parser.add_argument(
        "--only", nargs="*", choices=["dense", "times", *GROUPS], default=["dense", "times", *GROUPS]
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--limit", type=int, help="number of images; default all")
    parser.add_argument("--rounds", type=int, default=7, help="timing rounds")
    parser.add_argument("--output", type=Path, help="JSON file; existing results are kept")
    options = parser.parse_args()
    if not (options.data / "camvid").is_dir():
        print(f"skipped: {options.data} holds no camvid folder")
        sys.exit(0)
    console, found = Console(stderr=True), images(options.data, options.split).first(options.limit)
    kept = json.loads(options.output.read_text()) if options.output and options.output.is_file() else {}
    rows: dict[str, list[dict[str, Any]]] = kept.get("rows", {})
    times = kept.get("region_milliseconds", {})
    with console.status("") as status:
        if "dense" in options.only:
            rows["dense"] = [
                {"network": "given", **dense(options.data, found, stride)} for stride in (8, 16, 32)
            ]
        for name in (name for name in GROUPS if name in options.only):
            for network, file in networks(GROUPS[name], options.runs):
                status.update(f"{name}: {network}")
                told = evaluate(
                    options.data,
                    GROUPS[name],
                    file,
                    found,
                    lambda text, *_, n=name: status.update(f"{n}: {text}"),
                )
                rows[f"{name} {network}"] = [{"network": network, **row} for row in told]
                write(options.output, rows, times, found)
        if "times" in options.only:
            times = region_times(options.data, found, options.runs, options.rounds)
    print(table([row for name in rows for row in rows[name]]), spread(rows), sep="\n\n")
    for name, time in times.items():
        print(f"region, {name}: {time['best']:.0f} ms best, {time['median']:.0f} ms median of four images")
    write(options.output, rows, times, found)


def write(
    output: Path | None, rows: dict[str, Any], times: dict[str, Any], found: cs.SegmentationData
) -> None:
    """Write all figures as JSON."""
    if output is not None:
        document = {"data": found.name, "images": len(found), "torch": torch.__version__}
        document |= {"threads": torch.get_num_threads(), "rows": rows, "region_milliseconds": times}
        output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
