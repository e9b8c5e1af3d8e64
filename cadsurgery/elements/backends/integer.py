"""8-bit convolutions: unsigned features, signed weights, exact 32-bit sums.

A value v is stored as q with v = (q - zero) scale; calibration chooses these quantisation parameters (`QuantParams`).
Weights are quantised per output channel. Residual, activation and requantisation are applied while the sums are in
registers. The kernels (`kernels/c/int8.c`, `int8_limited.c`, `int8_depthwise.c`) sum exactly on every processor;
torch is their reference, bit for bit.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from cadsurgery.elements.backends.choose import Backend, WindowRead, Work, check_channels, compute, every_row
from cadsurgery.elements.backends.native import (
    ReadingInC,
    RowSource,
    call,
    halo_of,
    kernel_for,
)
from cadsurgery.elements.backends.weights import Activation
from cadsurgery.elements.kernel_map import Reading, rows_of
from cadsurgery.kernels.load import bytes_held, check_code, is_observed, isa_of, library
from cadsurgery.kernels.packing import pack, takes

MOST, LARGEST_WEIGHT = 255, 127
# Largest sum of two 8-bit weights for which the sum of two products with activations in 0..255 fits into 16 bits. x86
# processors without VNNI add two neighbouring products in 16 bits, by vpmaddubsw, which saturates.
LARGEST_PAIR = (1 << 15) // MOST
# How many products of the largest values fit into 32-bit sums.
MOST_PRODUCTS = 2**31 // (MOST * (LARGEST_WEIGHT + 1))
# Activations besides clamps that the kernels apply to sums in registers, as they compute them, in the order of their
# numbers in `kernels/c/int8.h`.
FUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "hardswish": lambda values: values * (values + 3).clamp(0, 6) * _single(1 / 6),
}


class QuantParams(NamedTuple):
    """Quantisation parameters: 8-bit q in 0..255 stands for the value (q - zero) scale.

    Attributes:
        scale: step between two neighbouring values.
        zero: zero point, the q that stands for 0; 0 is always exactly representable.
    """

    scale: float
    zero: int

    @classmethod
    def of_range(cls, low: float, high: float) -> QuantParams:
        """Return parameters for the range from `low` to `high`, extended to contain zero."""
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / MOST or 1.0
        return cls(scale, max(0, min(MOST, round(-low / scale))))

    def quantise(self, values: Tensor) -> Tensor:
        """Round values to the nearest q, ties to even, keeping the memory layout."""
        factor, form = 1 / self.scale, None if is_observed() else isa_of("quantise")
        if not form or values.dtype != torch.float32 or not _is_dense(values):
            exact = values.double() * _single(factor) + self.zero
            return exact.float().round_().clamp_(0, MOST).to(torch.uint8)
        out = torch.empty_like(values, dtype=torch.uint8)
        held = bytes_held(values, out)
        _run(f"quantise_{form}", values, out, values.numel(), factor, float(self.zero), held)
        return out

    def dequantise(self, values: Tensor) -> Tensor:
        """Convert q to float32 values, keeping the memory layout; q may also be fractional, such as means."""
        form = None if is_observed() else isa_of("dequantise")
        if not form or values.dtype != torch.uint8 or not _is_dense(values):
            return values.to(torch.float32, copy=True).sub_(self.zero).mul_(_single(self.scale))
        out = torch.empty_like(values, dtype=torch.float32)
        held = bytes_held(values, out)
        _run(f"dequantise_{form}", values, out, values.numel(), self.scale, float(self.zero), held)
        return out


class Finish(NamedTuple):
    """Constants of the steps from exact sums to results, in single precision: times scale, plus bias, plus residual
    times more; activation; times factor, plus zero (if not folded into the steps before); clamp to low..high.
    """

    offset: Tensor
    scale: Tensor
    bias: Tensor
    more: float
    factor: float
    zero: float
    low: float
    high: float


@dataclass
class IntegerWeights:
    """Weight (O, C / groups, kh, kw) in -127..127, and the parameters that convert its sums to results.

    Attributes:
        weight: int8.
        scale: (O,), scale of the weight per output channel.
        bias: (O,) or None.
        groups: channel groups.
        activation: applied last, after the residual.
        source: quantisation parameters of the rows.
        more: quantisation parameters of an 8-bit residual; None for a float32 residual.
        out: quantisation parameters of the result; None for float32.
        packed_cache: packed weights and constants computed so far.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    groups: int
    activation: Activation | None
    source: QuantParams
    more: QuantParams | None = None
    out: QuantParams | None = None
    packed_cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_fused(self) -> bool:
        """True if backends can fuse the activation."""
        return can_apply(self.activation)

    @property
    def number_of_activation(self) -> int:
        """Number of the activation in the kernels; 0 for none or a clamp."""
        is_clamp = self.activation is None or self.activation.bounds is not None
        return 0 if is_clamp else 1 + list(FUSED).index(self.activation.name)  # type: ignore[union-attr]

    @property
    def is_depthwise(self) -> bool:
        """True if the convolution is depthwise and its result is 8-bit."""
        return self.groups > 1 and self.weight.shape[:2] == (self.groups, 1) and self.out is not None

    def form_on(self, isa: str) -> str:
        """Return the form of `convolve` for an instruction set: the one for limited weights (`int8_limited.c`), if it
        takes these."""
        if ("form", isa) not in self.packed_cache:
            limited = f"limited_{isa}"
            is_taken = _has(f"convolve_{limited}") and self.fits(f"convolve_{limited}")
            self.packed_cache["form", isa] = limited if is_taken else isa
        return str(self.packed_cache["form", isa])

    def fits(self, form: str) -> bool:
        """Return True if a form of a kernel takes the weight."""
        if ("fits", form) not in self.packed_cache:
            self.packed_cache["fits", form] = takes(form, self.weight, self.groups)
        return bool(self.packed_cache["fits", form])

    @property
    def constants(self) -> Finish:
        """Constants of the steps from sums to results."""
        if "constants" not in self.packed_cache:
            self.packed_cache["constants"] = self._make_constants()
        finish: Finish = self.packed_cache["constants"]
        return finish

    def _make_constants(self) -> Finish:
        offset = -self.source.zero * self.weight.flatten(1).sum(1, dtype=torch.int32)
        scale = self.scale.double() * self.source.scale
        bias = self.bias.double() if self.bias is not None else torch.zeros_like(scale)
        more = 1.0 if self.more is None else self.more.scale
        if self.more is not None:
            bias = bias - self.more.scale * self.more.zero
        bounds = self.activation.bounds if self.activation is not None else None
        low, high = bounds or (-math.inf, math.inf)
        step, zero = self.out or (1.0, 0)
        factor, shift = 1.0, 0.0
        if self.activation is not None and bounds is None:  # a factor cannot be moved through this activation
            factor, shift = 1 / step, float(zero)
        else:
            scale, bias, more = scale / step, bias / step + zero, more / step
            low, high = low / step + zero, high / step + zero
        if self.out is not None:
            low, high = (float(min(max(end, 0), MOST)) for end in (low, high))
            low, high = float(round(low)), float(round(high))
        return Finish(offset, scale.float(), bias.float(), _single(more), _single(factor), shift, low, high)

    @property
    def without_activation(self) -> IntegerWeights:
        """The same convolution without activation and requantisation, with a float32 result."""
        if "alone" not in self.packed_cache:
            self.packed_cache["alone"] = replace(self, activation=None, more=None, out=None, packed_cache={})
        weights: IntegerWeights = self.packed_cache["alone"]
        return weights

    def add(self, product: Tensor, residual: Tensor | None) -> Tensor:
        """Add a residual to a float32 product (in place), apply the activation, and quantise the result."""
        if residual is not None:
            product.add_(residual if self.more is None else self.more.dequantise(residual))
        product = product if self.activation is None else self.activation.apply_(product)
        return product if self.out is None else self.out.quantise(product)

    def finish(self, sums: Tensor, residual: Tensor | None) -> Tensor:
        """Convert int32 sums (n, O) to result rows: the reference of the compiled code. Results agree bit for bit if
        the code uses fused multiply-add, whose rounding is known."""
        known = self.constants
        value = _multiply_add((sums + known.offset).float(), known.scale, known.bias)
        if residual is not None:
            value = _multiply_add(residual.float(), known.more, value)
        if self.activation is not None and self.activation.bounds is None:
            value = FUSED[self.activation.name](value)
            value = _multiply_add(value, known.factor, known.zero)
        value = value.clamp_(known.low, known.high)
        return value if self.out is None else value.round_().to(torch.uint8)

    def packed(self, form: str) -> tuple[Tensor, ...]:
        """Return the memory of the weight and its constants, packed by a form of a kernel that takes it."""
        if ("packed", form) not in self.packed_cache:
            offset, scale, bias = self.constants[:3]
            constants = (offset.float(),) if form.startswith("grouped") else (offset, scale, bias)
            self.packed_cache["packed", form] = pack(form, self.weight, self.groups, *constants)
        memory: tuple[Tensor, ...] = self.packed_cache["packed", form]
        return memory


@dataclass(frozen=True, eq=False)
class IntegerConvolution(Work):
    """A convolution of 8-bit rows (N, C), see `IntegerWeights`: result rows (N_target, O) in 8 bits or float32.

    Attributes:
        weights: weight, and the parameters that convert its sums to results.
        reads: the lattices and the window; or a reading; or None for a product of the unchanged rows.
        residual: rows of the result's shape, in 8 bits or float32 as the weights specify, or None.
    """

    weights: IntegerWeights
    reads: WindowRead | Reading | None
    residual: Tensor | None = None
    task: ClassVar[str] = "convolve_integers"

    def check(self) -> None:
        """Refuse rows of other channels than the weight's, or of another lattice; see `Work.check`."""
        check_channels(self.rows.shape[-1], self.weights.weight.shape[1] * self.weights.groups)
        super().check()

    @property
    def is_product(self) -> bool:
        """True if the convolution is a product of the unchanged rows."""
        if not isinstance(self.reads, WindowRead):
            return self.reads is None
        return self.reads.window.is_pointwise and rows_of(self.reads.source, self.reads.target) is None

    @property
    def reading(self) -> Reading:
        """The reading of the input rows."""
        return every_row(self.rows.shape[0], self.rows.device) if self.reads is None else self.reads.reading


def convolve(work: IntegerConvolution) -> Tensor:
    """Compute rows (N, O); an activation that backends cannot fuse needs another pass in float32."""
    if work.weights.is_fused:
        return compute(work)
    product = compute(replace(work, weights=work.weights.without_activation, residual=None))
    return work.weights.add(product, work.residual)


class Integers(Backend):
    """Compiled code for 8-bit rows, using the fastest instruction set of the processor."""

    name = "integers"

    def applies(self, work: IntegerConvolution) -> bool:
        """Return True if the compiled code is available and torch does not trace or count operations."""
        is_here = work.rows.device.type == "cpu" and form_here() is not None
        return is_here and work.is_inference and not is_observed()

    def convolve_integers(self, work: IntegerConvolution, form: str = "") -> Tensor:
        """Compute rows (N, O) with the given form of the compiled code, or the fastest."""
        weights, known = work.weights, work.weights.constants
        outputs, inputs = weights.weight.shape[:2]
        reading = None if work.is_product and inputs > 1 else work.reading
        size = (len(work.rows), 1) if reading is None else reading.table.shape
        dtype = torch.float32 if weights.out is None else torch.uint8
        out = torch.empty(size[0], outputs, dtype=dtype)
        residual = work.residual.contiguous() if work.residual is not None else None
        name = self._form(work, form)
        memory = weights.packed(name)
        if name.startswith("grouped"):
            assert reading is not None
            source = RowSource(work.rows, halo_of(work.rows, reading), weights.source.zero)
            arguments = (*memory, known.scale, known.bias, None, out, 1, known.low, known.high)
            call(kernel_for("grouped", work.rows), source, reading.table, *arguments)
            return out
        is_depthwise = name.startswith("depthwise")
        rows = work.rows if work.rows.stride(1) == 1 else work.rows.contiguous()  # rows may overlap
        halo = halo_of(rows, reading) if reading is not None else None
        beyond = rows.new_full((rows.shape[1],), weights.source.zero)
        weight, offset, scale, bias = memory
        table = reading.table if reading is not None else None
        held = bytes_held(rows, halo, beyond, table, *memory, residual, out)
        held[0] = ((len(rows) - 1) * rows.stride(0) + rows.shape[1]) if len(rows) else 0  # rows may overlap
        read = ReadingInC(
            *(rows.data_ptr(), halo.data_ptr() if halo is not None else None, beyond.data_ptr()),
            table.data_ptr() if table is not None else None,
            *(rows.shape[0], *size, outputs if is_depthwise else inputs, rows.stride(0)),
            ctypes.addressof(held),
        )
        more = residual.data_ptr() if residual is not None else None
        result = _Result(
            *(offset.data_ptr(), scale.data_ptr(), bias.data_ptr(), more, out.data_ptr(), outputs),
            *(weights.more is not None, weights.out is not None),
            weights.number_of_activation,
            *known[3:],
        )
        groups = () if is_depthwise else (weights.groups,)
        if len(out):
            _run(name, ctypes.byref(read), ctypes.byref(result), weight, *groups)
        return out

    @staticmethod
    def _form(work: IntegerConvolution, isa: str) -> str:
        """Return the form of the kernel that computes a work, of an instruction set or the fastest."""
        weights = work.weights
        if weights.is_depthwise and work.residual is None:
            depthwise = f"depthwise_{isa or isa_of('depthwise')}"
            if _has(depthwise) and weights.fits(depthwise):
                return depthwise
            grouped = f"grouped_uint8_{isa_of('grouped', 'uint8')}"
            if not isa and weights.number_of_activation == 0 and weights.fits(grouped):
                return grouped
        return f"convolve_{isa or weights.form_on(form_here() or '')}"


def can_apply(activation: Activation | None) -> bool:
    """Return True if backends can apply an activation to sums while they are in registers."""
    return activation is None or activation.bounds is not None or activation.name in FUSED


def to_lines(image: Tensor, memory: Tensor, padding: tuple[int, int]) -> None:
    """Write an 8-bit map (B, C, H, W) of up to four channels to memory as pixels of four bytes, with padding around
    each image."""
    form, (batch, channels, height, width) = None if is_observed() else isa_of("lines"), image.shape
    if form:
        image = image if _is_dense(image) else image.contiguous()
        apart, step = (height * width, 1) if image.is_contiguous() else (1, channels)
        _run(f"lines_{form}", image, memory, *image.shape, apart, step, *padding, bytes_held(image, memory))
        return
    size = batch, height + 2 * padding[0], width + 2 * padding[1], 4
    inner = memory[: math.prod(size)].view(size)[:, padding[0] :, padding[1] :]
    inner[:, :height, :width, :channels] = image.permute(0, 2, 3, 1)


class _Result(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offset", "scale", "bias", "more", "out")),
        *((name, ctypes.c_long) for name in ("outputs", "more_is_8_bits", "out_is_8_bits", "activation")),
        *((name, ctypes.c_float) for name in ("more_scale", "factor", "zero", "low", "high")),
    )


def form_here() -> str | None:
    """Return the widest instruction set that the 8-bit kernels can use, or None."""
    return isa_of("convolve") or None


def _has(symbol: str) -> bool:
    compiled = library()
    return compiled is not None and hasattr(compiled, symbol)


def _run(form: str, *arguments: Any) -> None:
    """Call a form of an 8-bit kernel.

    Raises:
        MemoryError, CadError: see `check_code`.
    """
    kernel = getattr(library(), form)
    kernel.restype = ctypes.c_long
    check_code(kernel(*map(_for_c, arguments)), form)


def _for_c(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_long(value) if isinstance(value, int) else value


def _single(value: float) -> float:
    """Round a number to single precision."""
    return float(torch.tensor(value, dtype=torch.float32))


def _multiply_add(value: Tensor, factor: Tensor | float, shift: Tensor | float) -> Tensor:
    """Compute value * factor + shift in float32 with a single rounding; in float64 the product is exact."""
    wide = factor.double() if isinstance(factor, Tensor) else factor
    return (value.double() * wide + shift).float()


def _is_dense(values: Tensor) -> bool:
    """Return True if values are contiguous in memory, in ordinary or channels_last order."""
    return values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)
