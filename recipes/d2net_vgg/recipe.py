"""D2-Net's trunk with full resolution around keypoints, as published (Hesse et al., CVPRW 2023): settings, cost, time.

    python recipes/d2net_vgg/recipe.py [--weights d2_tf.pth] [--image FILE] [--size 480x640] [--output results.json]

prints the multiply-accumulates per pixel of the regular networks, and for every published setting its cost and its
time on an image, with everything computed and with only what the keypoints depend on. Without weights they are
random, at the same cost; matching figures need `d2_tf.pth` and HPatches (see the README beside this file).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

import cadsurgery as cs
from cadsurgery.data.images import normalise, read_image, street_scene
from cadsurgery.data.networks import source_of
from cadsurgery.masks.detectors import sift
from cadsurgery.network.macs import dense_macs
from cadsurgery.support.timing import interleaved
from recipes.d2net_vgg.network import BUILDER, POOLS, load_released

COUNT = 512  # maximum number of keypoints per image
INF = math.inf
PUBLISHED: dict[str, Any] = {"anchor": "center", "fill": "nearest", "pool": "drop"}
OURS: dict[str, Any] = {"pool": "atrous"}


@dataclass(frozen=True)
class Run:
    """A published setting.

    Attributes:
        output_stride: the high output stride; the low one is 8.
        dilations: sides in image pixels of the windows around keypoints for output strides 1, 2, 4 (from the high one
            on); 0 for none, inf for the whole image.
        mma3: published mean matching accuracy at 3 pixels on HPatches (cached results of the published code).
    """

    output_stride: int
    dilations: tuple[float, ...]
    mma3: float

    @property
    def mask(self) -> str:
        """The mask around the points passed to `read_at`."""
        sides = "/".join(f"{side:g}" for side in self.dilations)
        return f"keypoints:detector=given,count={COUNT},dilations={sides}"


RUNS = {
    "os8": Run(1, (0, 0, 0), 0.5500),
    "0-0-5": Run(1, (0, 0, 5), 0.5750),
    "0-0-11": Run(1, (0, 0, 11), 0.6084),
    "0-0-21": Run(1, (0, 0, 21), 0.6372),
    "0-0-31": Run(4, (31,), 0.6463),
    "0-19-35": Run(2, (19, 35), 0.6627),
    "0-27-37": Run(2, (27, 37), 0.6682),
    "19-41-41": Run(1, (19, 41, 41), 0.6743),
    "25-51-51": Run(1, (25, 51, 51), 0.6781),
    "os1": Run(1, (INF, INF, INF), 0.6765),
}


def adapted(
    run: Run, weights: Path | None = None, *, published: bool = True, **options: Any
) -> cs.AdaptiveModel:
    """Convert the network of a run.

    Args:
        run: the setting.
        weights: the released file; random weights without it.
        published: interpolation, anchors and pools of the published code; otherwise this package's defaults.
        options: further options of `adaptify`.
    """
    net = cs.build_model(BUILDER, "none")
    if weights is not None:
        load_released(net, weights)
    chosen = {**(PUBLISHED if published else OURS), **options}
    return cs.adaptify(net, run.mask, output_stride=(run.output_stride, 8), **chosen)


def grey(image: Tensor) -> Any:
    """Convert an image (3, H, W) in 0..1, RGB, to the bytes (H, W) that the published code passes to SIFT.

    As published, the weights of red and blue are swapped, and fractions are cut off.
    """
    weights = torch.tensor((0.114, 0.587, 0.299))
    return (255 * torch.einsum("chw,c->hw", image, weights)).to(torch.uint8).numpy()


def detect(image: Tensor) -> list[Tensor]:
    """Detect SIFT keypoints as published in images (B, 3, H, W) as the network sees them.

    For `--detector`, with `--normalisation raw`.
    """
    from recipes.d2net_vgg.network import MEAN

    pixels = (image.detach().cpu() + torch.tensor(MEAN).view(3, 1, 1)) / 255
    return [torch.from_numpy(sift(grey(picture.clamp(0, 1)), COUNT)[0]) for picture in pixels]


def describe(
    net: cs.AdaptiveModel, image: Tensor, points: list[Tensor], *, published: bool = False, **options: Any
) -> list[Tensor]:
    """Read normalised descriptors (n, 512) at points of each image; options as in `cadsurgery.read_at`.

    `published` does not normalise them, and aligns the outermost samples with the outermost pixels.
    """
    rows = cs.read_at(net, image, points, align="corners" if published else "cell", **options)
    return rows if published else [F.normalize(part, dim=1) for part in rows]


def macs_per_pixel() -> dict[int, float]:
    """Return the multiply-accumulates of the regular networks' convolutions per image pixel, by output stride."""
    image = torch.zeros(1, 3, 64, 64)
    built = {stride: cs.build_model(BUILDER, "none", output_stride=stride) for stride in POOLS}
    return {stride: dense_macs(net, image) / image[0, 0].numel() for stride, net in built.items()}


def measure(
    image: Tensor, weights: Path | None, rounds: int, names: list[str], published: bool
) -> list[dict[str, Any]]:
    """Measure cost and time of runs on an image (3, H, W); return rows of a table."""
    found = torch.from_numpy(sift(grey(image), COUNT)[0])
    rows, sides = [], dict[str, Callable[[], Any]]()
    for name in names:
        net = adapted(RUNS[name], weights, published=published, verify_laws=False).eval().optimize()
        shown = normalise(image, source_of(net)).unsqueeze(0)
        macs = cs.macs_at(net, shown, [found])
        pixels = image[0].numel()
        rows.append(
            {
                **{"run": name, "output_stride": [RUNS[name].output_stride, 8], "keypoints": len(found)},
                **{"active_fraction": net.active_fraction, "levels": net.levels.double().mean().item()},
                **{"macs_per_pixel": macs.all / pixels, "receptive_macs_per_pixel": macs.receptive / pixels},
                **{"elements": list(macs.elements)},
            }
        )
        for reach in ("all", "receptive"):
            sides[f"{name} {reach}"] = lambda net=net, shown=shown, reach=reach: cs.read_at(  # type: ignore[misc]
                net, shown, [found], reach=reach
            )
    times = interleaved(sides, rounds) if rounds else {}
    for row in rows:
        for reach in ("all", "receptive"):
            if time := times.get(f"{row['run']} {reach}"):
                row[f"{reach}_ms"], row[f"{reach}_ms_median"] = time.best, time.median
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows of `measure` in Markdown."""
    lines = [
        "| run | strides | MACs per pixel | of them needed | ms | ms, only what is needed | faster | MMA@3 published |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ms = [row.get(f"{reach}_ms") for reach in ("all", "receptive")]
        told = [f"{value:.0f}" if value is not None else "" for value in ms]
        faster = f"{ms[0] / ms[1]:.2f}x" if ms[0] is not None and ms[1] is not None else ""
        share = row["receptive_macs_per_pixel"] / row["macs_per_pixel"]
        strides = "-".join(map(str, row["output_stride"]))
        macs, published = f"{row['macs_per_pixel']:,.0f}", RUNS[row["run"]].mma3
        lines.append(
            f"| {row['run']} | {strides} | {macs} | {share:.3f} | {told[0]} | {told[1]} | {faster} | {published:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, help="d2_tf.pth; default: random weights")
    parser.add_argument("--image", type=Path, help="default: a generated street scene")
    parser.add_argument("--size", default="480x640", help="HxW")
    parser.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument(
        "--ours", action="store_true", help="linear fill and atrous pooling instead of the published ones"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timing rounds; 0 for none")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    height, width = map(int, options.size.split("x"))
    image = read_image(options.image, (height, width)) if options.image else street_scene(height, width)
    for stride, macs in macs_per_pixel().items():
        print(f"regular network, output stride {stride}: {macs:,.0f} MACs per pixel")
    rows = measure(image, options.weights, options.rounds, options.runs, not options.ours)
    print(
        f"{rows[0]['keypoints']} keypoints on {height} x {width}, {torch.get_num_threads()} threads",
        table(rows),
        sep="\n\n",
    )
    if options.output:
        document = {"size": [height, width], "threads": torch.get_num_threads(), "torch": torch.__version__}
        document |= {"weights": str(options.weights or "random"), "published": not options.ours, "rows": rows}
        options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
