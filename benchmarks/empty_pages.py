"""A text detector on pages that are mostly blank: floors against smaller pictures and against skipping blank tiles.

    python -m benchmarks.empty_pages DETECTOR.onnx PAGES/

Quality is the intersection over union of the text map (above .3) with that of the network as given; nothing is
labelled. Every side runs in torch, in channels_last memory, with batch norm folded where it can be; all are called in
turn, and the best time of the rounds counts. `compiled` is the network after `torch.compile`, once for each size of
pages; `all` is this package's fast copy with everything kept; `text` keeps the cells with text, grown by one: what a
perfect mask would keep. Tiles have 256 pixels and a margin of 64; those without text are skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.images import read_image
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

TILE, MARGIN, TEXT, LONGEST, FLOOR = 256, 64, 0.3, 1280, 32


def page(path: Path) -> Tensor:
    """Read a page as the detector takes it, (1, 3, H, W) in -1..1, with sides of whole cells of 32 pixels."""
    picture = read_image(path)[None].flip(1)  # BGR
    scale = LONGEST / max(picture.shape[2:])
    size = [max(32, round(length * scale / 32) * 32) for length in picture.shape[2:]]
    resized = F.interpolate(picture, size, mode="bilinear", antialias=True, align_corners=False)
    return (resized * 2 - 1).contiguous(memory_format=torch.channels_last)


def kept_text(text: Tensor, cell: int) -> Tensor:
    """Return a bool map (1, H, W): cells with text, and those around them."""
    cells = F.max_pool2d(F.max_pool2d((text > TEXT).float(), cell), 3, 1, 1)[:, 0] > 0
    return cells.repeat_interleave(cell, 1).repeat_interleave(cell, 2)


def smaller(model: nn.Module, image: Tensor, scale: float) -> Callable[[], Tensor]:
    """Return a run on a smaller picture, whose text map is resized."""
    size = [max(32, round(length * scale / 32) * 32) for length in image.shape[2:]]
    few = F.interpolate(image, size, mode="bilinear", antialias=True, align_corners=False)
    few = few.contiguous(memory_format=torch.channels_last)
    return lambda: F.interpolate(model(few), image.shape[2:], mode="bilinear", align_corners=False)


def tiles(model: nn.Module, image: Tensor, text: Tensor) -> Callable[[], Tensor]:
    """Return a run on the tiles that hold text, each with its margin."""
    height, width = image.shape[2:]
    padded = F.pad(image, (MARGIN, MARGIN + TILE, MARGIN, MARGIN + TILE), value=float(image.median()))
    places = [
        (y, x)
        for y in range(0, height, TILE)
        for x in range(0, width, TILE)
        if (text[..., y : y + TILE, x : x + TILE] > TEXT).any()
    ]

    def run() -> Tensor:
        out = torch.zeros(1, 1, height + TILE, width + TILE)
        for y, x in places:
            part = padded[..., y : y + TILE + 2 * MARGIN, x : x + TILE + 2 * MARGIN]
            inner = model(part.contiguous(memory_format=torch.channels_last))
            out[..., y : y + TILE, x : x + TILE] = inner[..., MARGIN:-MARGIN, MARGIN:-MARGIN]
        return out[..., :height, :width]

    return run


def overlap(found: Tensor, given: Tensor) -> float:
    """Return the intersection over union of two text maps."""
    found, given = found > TEXT, given > TEXT
    return float((found & given).sum() / (found | given).sum().clamp(min=1))


def main() -> None:
    """Print a row for each page and side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("detector", type=Path)
    parser.add_argument("pages", type=Path)
    options = parser.parse_args()
    model = cs.build_model(str(options.detector)).eval().to(memory_format=torch.channels_last)
    net = cs.adaptify(
        model, "content", coarsest=FLOOR, normalisation=((0.5,) * 3, (0.5,) * 3), verify_laws=False
    )
    fast = net.optimize()
    compiled = torch.compile(model, dynamic=False)
    print(describe_run(torch.device("cpu")))
    with torch.inference_mode():
        for path in sorted(options.pages.glob("*.jpg")):
            image = page(path)
            given = model(image)
            text = kept_text(given, FLOOR)
            runs = {
                "as given": lambda image=image: model(image),
                "compiled": lambda image=image: compiled(image),
                "all": lambda image=image: fast(image, mask="all"),
                "picture at .75": smaller(model, image, 0.75),
                "picture at .5": smaller(model, image, 0.5),
                "tiles": tiles(model, image, given),
                "text": lambda image=image, text=text: fast(image, mask=text),
                "content": lambda image=image: fast(image, mask="content"),
                "preview": lambda image=image: fast(image, mask="preview"),
            }
            times = interleaved(runs, 5)
            masks = {"text": text, "content": "content", "preview": "preview"}
            work = {name: net.macs(image, mask=mask) for name, mask in masks.items()}
            for name, run in runs.items():
                share = f"{work[name].of_given:5.2f}" if name in work else "     "
                best = times[name].best
                print(
                    f"{path.stem:20} {name:15} IoU {overlap(run(), given):.3f}  MACs {share}  {best:7.1f} ms"
                )


if __name__ == "__main__":
    main()
