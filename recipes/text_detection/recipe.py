"""PP-OCRv4's text detector on large pages that are mostly blank: one pass with a floor, and what else one would run.

    python recipes/text_detection/recipe.py DATA [--only NAME ...] [--rounds N] [--output results.json]

DATA is a folder with `text_detection/` (see the README beside this file). Each scan lies, at its own size, on a blank
sheet of its own background colour. All sides of a page are run in turn, and the processor time and the wall time of
each call are taken; boxes are compared with those of the network as given on the whole page.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cadsurgery as cs
from cadsurgery.images import read_image
from cadsurgery.support.provenance import describe_run

DETECTOR = "ch_PP-OCRv4_det_infer.onnx"
SHEET, FLOOR = 3008, 32  # pixels a side; multiples of 32 pixels
WINDOW, OVERLAP = 1280, 128
TEXT, SCORE, SMALLEST = (
    0.3,
    0.6,
    3,
)  # of PaddleOCR: a pixel is text above, a box is kept above, and is no thinner
SAME = 0.5  # intersection over union from which on two boxes are one
NORMALISATION = ((0.5,) * 3, (0.5,) * 3)
MASKS = {
    "content": "content",
    "content, one more cell around": "content:margin=2",
    "content, fainter": "content:least=0.1",
}
GIVEN, GIVEN_FILE = "torch as given", "ONNX Runtime, the file as given"
Box = tuple[int, int, int, int]  # top, left, bottom, right


# -- pages and boxes -----------------------------------------------------------------------------------


def sheet(path: Path, side: int = SHEET) -> Tensor:
    """Read a scan as the detector takes it, (1, 3, side, side) in -1..1, in the middle of a blank sheet."""
    scan = read_image(path)[None].flip(1)  # blue, green, red
    height, width = (min(length, side) for length in scan.shape[2:])
    colour = scan.flatten(2).median(2).values[..., None, None]
    page = colour.expand(1, 3, side, side).clone()
    top, left = (side - height) // 2, (side - width) // 2
    page[..., top : top + height, left : left + width] = scan[..., :height, :width]
    return page * 2 - 1


def boxes(text: Tensor) -> list[Box]:
    """Return the boxes of a text map (1, 1, H, W): of connected text, upright, whose mean is high enough."""
    from scipy import ndimage

    values = text[0, 0].float().numpy()
    parts, _ = ndimage.label(values > TEXT, np.ones((3, 3)))
    places = ndimage.find_objects(parts)
    means = ndimage.mean(values, parts, range(1, len(places) + 1))
    return [
        (rows.start, columns.start, rows.stop, columns.stop)
        for (rows, columns), mean in zip(places, np.atleast_1d(means), strict=True)
        if mean >= SCORE and min(rows.stop - rows.start, columns.stop - columns.start) >= SMALLEST
    ]


def overlaps(first: Sequence[Box], second: Sequence[Box]) -> np.ndarray:
    """Return the intersection over union of each pair of boxes."""
    one, two = (np.array(some, float).reshape(-1, 4) for some in (first, second))
    low, high = np.maximum(one[:, None, :2], two[:, :2]), np.minimum(one[:, None, 2:], two[:, 2:])
    inner = np.clip(high - low, 0, None).prod(-1)
    areas = [(some[:, 2:] - some[:, :2]).prod(-1) for some in (one, two)]
    return inner / np.maximum(areas[0][:, None] + areas[1] - inner, 1)


def agreement(found: Sequence[Box], right: Sequence[Box]) -> tuple[int, int, int, list[Box]]:
    """Return how many boxes are the same, were found and were right, and the right ones that are lost."""
    from scipy.optimize import linear_sum_assignment

    values = overlaps(found, right)
    rows, columns = linear_sum_assignment(-values)
    same = {int(column) for row, column in zip(rows, columns, strict=True) if values[row, column] >= SAME}
    return len(same), len(found), len(right), [box for at, box in enumerate(right) if at not in same]


def f1(counts: Sequence[Sequence[int]]) -> float:
    """Return the F1 of boxes over pages, from the numbers of `agreement`."""
    same, found, right = np.array([[*row] for row in counts]).reshape(-1, 3).sum(0)
    return float(2 * same / max(1, found + right))


def with_error(
    of: Callable[[Sequence[int]], float], pages: int, draws: int = 1000
) -> tuple[float, float, float]:
    """Return a figure of pages and the bounds of 95 % of it over pages drawn with replacement."""
    random = np.random.default_rng(0)
    drawn = [of(random.integers(0, pages, pages).tolist()) for _ in range(draws)]
    return (of(range(pages)), *(float(np.quantile(drawn, share)) for share in (0.025, 0.975)))


# -- sides ---------------------------------------------------------------------------------------------


def windows(model: Callable[[Tensor], Tensor], page: Tensor) -> Tensor:
    """Run overlapping windows; each gives what is nearer to its middle than to that of another."""
    side = page.shape[-1]
    starts = [*range(0, max(1, side - WINDOW), WINDOW - OVERLAP), max(0, side - WINDOW)]
    text = torch.zeros(1, 1, side, side)
    margins = [(start + (OVERLAP // 2 if start else 0)) for start in starts]
    for row, top in zip(margins, starts, strict=True):
        for column, left in zip(margins, starts, strict=True):
            part = model(page[..., top : top + WINDOW, left : left + WINDOW].contiguous())
            text[..., row : top + WINDOW, column : left + WINDOW] = part[..., row - top :, column - left :]
    return text


def session(path: Path, kernels: bool = False) -> Callable[[Tensor], Tensor]:
    """Return the run of an ONNX file in ONNX Runtime, with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if kernels:
        options.register_custom_ops_library(cs.kernels_for("onnxruntime"))
    opened = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = opened.get_inputs()[0].name
    return lambda page: torch.from_numpy(opened.run(None, {name: page.numpy()})[0])


def sides_of(data: Path, folder: Path, pages: Sequence[Tensor], only: Sequence[str]) -> dict[str, Any]:
    """Return what runs a page, by name; files are written into a folder."""
    file = data / "text_detection" / DETECTOR
    model: nn.Module = cs.build_model(str(file)).eval()
    last = model.to(memory_format=torch.channels_last)
    given = session(file)
    sides: dict[str, Any] = {
        GIVEN: lambda page: last(page.contiguous(memory_format=torch.channels_last)),
        GIVEN_FILE: given,
        f"torch, windows of {WINDOW}": lambda page: windows(last, page),
        f"ONNX Runtime, windows of {WINDOW}": lambda page: windows(given, page),
    }
    example = pages[0][..., :640, :640].contiguous()
    for name, mask in MASKS.items():
        options = {"coarsest": FLOOR, "normalisation": NORMALISATION, "verify_laws": False}
        net = cs.adaptify(model, mask, example_input=example, **options)
        fast = net.optimize()
        sides[f"floor {FLOOR}, {name}"] = fast
        if name != "content":
            continue
        for precision in ("float", "int8"):
            label = (
                f"ONNX Runtime with kernels, {'8 bits, ' if precision == 'int8' else ''}floor {FLOOR}, {name}"
            )
            if only and not any(word in label for word in only):
                continue
            path, more = folder / f"{precision}.onnx", {}
            if precision == "int8":
                more = {
                    "precision": "int8",
                    "calibration": torch.cat([page[..., 800:1440, 800:1440] for page in pages]),
                }
            cs.export(net, example, path, dynamic=True, with_kernels=True, **more)
            sides[label] = session(path, kernels=True)
    return {
        name: run for name, run in sides.items() if not only or name == GIVEN or any(w in name for w in only)
    }


def measure(sides: dict[str, Any], pages: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    """Return for each side a row of each page: processor and wall time, counts of boxes, and boxes that are lost."""
    rows: dict[str, Any] = {name: [] for name in sides}
    for title, page in pages.items():
        right, times = [], {name: [] for name in sides}
        for number in range(rounds + 1):  # the first one warms up, and its boxes are compared
            for name, run in sides.items():
                start = time.process_time(), time.perf_counter()
                text = run(page)
                taken = time.process_time() - start[0], time.perf_counter() - start[1]
                if number:
                    times[name].append(taken)
                    continue
                found = boxes(text if isinstance(text, Tensor) else text[0])
                right = right or found
                *counts, lost = agreement(found, right)
                rows[name].append({"page": title, "boxes": counts, "lost": lost})
        for name, taken in times.items():
            rows[name][-1] |= {"cpu": min(one for one, _ in taken), "wall": min(one for _, one in taken)}
        print(f"{title}: {len(right)} boxes", file=sys.stderr)
    return rows


def summary(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each side: seconds a page, of the network as given, of its file, and F1, with their errors."""
    pages = len(rows[GIVEN])
    table = []
    for name, found in rows.items():

        def relative(at: Sequence[int], to: str, kind: str, found: Any = found) -> float:
            whole = rows.get(to, rows[GIVEN])
            return sum(found[i][kind] for i in at) / sum(whole[i][kind] for i in at)

        row: dict[str, Any] = {"side": name, "pages": pages}
        row |= {f"{kind}_seconds": sum(one[kind] for one in found) / pages for kind in ("cpu", "wall")}
        row["cpu_of_given"] = with_error(lambda at, run=relative: run(at, GIVEN, "cpu"), pages)
        row["cpu_of_file"] = with_error(lambda at, run=relative: run(at, GIVEN_FILE, "cpu"), pages)
        row["f1"] = with_error(lambda at, found=found: f1([found[i]["boxes"] for i in at]), pages)
        heights = [bottom - top for one in found for top, _, bottom, _ in one["lost"]]
        row["lost"] = {"boxes": len(heights), "median_height": float(np.median(heights)) if heights else None}
        table.append(row)
    return table


def show(table: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    shown = Table(
        "side", "CPU s a page", "wall s", "of torch as given", "of the given file", "F1", "boxes lost"
    )
    for row in table:
        figures = ["{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in ("cpu_of_given", "cpu_of_file")]
        lost = f"{row['lost']['boxes']}, median height {row['lost']['median_height'] or 0:.0f}"
        quality = "{:.3f} ({:.3f} to {:.3f})".format(*row["f1"])
        shown.add_row(
            row["side"], f"{row['cpu_seconds']:.2f}", f"{row['wall_seconds']:.2f}", *figures, quality, lost
        )
    Console(width=160).print(shown)


def main() -> None:
    """Run the sides on the pages and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument(
        "--only", nargs="*", default=[], help="words of the names of sides; that as given runs always"
    )
    parser.add_argument("--pages", nargs="*", default=[], help="names of scans; default: all")
    parser.add_argument("--side", type=int, default=SHEET)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    folder = options.data / "text_detection"
    if not (folder / DETECTOR).is_file():
        print(f"skipped: {folder} does not hold {DETECTOR}; see the README beside this recipe.")
        return
    torch.set_num_threads(options.threads)
    paths = [
        path
        for path in sorted((folder / "pages").glob("*.jpg"))
        if not options.pages or path.stem in options.pages
    ]
    pages = {path.stem: sheet(path, options.side) for path in paths}
    with tempfile.TemporaryDirectory() as files:
        sides = sides_of(options.data, Path(files), [*pages.values()], options.only)
        with torch.inference_mode():
            rows = measure(sides, pages, options.rounds)
    table = summary(rows)
    show(table)
    if options.output:
        about = {"run": describe_run(torch.device("cpu")), "threads": options.threads, "sheet": options.side}
        options.output.write_text(json.dumps({**about, "table": table, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
