"""Measure networks on pictures that are too large for memory: whole, in bands of rows, and in windows.

    python -m benchmarks.large_pictures --heights 1536 5024 20096 --width 4000
    python -m benchmarks.large_pictures --plans --width 4000 --heights 5024
    python -m benchmarks.large_pictures --masks 0.1 0.3 --heights 1536

A U-Net of 32 to 512 channels with random weights and two classes, on a picture of street scenes beside each other. Each
side runs in processes of its own: some are timed, and one gives freed memory back at once and tells by how much the
call *raises* the peak of the resident set above its size before. The picture is there before, results are counted:
whole sides return all of it, bands give rows (`net.optimize(memory=...).rows`), of which classes are kept. *Windows*
is MONAI's `sliding_window_inference` (which has to be installed) with windows of 1,024 and an overlap of an eighth.
*Error* is the largest difference from the first side relative to its largest value, where that was measured. The
network as given runs in channels_last, which is faster here.

With `--plans` nothing is measured: the bands that several networks would take within some memories, and their work
relative to computing each map once. With `--masks` the network is computed under floors, in bands and whole; *of the
line* is the time relative to the line between nothing kept, whole, and the network as given. All sides are then given
the picture as a tensor.
"""

from __future__ import annotations

import argparse
import ast
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet101

import cadsurgery as cs
from benchmarks import networks
from benchmarks.memory import peak_raised_by, run_alone
from cadsurgery.data.images import street_scene
from cadsurgery.data.networks import build_model
from cadsurgery.support.errors import CadError
from cadsurgery.support.memory import bytes_of, in_mebibytes
from cadsurgery.support.provenance import setting

WINDOW, OVERLAP, MEMORY = 1024, 0.125, "512MiB"
_ROWS = 128
_SMALL = 10  # megapixels; pictures of fewer are computed several times
_MOST = 25  # megapixels up to which a picture is computed whole
_CALLS = 3  # so often in each process
MEMORIES = ("256MiB", "512MiB", "1GiB", "2GiB")
GIVEN, LOW = "as given", "nothing kept, whole"
WHOLE, BANDS, WINDOWS = "converted, whole", "in bands", "windows"


class Returned(nn.Module):
    """A network whose call returns one of the maps of its dictionary, as users of the network take it."""

    def __init__(self, network: nn.Module, name: str) -> None:
        super().__init__()
        self.network, self.name = network, name

    def forward(self, x: Tensor) -> Tensor:
        """Return the map of that name."""
        output: Tensor = self.network(x)[self.name]
        return output


def _deeplab() -> nn.Module:
    return Returned(deeplabv3_resnet101(weights=None, weights_backbone=None), "out")


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet_resnet34": networks.resnet34_unet,
    "unet": networks.unet,
    "pyramid_resnet50": networks.resnet50_pyramid,
    "deeplabv3_resnet101": _deeplab,
    "d2net": partial(build_model, "recipes.d2net_vgg.network:trunk"),
}


def thin_unet() -> nn.Module:
    """Build a U-Net of 32 to 512 channels with two classes."""
    torch.manual_seed(0)
    net = networks.UNet(32)
    net.head = nn.Conv2d(32, 2, 1)
    return net.eval()


class Scenes:
    """A picture (3, H, W) of street scenes beside each other, of which rows are made where it is sliced."""

    def __init__(self, height: int, width: int) -> None:
        self.shape, self._scene = (3, height, width), street_scene(512, 1000)

    def __getitem__(self, place: tuple[slice, slice]) -> Tensor:
        """Return rows (3, rows, W)."""
        first, end, _ = place[1].indices(self.shape[1])
        rows = self._scene[:, torch.arange(first, end) % self._scene.shape[1]]
        return rows.repeat(1, 1, -(-self.shape[2] // rows.shape[2]))[:, :, : self.shape[2]].contiguous()


def _run_of(task: dict[str, Any]) -> Callable[[Any], Any]:
    """Return the call of a side: of a picture's tensor; in rows, of the picture. It returns the result, or the classes
    of rows unless the result is kept."""
    model, side = thin_unet().to(memory_format=torch.channels_last), task["side"]
    if side in (LOW, WHOLE, BANDS):
        example, memory = torch.randn(1, 3, 256, 320), task["memory"] if side == BANDS else None
        mask = "none" if side == LOW else task["mask"]
        net = cs.adaptify(model, mask, coarsest=32, example_input=example, verify_laws=False)
        fast = net.optimize(memory=memory)
    if side == BANDS:
        keeps = bool(task["keep"])

        def in_rows(picture: Any) -> Any:
            result = fast.rows(picture)
            task["plan"] = (result.walks.band, result.walks.peak)
            shape = result.shape if keeps else result.shape[1:]
            found = torch.empty(shape, dtype=torch.float32 if keeps else torch.uint8)
            for first, rows in result:
                found[..., first : first + rows.shape[1], :] = rows if keeps else rows.argmax(0)
            return found.unsqueeze(0)

        return in_rows
    if side == WINDOWS:
        from monai.inferers import sliding_window_inference

        return lambda image: sliding_window_inference(image, (WINDOW, WINDOW), 1, model, overlap=OVERLAP)
    return model if side == GIVEN else fast


def print_side(task: str) -> None:
    """Run one side, and print its seconds, by how many MiB it raises the peak of the resident set, and its plan. A few
    rows are computed before: weights are packed then."""
    arguments: dict[str, Any] = ast.literal_eval(task)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        run = _run_of(arguments)
        for height in (_ROWS, arguments["height"]):
            given: Any = Scenes(height, arguments["width"])
            if arguments["side"] != BANDS or arguments["mask"] != "all":
                given = given[:, :]
            if arguments["side"] != BANDS:
                given = given.unsqueeze(0).contiguous(memory_format=torch.channels_last)

            def timed(given: Any = given) -> None:
                for _ in range(arguments["calls"]):
                    start = time.perf_counter()
                    found["result"] = run(given)
                    seconds = time.perf_counter() - start
                    found["seconds"] = min(seconds, found.get("seconds", seconds))

            found.clear()
            raised = peak_raised_by(timed)
    if arguments["keep"]:
        np.save(arguments["keep"], found["result"].numpy())
    print((found["seconds"], raised, arguments.get("plan")))


def measured(
    side: str,
    mask: str,
    size: tuple[int, int],
    memory: str,
    keep: str = "",
    gives_back: bool = True,
    calls: int = 1,
) -> tuple[Any, ...]:
    """Return the seconds of the fastest call, MiB and plan of a side that runs in a process of its own."""
    task = {"side": side, "mask": mask, "height": size[0], "width": size[1], "memory": memory}
    task |= {"keep": keep, "calls": calls}
    code = f"from {__spec__.name} import print_side; print_side(sys.argv[1])"
    found: tuple[Any, ...] = ast.literal_eval(run_alone(code, repr(task), gives_back))
    return found


def rows_of_sides(
    size: tuple[int, int],
    sides: Sequence[str],
    mask: str,
    memory: str,
    rounds: int,
    kept: float | None = None,
) -> Iterator[str]:
    """Yield the table's rows of a size; the sides are timed in turn, and the best time of each counts. `kept` is the
    share of the cells that the mask keeps."""
    megapixels, seconds = size[0] * size[1] / 1e6, dict[str, float]()
    for side in [*sides, *((LOW, GIVEN) if kept is not None else ())] * rounds:
        calls = _CALLS if megapixels < _SMALL else 1
        once = measured(side, mask, size, memory, gives_back=False, calls=calls)[0]
        seconds[side] = min(once, seconds.get(side, once))
    with tempfile.TemporaryDirectory() as folder:
        right = None
        for place, side in enumerate(sides):
            _, raised, plan = measured(side, mask, size, memory)
            cells = [f"{megapixels:.1f}", side, f"{seconds[side]:.1f}" if rounds else "", f"{raised:.0f}"]
            cells += [f"{plan[1] / 2**20:.0f} in bands of {plan[0]}" if plan else ""]
            if megapixels < _SMALL:
                keep = str(Path(folder) / f"{place}.npy")
                measured(side, mask, size, memory, keep, gives_back=False)
                result = np.load(keep)
                right = result if right is None else right
                cells += [f"{np.abs(result - right).max() / np.abs(right).max():.1e}"]
            if kept is not None and rounds:
                line = seconds[LOW] + kept * (seconds[GIVEN] - seconds[LOW])
                cells += [f"{seconds[side] / line:.2f} of {line:.1f} s"]
            yield f"| {' | '.join(cells)} |"


def rows_of_plans(
    size: tuple[int, int], memories: Sequence[str], models: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the table's rows of the bands that networks would take; `models` are further ones by name."""
    for name, build in (NETWORKS | {Path(name).name: partial(build_model, name) for name in models}).items():
        try:
            model = build().eval()
        except ImportError as error:
            yield f"| {name} | left out: {error} |"
            continue
        net = cs.adaptify(
            model, "all", coarsest=32, example_input=torch.randn(1, 3, 256, 320), verify_laws=False
        )
        picture, cells = torch.zeros(()).expand(1, 3, *size), []
        for memory in memories:
            try:
                plan = net.optimize(memory=memory).plan_memory(picture)
                cells.append(f"{plan.band} rows, {in_mebibytes(plan.peak)}, work {plan.work:.2f}")
            except CadError as refusal:
                cells.append(refusal.next.removeprefix("give ").rstrip("."))
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=4000)
    parser.add_argument("--heights", type=int, nargs="+", default=[1536, 5024, 20096])
    parser.add_argument("--memory", default=MEMORY)
    parser.add_argument("--rounds", type=int, default=2, help="of pictures below 10 megapixels")
    parser.add_argument("--plans", action="store_true")
    parser.add_argument("--models", nargs="*", default=[], help="further networks of --plans, as in commands")
    parser.add_argument(
        "--masks", type=float, nargs="+", default=[], help="shares of the cells that are kept"
    )
    options = parser.parse_args()
    bytes_of(options.memory)
    print(setting(torch.device("cpu")))
    sizes = [(height, options.width) for height in options.heights]
    if options.plans:
        print(f"| network | {' | '.join(MEMORIES)} |")
        for size in sizes:
            for line in rows_of_plans(size, MEMORIES, options.models):
                print(line, flush=True)
        return
    print("| megapixels | side | seconds | MiB raised | MiB planned | error | of the line |")
    for size in sizes:
        megapixels = size[0] * size[1] / 1e6
        sides = [GIVEN, WHOLE, BANDS, WINDOWS] if megapixels < _SMALL else [WHOLE, BANDS, WINDOWS]
        rounds = options.rounds if megapixels < _SMALL else 1
        if megapixels > _MOST:  # the memory alone
            sides, rounds = [BANDS], 0
        for kept in options.masks or [None]:
            mask = "all" if kept is None else f"content | budget:fraction={kept}"
            compared = sides if kept is None else [WHOLE, BANDS]
            print(f"mask {mask}:")
            for line in rows_of_sides(size, compared, mask, options.memory, rounds, kept):
                print(line, flush=True)


if __name__ == "__main__":
    main()
