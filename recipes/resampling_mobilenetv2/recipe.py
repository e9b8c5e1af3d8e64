"""Published cost of sampled inputs, and CamVid: accuracy at five sizes, sampled uniformly or more densely at targets.

    python recipes/resampling_mobilenetv2/recipe.py
    python recipes/resampling_mobilenetv2/recipe.py DATA RUNS [--every N] [--sizes 96 ...] [--output results.json]

Without DATA, only the multiply-accumulates of Tab. 3.7 are printed. DATA is a folder with `camvid/` and
`camvid_mobilenetv2_fcn/`, RUNS the output of `train.py`; missing networks are left out. One confusion matrix over a
split; `targets` is the mean IoU of pole, sign, pedestrian, bicyclist and car. One of the networks returns the sampled
labels themselves, which shows the loss by sampling alone. Existing results in the file are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cadsurgery.resampling import conv_macs, interpolate_back, sample

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.following.equivalence import meta_copy
from cadsurgery.masks import labelled
from cadsurgery.masks.context import call_context
from cadsurgery.methods.resampling.shifts import ShiftNet
from cadsurgery.support.provenance import commit
from cadsurgery.support.timing import interleaved
from recipes.camvid_mobilenetv2.network import CLASSES, build, images
from recipes.resampling_mobilenetv2.train import MEAN, SAMPLERS, SIZES, TARGETS, resampled

PUBLISHED_SIZES = (128, 160, 192, 224)
GIVEN, TRAINED, KNOWING, WHOLE = "given", "trained", "knowing", "whole image"
KINDS = (KNOWING, TRAINED, GIVEN)
COLUMNS = ("uniform", MEAN, "learned", "edges", "labels")


def published_macs() -> dict[str, dict[str, int]]:
    """Return the multiply-accumulates of the published networks and of the sampler, by both rules.

    The networks have output stride 16 and 19 classes, as in the published counts.
    """
    network, sampler = ShiftNet(3, 19, 1.0, 16), ShiftNet()
    shaped = {f"network, {size}": (network, size) for size in PUBLISHED_SIZES} | {"sampler": (sampler, 64)}
    return {
        name: {
            rule: count(net, torch.empty(1, 3, size, size, device="meta"))
            for rule, count in (("published", macs_as_published), ("conv", conv_macs))
        }
        for name, (net, size) in shaped.items()
    }


def macs_as_published(net: nn.Module, image: Tensor) -> int:
    """Count the convolutions as the notebook beside the published code does: depthwise ones of dilation r at every r-th
    row and column only, which is a mistake of it."""
    too_many, net = 0, meta_copy(net)

    def subtract(module: nn.Conv2d, _: Any, output: Tensor) -> None:
        nonlocal too_many
        down, across = module.dilation
        if module.groups == module.in_channels > 1:
            missed = output[:, 0].numel() - output[:, 0, ::down, ::across].numel()
            too_many += missed * module.weight.numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(subtract)
    return conv_macs(net, image) - too_many


def table_of_macs() -> str:
    """Format the multiply-accumulates in Markdown."""
    lines = ["| | as published | carried out |", "|---|---|---|"]
    return "\n".join(
        lines
        + [f"| {name} | {row['published']:,} | {row['conv']:,} |" for name, row in published_macs().items()]
    )


class Knowing(nn.Module):
    """A network that returns the call's labels, sampled like the image, as scores."""

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, classes, h, w): one for the labelled class, zero for others and where labels are ignored."""
        labels = call_context().labels
        assert labels is not None
        is_class = labels.unsqueeze(1) == torch.arange(len(CLASSES)).view(-1, 1, 1)
        return is_class.to(image.dtype)


def networks(data: Path, runs: Path, size: int, kind: str) -> Iterator[tuple[str, str, cs.ResampledModel]]:
    """Yield the networks of a size with their sampler.

    Edges and labels are used as samplers for the network trained with the learned sampler, and for networks trained
    with these samplers.
    """
    if kind == KNOWING:
        for sampler in COLUMNS:
            yield KNOWING, sampler, resampled(data, runs, sampler, size, Knowing().eval())
    elif kind == GIVEN:
        for sampler in SAMPLERS:
            yield GIVEN, sampler, resampled(data, runs, sampler, size)
    else:
        for sampler in SAMPLERS:
            for trained in dict.fromkeys((f"{sampler}-{size}", f"learned-{size}")):
                path = runs / trained / "net.safetensors"
                if path.is_file() and (sampler != "uniform" or trained == f"uniform-{size}"):
                    known: Any = cs.load(path, build(data))
                    net = resampled(data, runs, sampler, size)
                    net.network.load_state_dict(known.network.state_dict())
                    yield trained, sampler, net


Predict = Callable[[Tensor], Tensor]


def evaluate(predict: Predict, found: cs.SegmentationData) -> dict[str, Any]:
    """Return the accuracy over a split, and over each of the films from which its images are."""
    films = ["_".join(Path(name).name.split("_")[:-1]) for name in found.names]
    metrics = {film: cs.SegmentationMetrics(len(CLASSES)) for film in ("", *films)}  # "": all films
    with torch.inference_mode():
        for place, film in enumerate(films):
            image, labels = found[place]
            with labelled(labels[None]):
                metrics[film].update(predict(image[None] * 2 - 1).argmax(1), labels[None])
    for film in dict.fromkeys(films):
        metrics[""].merge(metrics[film])
    of_targets, iou = {}, {}
    for film, own in metrics.items():
        figures = own.compute()
        iou[film] = dict(zip(CLASSES, figures["iou"], strict=True))
        of_targets[film] = sum(iou[film][name] or 0 for name in TARGETS) / len(TARGETS)
    miou, whole = metrics[""].compute()["miou"], of_targets.pop("")
    return {"miou": miou, "targets": whole, "iou": iou[""], "targets_of_films": of_targets}


def locations_missed(data: Path, runs: Path, found: cs.SegmentationData) -> dict[str, float]:
    """Return the mean squared distance of the samplers' locations from those of the labels."""
    nets = {
        sampler: resampled(data, runs, sampler, SIZES[0]).eval()
        for sampler in ("labels", "uniform", MEAN, "learned")
    }
    missed = dict.fromkeys(nets, 0.0)
    with torch.inference_mode():
        for place in range(len(found)):
            image, labels = found[place]
            with labelled(labels[None]):
                places = {name: net.sampler(image[None] * 2 - 1).double() for name, net in nets.items()}
            for name, own in places.items():
                missed[name] += float((own - places["labels"]).square().mean()) / len(found)
    return missed


def measure(data: Path, runs: Path, found: cs.SegmentationData, rounds: int) -> dict[str, float]:
    """Measure processor time in milliseconds of inference copies on the first image, all in turn, best round.

    Also of the parts of the network with the learned sampler.
    """
    image, labels = found[0]
    batch, sides = image[None] * 2 - 1, {}
    for size in SIZES:
        for sampler in SAMPLERS[:3]:
            sides[f"{size} {sampler}"] = partial(resampled(data, runs, sampler, size).optimize(), batch)
        net = resampled(data, runs, "learned", size).optimize()
        with torch.inference_mode():
            locations = net.sampler(batch)
            scores = net.call_network(batch, locations)
        seen = sample(batch, locations, size)
        sides[f"{size}: sampler"] = partial(net.sampler, batch)
        sides[f"{size}: sampling"] = partial(sample, batch, locations, size)
        sides[f"{size}: network"] = partial(net.network, seen)
        sides[f"{size}: back"] = partial(interpolate_back, scores, locations, image.shape[1:])
    sides[WHOLE] = partial(resampled(data, runs, "uniform", SIZES[0]).optimize().network, batch)
    with labelled(labels[None]):
        times = interleaved(sides, rounds, clock=time.process_time)
    return {name: timing.best for name, timing in times.items()}


def table_of_times(times: dict[str, float]) -> str:
    """Format times in Markdown, in milliseconds."""
    parts = ("uniform", "learned", "edges"), ("sampler", "sampling", "network", "back")
    lines = [f"| size | {' | '.join((*parts[0], *parts[1]))} |", "|---" * 8 + "|"]
    for size in SIZES:
        own = [times[f"{size} {name}"] for name in parts[0]] + [times[f"{size}: {name}"] for name in parts[1]]
        lines.append(f"| {size} | {' | '.join(f'{value:.1f}' for value in own)} |")
    return "\n".join([*lines, f"\n{WHOLE}: {times[WHOLE]:.1f} ms"])


def tables(rows: list[dict[str, Any]]) -> str:
    """Format in Markdown, for each kind of network, the mean IoU of the targets and of all classes in per cent."""
    parts = []
    for kind in KINDS:
        own = [row for row in rows if kind == _kind(row)]
        cells = {(row["size"], _column(row)): row for row in own}
        columns = list(dict.fromkeys(column for _, column in cells))
        lines = [
            f"{kind}: targets / all classes\n",
            f"| size | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for size in sorted({row["size"] for row in own}):
            found = [cells.get((size, column)) for column in columns]
            texts = [f"{100 * row['targets']:.2f} / {100 * row['miou']:.2f}" if row else "" for row in found]
            lines.append(f"| {size} | {' | '.join(texts)} |")
        parts += ["\n".join(lines)] if own else []
    return "\n\n".join(parts)


def _kind(row: dict[str, Any]) -> str:
    return row["network"] if row["network"] in (KNOWING, GIVEN) else TRAINED


def _column(row: dict[str, Any]) -> str:
    trained = row["network"].removesuffix(f"-{row['size']}")
    return (
        row["sampler"]
        if _kind(row) != TRAINED or trained == row["sampler"]
        else f"{row['sampler']}, trained {trained}"
    )


def table_of_films(rows: list[dict[str, Any]]) -> str:
    """Format in Markdown the targets' accuracy on each film, for networks with the samplers of their training."""
    own = [row for row in rows if _kind(row) == TRAINED and _column(row) == row["sampler"]]
    films = list(own[0]["targets_of_films"]) if own else []
    lines = [f"| size | sampled by | {' | '.join(films)} |", "|---" * (len(films) + 2) + "|"]
    for row in own:
        texts = (f"{100 * value:.2f}" for value in row["targets_of_films"].values())
        lines.append(f"| {row['size']} | {row['sampler']} | {' | '.join(texts)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], milliseconds: dict[str, float], path: Path) -> None:
    """Draw mean IoU of the targets and of all classes against MACs, and of the targets against time."""
    from matplotlib.figure import Figure

    figure = Figure((12, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    rows = [row for row in rows if _kind(row) != KNOWING]
    for kind, column in dict.fromkeys((_kind(row), _column(row)) for row in rows):
        own = [row for row in rows if (_kind(row), _column(row)) == (kind, column)]
        sampler = own[0]["sampler"]
        label = f"{column}, given" if kind == GIVEN else column
        dashes = ":" if kind == GIVEN else "-" if column == sampler else "--"
        style: dict[str, Any] = {"ls": dashes, "marker": "o", "ms": 3, "color": f"C{SAMPLERS.index(sampler)}"}
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


def draw_grids(data: Path, runs: Path, found: cs.SegmentationData, path: Path) -> None:
    """Draw three images of a split with the locations of the learned sampler and of the labels."""
    from matplotlib.figure import Figure

    nets = {name: resampled(data, runs, name, SIZES[0]).eval() for name in ("learned", "labels")}
    figure = Figure((12, 6.2), layout="constrained")
    for column, place in enumerate(range(0, len(found), -(-len(found) // 3))):
        image, labels = found[place]
        for row, (name, net) in enumerate(nets.items()):
            axes = figure.add_subplot(2, 3, 3 * row + column + 1)
            with torch.inference_mode(), labelled(labels[None]):
                grid = net.sampler(image[None] * 2 - 1)[0] * torch.tensor([side - 1 for side in labels.shape])
            axes.imshow(image.permute(1, 2, 0))
            axes.plot(grid[..., 1], grid[..., 0], "w-", grid[..., 1].T, grid[..., 0].T, "w-", lw=0.8)
            axes.set_title(name, fontsize=9)
            axes.axis("off")
    figure.savefig(path, dpi=90)


def main() -> None:
    """Print the tables and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, choices=SIZES)
    parser.add_argument("--networks", nargs="*", choices=KINDS, default=KINDS, help="empty: times alone")
    parser.add_argument("--samplers", nargs="*", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--split", choices=["test", "val"], default="test")
    parser.add_argument("--every", type=int, default=1, help="take every N-th image of the split")
    parser.add_argument("--rounds", type=int, default=5, help="timing rounds; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--picture", type=Path, help="PNG of the curves")
    parser.add_argument("--grids", type=Path, help="PNG of grids on images")
    options = parser.parse_args()
    print(table_of_macs())
    if options.data is None or not (options.data / "camvid").is_dir():
        print(f"skipped: {options.data} holds no camvid folder")
        sys.exit(0)
    torch.set_num_threads(options.threads)
    found = images(options.data, options.split)
    if options.every > 1:
        read, step, names = found.read, options.every, found.names[:: options.every]
        found = dataclasses.replace(found, names=names, read=lambda place: read(place * step))
    kept = json.loads(options.output.read_text()) if options.output and options.output.is_file() else {}
    rows: dict[str, dict[str, Any]] = kept.get("rows", {})
    times: dict[str, float] = kept.get("milliseconds", {})
    missed: dict[str, float] = kept.get("locations_missed", {})

    def note(key: str, predict: Predict, **details: Any) -> None:
        if key not in rows:
            rows[key] = {**details, **evaluate(predict, found)}
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
            document |= {"locations_missed": missed, "milliseconds": times}
            options.output.write_text(json.dumps(document, indent=1) + "\n")

    first = found[0][0][None]
    if KNOWING in options.networks and not missed:
        missed = locations_missed(options.data, options.runs, found)
    for size, kind in itertools.product(options.sizes, options.networks):
        for network, sampler, net in networks(options.data, options.runs, size, kind):
            if sampler not in options.samplers:
                continue
            with labelled(found[0][1][None]):
                work = net.macs(first * 2 - 1).total
            predict = net if kind == KNOWING else net.optimize()
            note(
                f"{size} {network} {sampler}", predict, size=size, network=network, sampler=sampler, macs=work
            )
    if GIVEN in options.networks:
        whole = resampled(options.data, options.runs, "uniform", SIZES[0])
        work = whole.macs(first).original
        note(WHOLE, whole.optimize().network, size=None, network=GIVEN, sampler=WHOLE, macs=work)
    if options.rounds:
        times = measure(options.data, options.runs, found, options.rounds)
    write()
    ordered = sorted(
        (row for row in rows.values() if row["sampler"] != WHOLE),
        key=lambda row: (row["size"], COLUMNS.index(row["sampler"]), row["network"]),
    )
    print(tables(ordered))
    print(table_of_films(ordered))
    for name, value in missed.items():
        print(f"locations of {name}: mean squared distance from those of the labels {value:.5f}")
    if times:
        print(table_of_times(times))
    if options.picture is not None:
        draw(ordered, times, options.picture)
    if options.grids is not None:
        draw_grids(options.data, options.runs, found, options.grids)


if __name__ == "__main__":
    main()
