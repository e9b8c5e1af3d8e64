"""Draw the pictures of the README and the site from committed results, each for light and for dark pages.

    python -m benchmarks.pictures                        # all but the hero and the masks
    python -m benchmarks.pictures --only word            # those whose names begin with "word": the glossary's
    python -m benchmarks.pictures --hero DATA PHOTO      # measures, and writes docs/pictures/hero.json, too
    python -m benchmarks.pictures --masks PHOTO          # counts, and writes docs/pictures/masks.json, too
    python -m benchmarks.pictures --empty DETECTOR.onnx page.png cell.png

`word-*` are pictures of the glossary that the package computes (benchmarks/glossary_pictures.py). `concept` shows
cells and taps.
`quality` is drawn from docs/quality.json, `speed` from docs/data/speed.md, and `zoo` from the rows of the zoo.
`masks-*` show each mask on a photo (benchmarks/mask_pictures.py). The hero shows a trained network
(recipes/voc_deeplab) on one. The photo of both is NASA's portrait of Eileen Collins (public domain), as in the wheel of
scikit-image (`skimage/data/astronaut.png`). The pictures of `masks-empty` are from there, too: `page.png` is under
scikit-image's licence (BSD-3-Clause), `cell.png` is CC0. The detector is that of benchmarks/empty_pages.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

import cadsurgery as cs
from benchmarks.glossary_pictures import GREY, PHOTOS, WORDS, draw_cells
from benchmarks.mask_pictures import empty, masks
from cadsurgery.data.images import normalise, read_image
from cadsurgery.data.networks import source_of
from cadsurgery.elements.lattice import Geometry, Lattice
from cadsurgery.network.dense_twin import dense_twin
from cadsurgery.support.files import write_whole
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved
from cadsurgery.tasks.figures import draw_lattice
from cadsurgery.tasks.report import COLOURS
from cadsurgery.tasks.zoo_record import RECORDED, read_rows
from recipes.voc_deeplab import network as voc

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = DOCS / "pictures"
THEMES = {"": ("white", "#1a1a1a"), "-dark": ("#131416", "#e6e6e6")}  # background and ink
WIDTH = 9.0  # inches; a page shows it at 800 pixels
MASK = "detail | budget:fraction=0.1"


def draw(name: str, picture: Callable[[], Figure], kind: str = "png") -> None:
    """Draw a picture in each theme and write it to docs/pictures."""
    PICTURES.mkdir(exist_ok=True)
    for suffix, (background, ink) in THEMES.items():
        look = {
            key: ink
            for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        }
        places = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
        with matplotlib.rc_context({**look, **dict.fromkeys(places, background), "font.size": 10}):
            figure = picture()
            figure.draw_without_rendering()  # the layout measures titles only once the pictures are placed
            with write_whole(PICTURES / f"{name}{suffix}.{kind}") as temporary:
                figure.savefig(temporary, format=kind, dpi=130)


# -- quality against time ------------------------------------------------------------------------------

KINDS = {
    "given": ("as given", "s", GREY),
    "dense": ("dense, coarser output stride", "D", COLOURS[1]),
    "size": ("smaller or larger pictures", "v", COLOURS[2]),
    "adaptive": ("converted", "o", COLOURS[0]),
}
TITLES = {
    "camvid-8": "CamVid, MobileNetV2 + FCN",
    "voc-8": "VOC, MobileNetV2 DeepLabv3",
    "espnet-8": "CamVid, ESPNet",
    "voc-16": "VOC, DeepLabv3 at stride 16",
}


def quality(side: str = "avx512vnni, float32") -> Figure:
    """Draw the change of mIoU against the time of the whole network, with the settings that one would use instead."""
    networks = {
        name: runs[side]
        for name, runs in json.loads((DOCS / "quality.json").read_text()).items()
        if side in runs
    }
    lines = -(-len(networks) // 2)
    figure = Figure(figsize=(WIDTH, 0.6 + 3.2 * lines), layout="constrained")
    panels = figure.subplots(lines, 2, squeeze=False).flatten()
    for unused in panels[len(networks) :]:
        unused.set_visible(False)
    for axis, (name, run) in zip(panels, networks.items(), strict=False):
        given = run["rows"][0]
        rows = [row for row in run["rows"] if row["milliseconds"] < 1.25 * given["milliseconds"]]
        front = sorted((row for row in rows if row["front"]), key=lambda row: row["milliseconds"])
        axis.plot(*_times_and_changes(front, given), color=GREY, linewidth=1, zorder=0)
        for kind, (label, marker, colour) in KINDS.items():
            some = [row for row in rows if row["kind"] == kind]
            axis.errorbar(
                *_times_and_changes(some, given),
                [100 * (row["error"] or 0) for row in some],
                fmt=marker, color=colour, elinewidth=0.8, markersize=5, label=label, linestyle="none",
            )  # fmt: skip
        axis.set_title(f"{TITLES.get(name, name)}, {run['images']} pictures", fontsize=10)
        axis.set_xlim(left=0)
        axis.spines[["top", "right"]].set_visible(False)
    for row, axis in enumerate(panels[::2]):
        axis.set_ylabel("change of mIoU, points\n(± standard error)")
        for below in panels[-2:] if row == lines - 1 else ():
            below.set_xlabel("time, relative to the network as given")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
    return figure


def _times_and_changes(
    rows: Sequence[Mapping[str, Any]], given: Mapping[str, Any]
) -> tuple[list[float], list[float]]:
    times = [row["milliseconds"] / given["milliseconds"] for row in rows]
    return times, [100 * row["change"] for row in rows]


# -- speed ---------------------------------------------------------------------------------------------

SETS = {"AVX2": COLOURS[1], "AVX-512": COLOURS[0]}
_DENSE = re.compile(r"\| \*\*([\w:]+)[^|]*\| dense high (\d+) ms")


def speeds() -> dict[str, dict[str, tuple[float, float]]]:
    """Return, by network and instruction set, work and time relative to fine maps everywhere, at a third of the image
    fine and linear filling: from the float32 tables of docs/data/speed.md."""
    found: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    text = (DOCS / "data" / "speed.md").read_text()
    for heading in ("AVX2", "AVX-512"):
        part = text.split(f"\n### {heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
        name, whole, columns = "", 0.0, dict[str, int]()
        for line in part.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if cells[0] == "network":
                columns = {cell.split(" (")[0]: place for place, cell in enumerate(cells)}
            elif dense := _DENSE.match(line):
                name, whole = dense[1].removeprefix("networks:"), float(dense[2])
            elif cells[0] == "" and len(cells) > 4 and cells[1:3] == ["linear", "0.34"]:
                time = float(cells[columns["ms"]].split()[0])
                found[name][heading] = float(cells[columns["MACs of high"]]), time / whole
    return found


def speed() -> Figure:
    """Draw, for each network and instruction set, work and time relative to fine maps everywhere."""
    found = speeds()
    figure = Figure(figsize=(WIDTH, 0.42 * len(found) + 1.6), layout="constrained")
    axis = figure.subplots()
    names = sorted(found, key=lambda name: min(time for _, time in found[name].values()), reverse=True)
    for place, name in enumerate(names):
        works = [work for work, _ in found[name].values()]
        axis.plot([works[0]] * 2, [place - 0.32, place + 0.32], color=GREY, linewidth=3)
        for shift, (heading, (_, time)) in zip((-0.14, 0.14), found[name].items(), strict=False):
            axis.plot(time, place + shift, "o", color=SETS[heading], markersize=8)
            axis.annotate(
                f"{time:.2f}", (time, place + shift), (8, -4), textcoords="offset points", fontsize=9,
                bbox={"facecolor": matplotlib.rcParams["axes.facecolor"], "linewidth": 0, "pad": 0.5},
            )  # fmt: skip
    axis.axvline(1, color=GREY, linewidth=1, linestyle=":")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1.08)
    axis.set_xlabel("of the same network with fine maps everywhere (1.0)")
    axis.set_title(
        "A third of the image fine: time follows work, on both instruction sets", fontsize=11, loc="left"
    )
    axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=GREY, label="multiply-accumulates")]
    handles += [Patch(color=colour, label=f"time, {one}") for one, colour in SETS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


# -- the zoo -------------------------------------------------------------------------------------------

RESULTS = {
    "converts": ("convert", "#9ecae1"),
    "refused": ("refused, with the reason", COLOURS[0]),
    "not checked": ("not checked: too large, or no network of images", "#bdbdbd"),
    "not built": ("not built by its library", GREY),
    "broken": ("broken", "black"),
}
ACROSS = 12  # squares beside each other
_FAMILIES = 3  # columns of families


def zoo() -> Figure:
    """Draw each network as a square, by family; what does not convert stands out."""
    families: dict[str, list[str]] = defaultdict(list)
    for row in read_rows(RECORDED):
        families[row["family"].removeprefix("torchvision.").removeprefix("timm.")].append(row["result"])
    entries = sorted(families.items())
    lines = [-(-len(results) // ACROSS) for _, results in entries]
    per_column = -(-sum(lines) // _FAMILIES)
    figure = Figure(figsize=(WIDTH, WIDTH * (per_column + 4) / 78 + 0.3), layout="constrained")
    axis = figure.subplots()
    column = at = 0
    for (family, results), tall in zip(entries, lines, strict=True):
        if at >= per_column:
            column, at = column + 1, 0
        left = 26 * column
        axis.text(left - 0.7, at + 0.5, family, ha="right", va="center", fontsize=7)
        for place, result in enumerate(sorted(results, key=list(RESULTS).index, reverse=True)):
            corner = (left + place % ACROSS, at + place // ACROSS)
            axis.add_patch(Rectangle(corner, 0.86, 0.86, color=RESULTS[result][1], linewidth=0))
        at += tall
    axis.set(xlim=(-12, 26 * (_FAMILIES - 1) + ACROSS + 1), ylim=(per_column + 0.5, -0.5))
    axis.set_aspect("equal")
    axis.axis("off")
    count = {result: sum(results.count(result) for results in families.values()) for result in RESULTS}
    handles = [
        Patch(color=colour, label=f"{count[key]} {label}")
        for key, (label, colour) in RESULTS.items()
        if count[key]
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


# -- how it works --------------------------------------------------------------------------------------

_SIDE = 8  # fine pixels of the drawn map
_KEPT = ((0, 2), (1, 2), (1, 3), (2, 2))  # patches that stay fine, in coarse samples
# Offsets of a 3x3 kernel in fine pixels: one coarse sample, or dilation 2 on the fine map.
_REACH = (-2, 0, 2)


def concept() -> Figure:
    """Draw cells and elements of a fine, a coarse and an adaptive map, and where one kernel reads in each."""
    levels = torch.ones(_SIDE // 2, _SIDE // 2, dtype=torch.long)
    for patch in _KEPT:
        levels[patch] = 0
    mixed = levels.repeat_interleave(2, 0).repeat_interleave(2, 1)
    maps = {
        "fine everywhere": (torch.zeros_like(mixed), [(2, 4)]),
        "coarse everywhere": (torch.ones_like(mixed), [(2, 4)]),
        "fine where it matters": (mixed, [(2, 4), (5, 5)]),
    }
    figure = Figure(figsize=(WIDTH, WIDTH / 3 + 0.75), layout="constrained")
    for axis, (title, (level, kernels)) in zip(figure.subplots(1, 3), maps.items(), strict=True):
        lattice = Geometry((2,)).lattice(level[None])
        draw_cells(axis, lattice)
        elements = {divmod(pixel, _SIDE) for pixel in lattice.anchors.tolist()}
        for (row, column), colour in zip(kernels, (COLOURS[0], COLOURS[1]), strict=False):
            for down, across in itertools.product(_REACH, _REACH):
                place = (row + down, column + across)
                if max(place) < _SIDE and min(place) >= 0:
                    face = colour if place in elements else "none"
                    axis.plot(
                        place[1] + 0.5, place[0] + 0.5, "o", color=colour, markerfacecolor=face, markersize=9
                    )
            axis.plot(column + 0.5, row + 0.5, "s", color=colour, markersize=13, markerfacecolor="none")
        axis.set_title(f"{title}: {len(elements)} elements", fontsize=10)
        axis.set(xlim=(-0.05, _SIDE + 0.05), ylim=(_SIDE + 0.05, -0.05), aspect="equal")
        axis.axis("off")
    marks = {
        "element: one value for its cell": {"marker": ".", "color": GREY},
        "element that is computed": {"marker": "s", "color": COLOURS[0], "markerfacecolor": "none"},
        "tap that reads an element": {"marker": "o", "color": COLOURS[0]},
        "tap inside a cell: read by the fill": {
            "marker": "o",
            "color": COLOURS[1],
            "markerfacecolor": "none",
        },
    }
    handles = [Line2D([], [], linestyle="none", label=label, **mark) for label, mark in marks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


# -- the hero ------------------------------------------------------------------------------------------


def hero(data: Path, photo: Path) -> Callable[[], Figure]:
    """Run a trained network dense and converted on a photo, write the figures, and return how to draw both."""
    whole, (height, width) = voc.padded(read_image(photo))
    image = whole[:, :height, :width]
    model = voc.build(data, 8)
    net = cs.adaptify(model, MASK, output_stride=(8, 16), fill="guided")
    batch = normalise(image, source_of(model)).unsqueeze(0)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "dense": dense_twin(net, 0, batch),
        "adaptive": net.optimize(),
    }
    with torch.inference_mode():
        classes = {
            name: F.interpolate(call(batch), (height, width), mode="bilinear").argmax(1)[0]
            for name, call in calls.items()
        }
        times = interleaved({name: partial(call, batch) for name, call in calls.items()}, rounds=15)
        net(batch)
    work = net.macs(batch)
    figures = {
        "mask": MASK,
        "pixels": [height, width],
        "milliseconds": {name: one.best for name, one in times.items()},
        "macs": {"dense": work.given, "adaptive": work.mask},
        "same": float((classes["dense"] == classes["adaptive"]).double().mean()),
        **describe_run(torch.device("cpu")),
    }
    _write("hero.json", figures)
    return partial(hero_figure, image, net.lattice, classes, figures)


def _write(name: str, figures: Mapping[str, Any]) -> None:
    PICTURES.mkdir(exist_ok=True)
    with write_whole(PICTURES / name) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")


def hero_figure(
    image: Tensor, lattice: Lattice, classes: Mapping[str, Tensor], figures: Mapping[str, Any]
) -> Figure:
    """Draw the photo, its cells, and both predictions with their time and work."""
    pixels = image.permute(1, 2, 0).numpy()
    colours = np.array(
        [matplotlib.colors.to_rgb(one) for one in ("#000000", *(COLOURS[1:] + COLOURS[:1]) * 4)]
    )

    def over(labels: Tensor) -> np.ndarray:
        found = labels.numpy()
        shown = 0.35 * pixels + 0.65 * colours[found]
        return np.where((found > 0)[..., None], shown, 0.55 * pixels)

    time, macs = figures["milliseconds"], figures["macs"]
    share = macs["adaptive"] / macs["dense"]
    panels = {
        "photo": pixels,
        "small cells where there is detail": draw_lattice(pixels, lattice, 8),
        f"as given: {time['dense']:.0f} ms": over(classes["dense"]),
        f"converted: {time['adaptive']:.0f} ms, {share:.2f} of the work": over(classes["adaptive"]),
    }
    figure = Figure(figsize=(13, 13 / 4 * pixels.shape[0] / pixels.shape[1] + 0.5), layout="constrained")
    for axis, (title, shown) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axis.imshow(shown)
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hero", nargs=2, type=Path, metavar=("DATA", "PHOTO"))
    parser.add_argument("--masks", type=Path, metavar="PHOTO")
    parser.add_argument("--empty", nargs="+", type=Path, metavar=("DETECTOR", "PICTURE"))
    parser.add_argument("--only", default="", metavar="BEGINNING", help="draw pictures whose names begin so")
    options = parser.parse_args()
    if options.hero:
        draw("hero", hero(*options.hero), "jpg")
    if options.masks:
        drawn, figures = masks(options.masks)
        _write("masks.json", figures)
        for name, picture in drawn.items():
            draw(name, picture, "jpg")
    if options.empty:
        draw("masks-empty", empty(options.empty[0], options.empty[1:]), "jpg")
    pictures = {"concept": concept, "quality": quality, "speed": speed, "zoo": zoo, **WORDS}
    for name, picture in pictures.items():
        if name.startswith(options.only):
            draw(name, picture, "jpg" if name in PHOTOS else "png")


if __name__ == "__main__":
    main()
