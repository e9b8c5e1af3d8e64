"""Loader of `native.c`: gathering, grouped convolution and pooling on rows in compiled code.

The file is compiled once per machine with the C compiler found there and kept in the user's cache folder. Without a
compiler (or with CADSURGERY_NATIVE=0) `library()` is None and the callers use torch operations, slower for grouped
convolutions and pooling.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cadsurgery.elements.backends.choose import (
    Backend,
    Between,
    Convolution,
    Gathering,
    Mixing,
    MixingLines,
    Picking,
    Pooling,
    Work,
    every_row,
    is_observed,
)
from cadsurgery.elements.backends.choose import (
    mix as mix_rows,
)
from cadsurgery.elements.kernel_map import Reading
from cadsurgery.support.files import cache_folder, is_private, kept_whole

SOURCE = Path(__file__).with_name("native.c")
_HASH = hashlib.sha256().digest_size
LANE_BYTES, PRODUCT_LANES, MOST_TAPS, GROUPS = 64, 4, 128, (1, 2, 4, 8, 16)
_WIDEST = ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()
_FLAGS = ("-O3", "-march=native", *_WIDEST, "-ffp-contract=fast", "-fopenmp", "-fPIC", "-c")
_ELEMENTS = {
    torch.float32: ("float32", "-DELEMENT=float"),
    torch.float64: ("float64", "-DELEMENT=double", "-DWIDE"),
    torch.bfloat16: ("bfloat16", "-DBF16"),
}


class Rows(NamedTuple):
    """Rows that a kernel map's table points into, without ever being put into one tensor.

    Attributes:
        rows: (N, C), the elements.
        halo: (M, C), interpolated rows, or None; entry N + 1 + i reads row i.
        outside: what entry N reads, everywhere the same.
    """

    rows: Tensor
    halo: Tensor | None
    outside: float


class Native(Backend):
    """Compiled code that reads rows where they lie."""

    name = "native"

    def applies(self, work: Work) -> bool:
        """Values alone, of rows that it has a form for."""
        if not work.is_inference or not supported(work.rows):
            return False
        return not isinstance(work, Convolution) or self._has_form(work)

    def _has_form(self, work: Convolution) -> bool:
        weights = work.weights
        if weights.groups > 1:
            return has_grouped(weights.weight, weights.groups)
        # Its weight has to be packed: worth it where that is kept. Where the number of rows follows from the size of
        # the image alone, oneDNN, which makes code for each number, is a little faster; for any other that takes a
        # millisecond and some hundred kilobytes that stay in its caches.
        packed = weights.forms is not None and work.rows.dtype == weights.weight.dtype
        steady = (
            work.is_product
            and isinstance(work.reads, Between)
            and work.reads.target.uniform_level is not None
        )
        return packed and has_product(weights.weight) and not steady

    def convolve(self, work: Convolution) -> Tensor:
        """Rows (N, ..., O)."""
        weights, outputs, residual = work.weights, work.weights.weight.shape[0], work.residual
        if work.is_product:
            rows = work.of_target
            shape = (*rows.shape[:-1], outputs)
            rows = rows.reshape(-1, rows.shape[-1])
            source, table = Rows(rows.contiguous(), None, 0.0), every_row(len(rows), rows.device).table
            residual = residual.reshape(-1, outputs) if residual is not None else None
        else:
            reading = work.reading
            source, table = rows_and_halo(work.rows, reading, work.outside), reading.table
            shape = (len(table), outputs)
        dtype, act = work.rows.dtype, weights.activation
        pack = grouped_weight if weights.groups > 1 else product_weight
        weight, bias = weights.form(("native", dtype), lambda: pack(weights.weight.to(dtype), weights.bias))
        bounds = act.bounds if act is not None else None
        limits = bounds or (-float("inf"), float("inf"))
        if weights.groups > 1:
            out = grouped(source, table, weight, bias, residual, limits)
        else:
            out = product(source, table, weight, bias, residual, outputs, limits)
        return (out if bounds or act is None else act.apply_(out)).view(shape)

    def pool(self, work: Pooling) -> Tensor:
        """Rows (N, C)."""
        reading = work.reads.reading
        out = work.rows.new_empty(reading.table.shape[0], work.rows.shape[1])
        pool(rows_and_halo(work.rows, reading, work.outside), reading.table, out, work.largest)
        return out

    def mix(self, work: Mixing) -> Tensor:
        """Rows (M, C)."""
        return mix(work.rows, work.sources, work.shares)

    def mix_lines(self, work: MixingLines) -> Tensor:
        """(L, M, C)."""
        sources = torch.stack((work.first, work.second), 1).int()
        return mix_lines(work.rows, sources, torch.stack((1 - work.share, work.share), 1))

    def pick(self, work: Picking) -> Tensor:
        """(entries, C)."""
        table, reading = work.reading.table.reshape(-1, 1), work.reading
        out = work.rows.new_empty(len(table), work.rows.shape[1])
        gather_mixing(work.rows, table, reading.sources, reading.mix, out)
        return out

    def gather(self, work: Gathering) -> Callable[[Tensor, Tensor], None]:
        """The function of entries (n, taps) and memory (n * taps, C)."""
        source = rows_and_halo(work.rows, work.reading, work.outside)
        return lambda entries, out: gather(source, entries, out)


def rows_and_halo(rows: Tensor, reading: Reading, outside: float) -> Rows:
    """What compiled code reads: the rows as they are, the halo apart."""
    halo = mix_rows(rows, reading.sources, reading.mix) if reading.sources.shape[0] else None
    return Rows(rows.contiguous(), halo, outside)


class _Reading(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "halo", "outside", "table")),
        *((name, ctypes.c_long) for name in ("count", "n", "taps", "channels")),
    )


def supported(rows: Tensor) -> bool:
    """Whether there is compiled code for these rows; not while torch observes what is called."""
    return (
        not is_observed() and rows.device.type == "cpu" and rows.dtype in _ELEMENTS and library() is not None
    )


def gather(source: Rows, table: Tensor, out: Tensor) -> None:
    """Rows of all taps side by side: `out` (n * taps, C) from a `table` (n, taps) int32."""
    _call("gather", source, table, ctypes.c_void_p(out.data_ptr()))


def grouped(
    source: Rows,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    more: Tensor | None,
    bounds: tuple[float, float],
) -> Tensor:
    """Grouped convolution with as many outputs as inputs: (n, C) = clamp(sum + bias + more).

    Args:
        source: rows.
        table: (n, taps) int32.
        weight: (taps, channels of a group, padded channels) as `grouped_weight` lays it out.
        bias: (padded channels,).
        more: (n, C) or None, a residual.
        bounds: least and largest value of the result.
    """
    out = source.rows.new_empty(table.shape[0], source.rows.shape[1])
    return _convolved("grouped", source, table, weight, bias, more, out, weight.shape[1], bounds)


def product(
    source: Rows,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    more: Tensor | None,
    outputs: int,
    bounds: tuple[float, float],
) -> Tensor:
    """Ungrouped convolution that reads rows where they lie: (n, outputs) = clamp(sum + bias + more).

    Args:
        source: rows, float32 or float64.
        table: (n, taps) int32.
        weight: (chunks, taps, channels, outputs of a chunk) as `product_weight` lays it out.
        bias: (chunks * outputs of a chunk,).
        more: (n, outputs) or None, a residual.
        outputs: channels of the result.
        bounds: least and largest value of the result.
    """
    out = source.rows.new_empty(table.shape[0], outputs)
    return _convolved("product", source, table, weight, bias, more, out, outputs, bounds)


def _convolved(
    name: str,
    source: Rows,
    table: Tensor,
    weight: Tensor,
    bias: Tensor,
    more: Tensor | None,
    out: Tensor,
    size: int,
    bounds: tuple[float, float],
) -> Tensor:
    """`out`, filled; `size` is the number the function of this name asks for besides those of the rows."""
    more = more.contiguous() if more is not None else None
    failed = _call(
        *(name, source, table),
        *(ctypes.c_void_p(value.data_ptr()) for value in (weight, bias)),
        ctypes.c_void_p(more.data_ptr() if more is not None else None),
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_long(size),
        *map(ctypes.c_double, bounds),
    )
    assert not failed, "callers ask has_grouped or has_product first"
    return out


def has_product(weight: Tensor) -> bool:
    """Whether `product` has a form for a kernel (O, C, kh, kw): not in bfloat16, for which oneDNN has instructions."""
    return weight.dtype in (torch.float32, torch.float64)


def product_weight(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution as `product` reads them: chunks of outputs outermost, each tap in one piece."""
    outputs, channels, height, width = weight.shape
    padded = _padded(outputs, weight.dtype)
    kernel = weight.new_zeros(padded, height * width, channels)
    kernel[:outputs] = weight.detach().flatten(2).transpose(1, 2)
    chunk = PRODUCT_LANES * LANE_BYTES // weight.dtype.itemsize
    offset = kernel.new_zeros(padded)
    if bias is not None:
        offset[:outputs] = bias.detach()
    return kernel.view(-1, chunk, height * width, channels).permute(0, 2, 3, 1).contiguous(), offset


def _padded(outputs: int, dtype: torch.dtype) -> int:
    chunk = PRODUCT_LANES * LANE_BYTES // dtype.itemsize
    return -(-outputs // chunk) * chunk


def has_grouped(weight: Tensor, groups: int) -> bool:
    """Whether `grouped` has a form for a kernel (O, C / groups, kh, kw)."""
    out, group, height, width = weight.shape
    lanes = LANE_BYTES // _sum_type(weight.dtype).itemsize
    return out == group * groups and group in GROUPS and group <= lanes and 0 < height * width <= MOST_TAPS


def grouped_weight(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a grouped convolution as `grouped` reads them: taps outermost, channels padded."""
    out, group = weight.shape[:2]
    dtype = _sum_type(weight.dtype)
    lanes = LANE_BYTES // dtype.itemsize
    padded = -(-out // lanes) * lanes
    kernel = weight.new_zeros(weight[0, 0].numel(), group, padded, dtype=dtype)
    kernel[:, :, :out] = weight.detach().flatten(2).permute(2, 1, 0)
    offset = kernel.new_zeros(padded)
    if bias is not None:
        offset[:out] = bias.detach()
    return kernel, offset


def mix(rows: Tensor, sources: Tensor, shares: Tensor) -> Tensor:
    """Weighted sums of rows (N, C): (M, C) from `sources` (M, k) int32 and `shares` (M, k)."""
    out = rows.new_empty(sources.shape[0], rows.shape[1])
    shares = shares.to(_sum_type(rows.dtype)).contiguous()
    source, table = Rows(rows.contiguous(), None, 0.0), sources.contiguous()
    _call("mix", source, table, ctypes.c_void_p(shares.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    return out


def mix_lines(values: Tensor, sources: Tensor, shares: Tensor) -> Tensor:
    """Weighted sums along the lines of a map (L, W, C): (L, M, C) from `sources` (M, 2) int32 and `shares` (M, 2)."""
    lines, width, channels = values.shape
    out = values.new_empty(lines, sources.shape[0], channels)
    shares = shares.to(_sum_type(values.dtype)).contiguous()
    pointers = [ctypes.c_void_p(value.data_ptr()) for value in (shares, out)]
    rows = Rows(values.contiguous().view(lines * width, channels), None, 0.0)
    _call(
        "mix_lines", rows, sources.contiguous(), pointers[0], ctypes.c_long(lines), pointers[1], count=width
    )
    return out


def gather_mixing(rows: Tensor, table: Tensor, sources: Tensor, shares: Tensor, out: Tensor) -> None:
    """`gather` of one tap by a `table` (n, 1), where entry N + 1 + i reads the weighted sum of rows `sources` (M, k)
    by `shares` (M, k), which is made when it is read: for tables that read each about once."""
    shares, sources = shares.to(_sum_type(rows.dtype)).contiguous(), sources.contiguous()
    pointers = [ctypes.c_void_p(value.data_ptr()) for value in (sources, shares)]
    many, result = ctypes.c_long(sources.shape[1]), ctypes.c_void_p(out.data_ptr())
    _call("gather_mixing", Rows(rows.contiguous(), None, 0.0), table, *pointers, many, result)


def pool(source: Rows, table: Tensor, out: Tensor, largest: bool) -> None:
    """The largest value or the sum over the taps: `out` (n, C)."""
    _call("pool", source, table, ctypes.c_void_p(out.data_ptr()), ctypes.c_long(largest))


def _call(name: str, source: Rows, table: Tensor, *arguments: Any, count: int | None = None) -> int:
    rows, halo, outside = source
    beyond = rows.new_full((rows.shape[1],), outside)
    assert rows.is_contiguous() and table.dim() == 2 and table.is_contiguous() and table.dtype == torch.int32
    reading = _Reading(
        *(rows.data_ptr(), halo.data_ptr() if halo is not None else None, beyond.data_ptr()),
        *(table.data_ptr(), rows.shape[0] if count is None else count, *table.shape, rows.shape[1]),
    )
    function = getattr(library(), f"{name}_{_ELEMENTS[rows.dtype][0]}")
    return int(function(ctypes.byref(reading), *arguments))


def _sum_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.bfloat16 else dtype


@cache
def library() -> Any:
    """The compiled code, or None."""
    compiler = shutil.which(os.environ.get("CC", "") or "cc") or shutil.which("gcc")
    if compiler is None or os.environ.get("CADSURGERY_NATIVE", "1") == "0" or platform.system() != "Linux":
        return None
    try:
        folder = cache_folder()
        if folder is None:
            return None
        target = folder / f"native-{_fingerprint(compiler)}.so"
        found = _loaded(target)
        if found is None:
            _build(compiler, target)
            found = _loaded(target)
        return found
    except (OSError, subprocess.SubprocessError):
        return None


def _loaded(path: Path) -> Any:
    """The library of a file, if it is this user's and whole: one that is cut off would end the process, and every
    later one, when it is first used. None otherwise.

    Its last bytes are the hash of all before them. What is loaded is the very file that was looked at, by its
    descriptor, whatever its name stands for by then.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        data = file.read() if is_private(os.fstat(descriptor)) else b""
        if hashlib.sha256(data[:-_HASH]).digest() != data[-_HASH:]:
            return None
        name = f"/proc/self/fd/{descriptor}"
        # OpenMP's symbols are those of torch's own runtime: a second one would compete for the cores.
        return ctypes.CDLL(name if os.path.exists(name) else str(path))


def _build(compiler: str, target: Path) -> None:
    with kept_whole(target) as folder:
        objects = []
        for name, *defines in _ELEMENTS.values():
            objects.append(f"{folder}/{name}.o")
            suffix = f"-DSUFFIX(name)=name##_{name}"
            command = [compiler, *_FLAGS, *defines, suffix, str(SOURCE), "-o", objects[-1]]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        whole = folder / "successor"
        link = [compiler, "-shared", "-nostdlib", "-nostartfiles", *objects, "-o", str(whole)]
        subprocess.run(link, check=True, capture_output=True, timeout=120)
        with whole.open("ab") as file:
            file.write(hashlib.sha256(whole.read_bytes()).digest())


def _fingerprint(compiler: str) -> str:
    """What the compiled code depends on, besides the machine: source, flags, compiler."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=30).stdout
    parts = (SOURCE.read_bytes(), " ".join(_FLAGS).encode(), version)
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
