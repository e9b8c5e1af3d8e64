"""Time one kind of layer in engines, in each form that a convolution of rows can take in a file.

    python -m benchmarks.engine_layers FOLDER [--rounds 10] [--write docs/engine_layers.json]
    python -m benchmarks.engine_layers --table                           # that of docs/data/deploy.md alone

A file has four equal layers with ReLU, on a map of 64 x 128 samples of which a third of the patches (4 x 4) are fine
and the rest one sample each; tables and shares are inputs, as they follow the image in a real file. Random weights, one
thread, all files of a kind, an engine and a precision in turn. The forms:

- `dense`: the layer on the whole fine map; its time times the share of rows is what the work promises;
- `gathered`: rows gathered by tap, then a product; for grouped layers one product for each tap (in int8: in float32);
- `taps`: rows gathered by tap as an image (1, C, rows, taps), convolved over its taps;
- `tiles`: fine patches with the halo they read as images (patches, C, 6, 6), convolved without padding, and `gathered`
  for the rest, in an order of rows that suits it (which a network would have to restore);
- `kernels`: this package's kernels, registered in the engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadsurgery.elements.kernel_map import Window, kernel_map
from cadsurgery.elements.lattice import Geometry
from cadsurgery.network.export.engines import engine_for
from cadsurgery.network.export.int8 import to_8_bits
from cadsurgery.network.export.kernels import declare_kernels
from cadsurgery.network.export.onnx import translate
from cadsurgery.network.export.translate import TABLE
from cadsurgery.support.errors import CannotConvert
from cadsurgery.support.files import make_folder, write_whole
from cadsurgery.support.provenance import describe_run
from cadsurgery.support.timing import interleaved

SIZE, SIDE, FINE, LAYERS = (64, 128), 4, 0.34, 4
# Channels, groups and window of each kind of layer: of ResNet-50, MobileNetV2, ConvNeXt-T and RegNetY-400MF.
KINDS = {
    "1x1, 256 channels": (256, 1, 1),
    "3x3, 256 channels": (256, 1, 3),
    "3x3 depthwise, 384 channels": (384, 384, 3),
    "7x7 depthwise, 192 channels": (192, 192, 7),
    "3x3 in groups of 16, 208 channels": (208, 13, 3),
}
RESULTS = Path(__file__).parents[1] / "docs" / "engine_layers.json"
PAGE, MARKS = RESULTS.with_name("data") / "deploy.md", ("<!-- engine layers -->", "<!-- end -->")
FORMS = ("dense", "gathered", "taps", "tiles", "kernels")


class Layers(nn.Module):
    """Four equal layers in a form; the first input is rows (N, C), for `dense` a map (1, C, H, W)."""

    def __init__(self, form: str, channels: int, groups: int, side: int) -> None:
        super().__init__()
        self.form, self.groups, self.side = form, groups, side
        scale = (channels // groups * side * side) ** -0.5
        self.weights = nn.ParameterList(
            torch.randn(channels, channels // groups, side, side) * scale for _ in range(LAYERS)
        )
        self.bias = nn.Parameter(torch.randn(channels) / 10)

    def forward(self, x: Tensor, table: Tensor, tiles: Tensor, sources: Tensor, shares: Tensor) -> Tensor:
        """Map rows to rows. `table` (N, taps) counts rows, one row outside, and the halo; so do `tiles` (T, reach)."""
        for weight in self.weights:
            x = self.layer(x, weight, table, tiles, sources, shares)
        return x

    def layer(
        self, x: Tensor, weight: Tensor, table: Tensor, tiles: Tensor, sources: Tensor, shares: Tensor
    ) -> Tensor:
        """Compute one layer."""
        if self.form == "dense":
            return F.relu(F.conv2d(x, weight, self.bias, padding=self.side // 2, groups=self.groups))
        if self.side == 1:
            return F.relu(F.linear(x, weight.flatten(1), self.bias))
        if self.form == "kernels":
            flat = weight.flatten(2).permute(2, 1, 0)
            if weight.shape[1] == 1:
                flat = flat.squeeze(1)
            elif self.groups > 1:
                flat = flat.unflatten(2, (self.groups, -1)).transpose(1, 2)
            out: Tensor = torch.ops.cadsurgery.convolve_rows(
                x,
                table.int(),
                sources.int(),
                shares,
                flat.contiguous(),
                self.bias,
                x.new_zeros(1),
                0.0,
                0.0,
                torch.inf,
            )
            return out
        halo = (shares.unsqueeze(1) @ x.index_select(0, sources.flatten()).view(-1, 4, x.shape[1])).squeeze(1)
        rows = torch.cat((x, x.new_zeros(1, x.shape[1]), halo))
        if self.form == "taps":
            seen = rows.index_select(0, table.flatten()).view(1, *table.shape, -1).permute(0, 3, 1, 2)
            found = F.conv2d(seen, weight.flatten(2).unsqueeze(2), self.bias, groups=self.groups)
            return F.relu(found[0, :, :, 0].t())
        if self.form == "gathered":
            return F.relu(self.gathered(rows, table, weight) + self.bias)
        reach = SIDE + self.side - 1
        seen = rows.index_select(0, tiles.flatten()).view(-1, reach, reach, x.shape[1]).permute(0, 3, 1, 2)
        fine = F.conv2d(seen, weight, self.bias, groups=self.groups).permute(0, 2, 3, 1).flatten(0, 2)
        coarse = self.gathered(rows, table[fine.shape[0] :], weight) + self.bias
        return F.relu(torch.cat((fine, coarse)))

    def gathered(self, rows: Tensor, table: Tensor, weight: Tensor) -> Tensor:
        """Gather and multiply, as files without kernels do."""
        outputs = weight.shape[0]
        if self.groups == 1:
            matrix = weight.flatten(2).permute(0, 2, 1).reshape(outputs, -1)
            return F.linear(rows.index_select(0, table.flatten()).view(table.shape[0], -1), matrix)
        taps = weight.flatten(2).unflatten(0, (self.groups, -1))
        out: Tensor | None = None
        for tap, entries in enumerate(table.unbind(1)):
            part = rows.index_select(0, entries)
            if weight.shape[1] == 1:
                part = part * taps[:, 0, 0, tap]
            else:
                part = (part.unflatten(1, (self.groups, 1, -1)) @ taps[..., tap].transpose(1, 2)).flatten(1)
            out = part if out is None else out + part
        assert out is not None
        return out


def inputs_of(channels: int, side: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return a map and, for the same kind of layer on rows, rows, table, tiles, sources and shares.

    Fine patches come first, row by row within a patch.
    """
    torch.manual_seed(0)
    patches = (SIZE[0] // SIDE, SIZE[1] // SIDE)
    count = round(FINE * patches[0] * patches[1])
    order = torch.rand(patches).flatten().argsort()
    fine = torch.zeros(patches[0] * patches[1], dtype=torch.bool)
    fine[order[:count]] = True
    levels = 2 * (~fine).view(1, *patches).long()
    levels = levels.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)
    lattice = Geometry((2, 2), fill="linear").lattice(levels)
    reading = kernel_map(lattice, lattice, Window((side, side), padding=(side // 2,) * 4))
    _, y, x = lattice.coordinates
    is_fine = lattice.level_of_rows == 0
    patch = (y // SIDE) * patches[1] + x // SIDE
    key = patch * SIDE * SIDE + (y % SIDE) * SIDE + x % SIDE + (~is_fine) * lattice.count * 1000
    new = key.argsort()
    old = torch.empty_like(new)
    old[new] = torch.arange(len(new))
    halo = len(reading.sources)
    moved = torch.cat((old, torch.arange(len(new), len(new) + 1 + halo)))
    table, sources = moved[reading.table.long()[new]], moved[reading.sources.long()]
    # A tile of a patch holds what its samples read; they agree on what they share.
    reach = SIDE + side - 1
    tiles = torch.full((count, reach, reach), len(new))
    of_fine = table[: count * SIDE * SIDE].view(count, SIDE, SIDE, side, side)
    for row in range(SIDE):
        for column in range(SIDE):
            tiles[:, row : row + side, column : column + side] = of_fine[:, row, column]
    rows = torch.rand(len(new), channels)
    given = (rows, table, tiles.view(count, -1), sources, reading.mix.float())
    return torch.rand(1, channels, *SIZE), given


def write(module: Layers, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write an ONNX file of the layers."""
    names = ("x", "table", "tiles", "sources", "shares")
    program = torch.export.export(module.eval(), inputs)
    model = translate(
        program, "", custom_translation_table=TABLE, optimize=True, input_names=names, output_names=("y",)
    )
    declare_kernels(model.model)
    model.save(path)


def measure(kind: str, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time all forms of a kind of layer."""
    channels, groups, side = KINDS[kind]
    image, given = inputs_of(channels, side)
    share = len(given[0]) / (SIZE[0] * SIZE[1])
    rows: list[dict[str, Any]] = []
    paths: dict[str, Path] = {}
    expected: Tensor | None = None
    for form in FORMS:
        if side == 1 and form not in ("dense", "gathered"):
            continue
        torch.manual_seed(1)
        module, inputs = (
            Layers(form, channels, groups, side),
            (image if form == "dense" else given[0], *given[1:]),
        )
        paths[form] = make_folder(folder / kind) / f"{form}.onnx"
        write(module, inputs, paths[form])
        found = engine_for("onnx", form == "kernels")(paths[form], 1)(*used(paths[form], inputs))[0]
        if form != "dense":
            expected = found if expected is None else expected
            assert (found - expected).abs().max() < 1e-4 * expected.abs().max(), form
    for precision in ("float32", "int8"):
        for engine in ("onnx", "openvino"):
            calls: dict[str, Callable[[], Any]] = {}
            for form, path in paths.items():
                inputs = used(path, (image if form == "dense" else given[0], *given[1:]))
                run = engine_for(engine, form == "kernels")
                if precision == "int8":
                    of_engine = path.with_name(f"{form}-{engine}.onnx")
                    of_engine.write_bytes(path.read_bytes())
                    path = of_engine
                    with contextlib.suppress(
                        CannotConvert
                    ):  # no product in 8 bits: the file stays in float32
                        to_8_bits(path, run, [inputs])
                calls[form] = partial(run(path, 1), *inputs)
            times = interleaved(calls, rounds=rounds, warmup=2)
            promised = share * times["dense"].best
            for form, timing in times.items():
                of = timing.best / promised if form != "dense" else None
                about = {"kind": kind, "engine": engine, "precision": precision, "form": form}
                rows.append(
                    {**about, "milliseconds": timing.best / LAYERS, "of_promised": of, "share": share}
                )
                print(rows[-1], flush=True)
    return rows


def used(path: Path, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the inputs that a file has kept."""
    kept = [one.name for one in onnx.load(str(path)).graph.input]
    return tuple(inputs[("x", "table", "tiles", "sources", "shares").index(name)] for name in kept)


def write_page(found: dict[str, Any]) -> None:
    """Put the table into docs/data/deploy.md: a row for each kind, engine and precision."""
    lines = [
        f"{found['device']}; torch {found['versions']['torch']}; {found['rounds']} rounds; commit {found['commit']}.\n",
        f"| layer | engine | precision | {' | '.join(FORMS)} | what the work promises |",
        "|---|---|---|" + "---|" * (len(FORMS) + 1),
    ]
    for kind, precision, engine in product(KINDS, ("float32", "int8"), ("onnx", "openvino")):
        same = {"kind": kind, "engine": engine, "precision": precision}
        rows = {row["form"]: row for row in found["rows"] if same.items() <= row.items()}
        if rows:
            cells = [f"{rows[form]['milliseconds']:.1f}" if form in rows else "" for form in FORMS]
            promised = rows["dense"]["milliseconds"] * rows["dense"]["share"]
            words = "ONNX Runtime" if engine == "onnx" else "OpenVINO"
            lines.append(f"| {' | '.join([kind, words, precision, *cells, f'{promised:.1f}'])} |")
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    text = "\n".join(lines)
    with write_whole(PAGE) as temporary:
        temporary.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Measure all kinds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument(
        "--table", action="store_true", help="write the table from docs/engine_layers.json alone"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kinds", default=";".join(KINDS))
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.table:
        write_page(json.loads(RESULTS.read_text(encoding="utf-8")))
        return
    torch.set_num_threads(1)
    rows = [row for kind in options.kinds.split(";") for row in measure(kind, options.folder, options.rounds)]
    if options.write:
        about = {**describe_run(torch.device("cpu")), "rounds": options.rounds, "rows": rows}
        with write_whole(options.write) as temporary:
            temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
