"""Call every compiled function with buffers and numbers that do not fit, and see that none reads or writes beyond them.

    python fuzz.py LIBRARY SEED CALLS

Each buffer ends where a page begins that nothing may touch, so a process that reads or writes behind one is ended. A
call with numbers that fit must compute; with a buffer that is far too short it must refuse; with other numbers it must
refuse, or stay within. Prints the number of calls of each function.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, NamedTuple

FITS, REFUSED, HALO, OWN = 0, -1, 1, 4
SIZES = {"float32": (4, 4), "float64": (8, 8), "bfloat16": (2, 4), "uint8": (1, 4)}  # of elements and of sums
KINDS = (
    *(
        "product",
        "grouped",
        "depthwise",
        "convolve",
        "mix",
        "gather_mixing",
        "mix_lines",
        "pool",
        "fill",
    ),
    *("find_cells", "shift_taps", "invert"),
)

libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
mapped: list[tuple[int, int]] = []


def memory(length: int) -> int:
    """Memory of zeros that ends at a page which nothing may touch."""
    page = mmap.PAGESIZE
    usable = -(-max(length, 1) // page) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    begin = libc.mmap(None, usable + page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert begin and libc.mprotect(begin + usable, page, 0) == 0
    mapped.append((begin, usable + page))
    return int(begin) + usable - length


def free() -> None:
    while mapped:
        libc.munmap(*mapped.pop())


def whole(values: list[int], kind: Any) -> bytes:
    return bytes((kind * len(values))(*values))


def structure(pointers: int, names: tuple[str, ...]) -> type[ctypes.Structure]:
    """A structure of so many pointers, numbers, and the bytes that its buffers hold."""
    fields = [(f"pointer {i}", ctypes.c_void_p) for i in range(pointers)]
    fields += [(one, ctypes.c_long) for one in names]
    return type("Structure", (ctypes.Structure,), {"_fields_": [*fields, ("held", ctypes.c_void_p)]})


class Reading(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("rows", "halo", "outside", "table")),
        *((name, ctypes.c_long) for name in ("count", "n", "taps", "channels", "stride")),
        ("held", ctypes.c_void_p),
    )


class Result(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("offset", "scale", "bias", "more", "out")),
        ("outputs", ctypes.c_long),
        *((name, ctypes.c_float) for name in ("more_scale", "low", "high")),
    )


class Unpacked(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_long) for name in ("groups", "outputs", "channels", "taps")),
        *((f"next_{name}", ctypes.c_long) for name in ("group", "output", "channel", "tap")),
        ("held", ctypes.c_void_p),
    )


class Case(NamedTuple):
    """A call that fits.

    Attributes:
        buffers: length in bytes of each buffer, 0 for a missing one, or its content.
        numbers: numbers of the call, which are changed, too.
        run: calls the function with pointers, numbers and bytes held.
    """

    buffers: list[int | bytes]
    numbers: dict[str, int]
    run: Callable[[list[int | None], dict[str, int], Any], int]


class Kernels:
    def __init__(self, path: str, seed: int) -> None:
        self.library, self.draw = ctypes.CDLL(path), random.Random(seed)

    def number(self, most: int) -> int:
        return self.draw.randint(1, most)

    def function(self, name: str) -> Any:
        found = getattr(self.library, name)
        found.restype = ctypes.c_long
        return found

    # -- what every reading and every structure has

    def by_reading(
        self, buffers: list[int | bytes], numbers: dict[str, int], call: Any, groups: int = 1
    ) -> Case:
        """A case whose first buffers and numbers are a reading's; `call` passes the others. Channels are counted by
        group."""

        def run(at: list[int | None], values: dict[str, int], held: Any) -> int:
            parts = [values[name] for name in ("count", "n", "taps", "channels", "stride")]
            parts[3] //= groups
            reading = Reading(*at[:OWN], *parts, ctypes.addressof(held))
            return int(call(ctypes.byref(reading), [ctypes.c_void_p(one) for one in at[OWN:]], values))

        return Case(buffers, numbers, run)

    def reading(
        self,
        form: str,
        channels: int,
        taps: int,
        own: Callable[[int, int], list[int]],
        numbers: dict[str, int],
        call: Any,
        groups: int = 1,
    ) -> Case:
        """A case of a function of a reading; `own` tells the lengths of its own buffers by outputs and halo."""
        size, _ = SIZES[form]
        count, n, halo = self.number(9), self.number(40), self.draw.randint(0, 3)
        table = [self.draw.randint(0, count + halo) for _ in range(n * taps)]
        buffers: list[int | bytes] = [count * channels * size, halo * channels * size, channels * size]
        buffers += [whole(table, ctypes.c_int32), *own(n, halo)]
        numbers = {"n": n, "count": count, "taps": taps, "stride": channels, "channels": channels, **numbers}
        return self.by_reading(buffers, numbers, call, groups)

    def by_structure(
        self, name: str, buffers: list[int | bytes], numbers: dict[str, int], *more: Any
    ) -> Case:
        """A case of a function of one structure, and of `more`; some return a count."""
        kernel, kind = self.function(name), structure(len(buffers), tuple(numbers))

        def run(at: list[int | None], values: dict[str, int], held: Any) -> int:
            made = kind(*at, *values.values(), ctypes.addressof(held))
            return min(int(kernel(ctypes.byref(made), *more)), FITS)

        return Case(buffers, numbers, run)

    def packed(
        self, name: str, form: str, groups: int, outputs: int, channels: int, taps: int, constants: int
    ) -> tuple[int, int] | None:
        """Bytes of packed weights, and of one array of constants; None if the form does not take such weights."""
        pack, size = self.function(f"pack_{name}"), 1 if form == "uint8" else SIZES[form][0]
        weights = outputs * channels * taps
        held = (ctypes.c_long * 5)(groups * weights * size)
        steps = (weights, channels * taps, taps, 1)
        data = memory(groups * weights * size)
        unpacked = Unpacked(data, groups, outputs, channels, taps, *steps, ctypes.addressof(held))
        bytes_of_all, arrays = ctypes.c_long(), (ctypes.c_void_p * 4)()
        first = pack(ctypes.byref(unpacked), arrays, None, ctypes.byref(bytes_of_all))
        return None if first < 0 else (first, (bytes_of_all.value - first) // constants)

    # -- the functions

    def product(self, name: str, form: str) -> Case | None:
        groups, outputs, channels, taps = self.number(3), self.number(40), self.number(20), self.number(10)
        return self.convolution(
            name, form, groups, outputs, channels, channels * groups, taps, (groups, outputs)
        )

    def grouped(self, name: str, form: str) -> Case | None:
        group = self.draw.choice([1, 2, 4, 8])
        groups = 1 + self.number(30)
        return self.convolution(name, form, groups, group, group, group * groups, self.number(10), (group,))

    def depthwise(self, name: str, form: str) -> Case | None:
        if form != "bfloat16":
            return self.depthwise_in_8_bits(name)
        groups = 1 + self.number(99)
        return self.convolution(name, form, groups, 1, 1, groups, self.number(10), ())

    def convolution(
        self,
        name: str,
        form: str,
        groups: int,
        outputs: int,
        channels: int,
        wide: int,
        taps: int,
        more: tuple[int, ...],
    ) -> Case | None:
        found = self.packed(name, form, groups, outputs, channels, taps, 1)
        if found is None:
            return None
        (size, of_sum), every = SIZES[form], groups * outputs
        kernel, is_product, is_grouped = self.function(name), len(more) == 2, len(more) == 1
        has_factors, has_more = self.draw.random() < 0.5, self.draw.random() < 0.5
        factors = [every * of_sum * has_factors] * 2 if is_grouped else []

        def own(n: int, halo: int) -> list[int]:
            return [*found, *factors, n * every * size * has_more, n * every * size]

        def call(reading: Any, at: list[Any], values: dict[str, int]) -> int:
            numbers = [ctypes.c_long(values[f"number {i}"]) for i in range(len(more))]
            return int(kernel(reading, *at, *numbers, ctypes.c_double(-1e30), ctypes.c_double(1e30)))

        named = {f"number {i}": value for i, value in enumerate(more)}
        return self.reading(form, wide, taps, own, named, call, groups if is_product else 1)

    def in_8_bits(
        self, name: str, groups: int, outputs: int, channels: int, taps: int, wide: int, more: bool
    ) -> Case | None:
        found = self.packed(name, "uint8", groups, outputs, channels, taps, 3)
        if found is None:
            return None
        every, has_groups = groups * outputs, wide != groups or channels > 1
        (weights, array), kernel = found, self.function(name)

        def own(n: int, halo: int) -> list[int]:
            return [weights, array, array, array, n * every * more, n * every]

        def call(reading: Any, at: list[Any], values: dict[str, int]) -> int:
            weight, *constants, residual, out = at
            result = Result(*constants, residual, out, values["outputs"], 1, 0, 255)
            groups_in_c = (ctypes.c_long(values["groups"]),) if has_groups else ()
            return int(kernel(reading, ctypes.byref(result), weight, *groups_in_c))

        numbers = {"outputs": every, "groups": groups}
        return self.reading("uint8", wide, taps, own, numbers, call, groups if has_groups else 1)

    def convolve(self, name: str, form: str) -> Case | None:
        groups, channels = self.number(3), 1 + self.number(20)
        return self.in_8_bits(
            name,
            groups,
            self.number(70),
            channels,
            self.number(10),
            groups * channels,
            self.draw.random() < 0.5,
        )

    def depthwise_in_8_bits(self, name: str) -> Case | None:
        groups = 1 + self.number(99)
        return self.in_8_bits(name, groups, 1, 1, self.number(30), groups, False)

    def simple(
        self, name: str, form: str, taps: int, own: Callable[[int, int], list[int]], *numbers: int
    ) -> Case:
        """A case of a function that takes its own buffers, then numbers; `own` tells the buffers' lengths."""
        channels, kernel = self.number(40), self.function(name)
        named = {f"number {i}": value for i, value in enumerate(numbers)}

        def call(reading: Any, at: list[Any], values: dict[str, int]) -> int:
            return int(kernel(reading, *at, *(ctypes.c_long(values[key]) for key in named)))

        return self.reading(form, channels, taps, lambda n, halo: own(n, channels), named, call)

    def pool(self, name: str, form: str) -> Case:
        size = SIZES[form][0]
        return self.simple(name, form, self.number(9), lambda n, channels: [n * channels * size], 1)

    def mix(self, name: str, form: str) -> Case:
        (size, of_sum), taps = SIZES[form], self.number(9)
        return self.simple(name, form, taps, lambda n, channels: [n * taps * of_sum, n * channels * size])

    def gather_mixing(self, name: str, form: str) -> Case:
        (size, of_sum), many, kernel = SIZES[form], self.number(5), self.function(name)
        channels = self.number(40)

        def own(n: int, halo: int) -> list[int]:
            return [halo * many * 4, halo * many * of_sum, n * channels * size]

        def call(reading: Any, at: list[Any], values: dict[str, int]) -> int:
            return int(kernel(reading, *at[:2], ctypes.c_long(values["many"]), at[2]))

        return self.reading(form, channels, 1, own, {"many": many}, call)

    def mix_lines(self, name: str, form: str) -> Case:
        (size, of_sum), kernel = SIZES[form], self.function(name)
        lines, channels, count, n = self.number(4), self.number(40), self.number(9), self.number(9)
        table = whole([self.draw.randrange(count) for _ in range(2 * n)], ctypes.c_int32)
        buffers = [lines * count * channels * size, 0, 0, table, 2 * n * of_sum, lines * n * channels * size]
        numbers = {"n": n, "count": count, "taps": 2, "channels": channels, "stride": channels}

        def call(reading: Any, at: list[Any], values: dict[str, int]) -> int:
            return int(kernel(reading, at[0], ctypes.c_long(values["lines"]), at[1]))

        return self.by_reading(buffers, {**numbers, "lines": lines}, call)

    def fill(self, name: str, form: str) -> Case:
        (size, of_sum), channels, kernel = SIZES[form], self.number(40), self.function(name)
        side, height, width, batch = (
            self.draw.choice([1, 3, 5, 7]),
            self.number(6),
            self.number(6),
            self.number(2),
        )
        pixels, n = batch * height * width, self.number(9)
        table = whole([self.draw.randrange(pixels) for _ in range(n)], ctypes.c_int32)
        whole_rows = whole([*range(pixels)], ctypes.c_int32)
        buffers = [pixels * channels * size, 0, channels * size, table, pixels, whole_rows, pixels * of_sum]
        buffers += [side * side * of_sum, channels * size, n * channels * size, n * channels * size]
        numbers = {"n": n, "count": pixels, "taps": 1, "channels": channels, "stride": channels}
        numbers |= {"side": side, "height": height, "width": width}

        def call(reading: Any, at: list[Any], values: dict[str, int]) -> int:
            there, index, shares, weight, floor, more, out = at
            numbers = (ctypes.c_long(values[key]) for key in ("side", "height", "width"))
            least, ends = ctypes.c_double(0.1), (ctypes.c_double(-1e30), ctypes.c_double(1e30))
            arguments = (there, index, shares, weight, *numbers, least, floor, more, out, *ends)
            return int(kernel(reading, *arguments))

        return self.by_reading(buffers, numbers, call)

    def find_cells(self, name: str, form: str) -> Case:
        batch, height, width = self.number(2), self.number(9), self.number(9)
        pixels = batch * height * width
        levels = bytes([self.draw.choice([0, 1])]) * pixels
        buffers = [levels, whole([1, 2], ctypes.c_int64), 8 * pixels, 4 * pixels, 8 * batch]
        return self.by_structure(name, buffers, {"batch": batch, "height": height, "width": width})

    def shift_taps(self, name: str, form: str) -> Case:
        """With cells of one pixel."""
        batch, height, width = self.number(2), self.number(9), self.number(9)
        pixels, down, across = batch * height * width, self.number(3), self.number(3)
        own, in_rows = (whole([*range(pixels)], kind) for kind in (ctypes.c_int64, ctypes.c_int32))
        steps = [
            whole([self.draw.randint(-2, 2) for _ in range(many)], ctypes.c_int64) for many in (down, across)
        ]
        buffers = [in_rows, own, bytes(pixels), whole([1], ctypes.c_int64), own, *steps]
        buffers += [pixels * down * across * 4, pixels * 4, batch * height * 4, 0, 0]
        numbers = {"pixels": pixels, "count": pixels, "n": pixels, "height": height, "width": width}
        numbers |= {"target_height": height, "target_width": width, "vertical": down, "horizontal": across}
        return self.by_structure(name, buffers, {**numbers, "has_halo": self.draw.randrange(2)})

    def invert(self, name: str, form: str) -> Case:
        size = SIZES[form][0]
        batch, n, m, h, w, height, width = (1 + self.number(most) for most in (1, 4, 4, 4, 4, 9, 9))
        buffers = [batch * n * m * 2 * size, batch * h * w * 2 * size, batch * (n - 1) * (m - 1) * 16]
        buffers += [h - 1, w - 1, 2 * batch * height * width * size]
        numbers = {"batch": batch, "n": n, "m": m, "h": h, "w": w, "height": height, "width": width}
        return self.by_structure(name, buffers, numbers, ctypes.c_double(0.5))

    def pack(self, name: str, form: str) -> Case | None:
        groups, outputs, channels, taps = self.number(3), self.number(9), self.number(9), self.number(9)
        size = 1 if form == "uint8" else SIZES[form][0]
        kernel, count = self.function(name), 3 if form == "uint8" and "grouped" not in name else 1
        every = groups * outputs
        steps = (outputs * channels * taps, channels * taps, taps, 1)
        needed, none = ctypes.c_long(), (ctypes.c_void_p * 4)()
        unpacked = Unpacked(
            memory(every * channels * taps * size), groups, outputs, channels, taps, *steps, None
        )
        if kernel(ctypes.byref(unpacked), none, None, ctypes.byref(needed)) < 0:
            return None
        of_sum = 4 if form == "uint8" else SIZES[form][1]
        buffers: list[int | bytes] = [every * channels * taps * size, *[every * of_sum] * count, needed.value]

        def run(at: list[int | None], values: dict[str, int], held: Any) -> int:
            data, *constants, to = at
            numbers = [values[key] for key in ("groups", "outputs", "channels", "taps")]
            made = Unpacked(data, *numbers, *steps, ctypes.addressof(held))
            arrays, capacity = (ctypes.c_void_p * 4)(*constants), ctypes.c_long(held[len(at) - 1])
            return (
                FITS
                if kernel(ctypes.byref(made), arrays, ctypes.c_void_p(to), ctypes.byref(capacity)) >= 0
                else REFUSED
            )

        return Case(buffers, {"groups": groups, "outputs": outputs, "channels": channels, "taps": taps}, run)

    # -- calls

    def cases(self) -> list[tuple[str, Callable[[], Case | None]]]:
        """The forms of all functions that this processor runs, with what makes a case of each."""
        from cadsurgery.kernels import isa

        found = []
        for kind, form, name in product(KINDS, ("", *SIZES), isa.here()):
            for prefix, limited in product(("pack_", ""), ("", "limited")):
                symbol = prefix + "_".join(part for part in (kind, form, limited, name) if part)
                if hasattr(self.library, symbol):
                    make = self.pack if prefix else getattr(self, kind)
                    found.append((symbol, partial(make, symbol, form or "uint8")))
        return found

    def try_call(self, case: Case, numbers: dict[str, int], short: int | None = None, by: int = 0) -> int:
        """Call with other numbers, or with a buffer that is shorter by so many bytes."""
        held, at = (ctypes.c_long * (len(case.buffers) + 4))(), []
        for place, buffer in enumerate(case.buffers):
            content = buffer if isinstance(buffer, bytes) else None
            length = len(content) if content is not None else int(buffer)  # type: ignore[arg-type]
            length -= by if place == short else 0
            held[place] = length
            at.append(memory(length) if length else None)
            if content is not None and length:
                ctypes.memmove(at[-1], content, length)
        return case.run(at, numbers, held)

    def check(self, name: str, case: Case) -> None:
        assert self.try_call(case, case.numbers) == FITS, f"{name} refuses {case.numbers}"
        unread = next((places for start, places in UNREAD.items() if name.startswith(start)), ())
        for place, buffer in enumerate(case.buffers):
            length = len(buffer) if isinstance(buffer, bytes) else buffer
            if length < 2 or place == HALO:
                continue
            self.try_call(case, case.numbers, place, by=1)  # weights are padded: the last bytes may be unread
            code = self.try_call(case, case.numbers, place, by=length - min(length // 2, 8))
            is_taken = code == FITS and place not in unread
            assert not is_taken, f"{name} takes a buffer {place} that is too short: {case.numbers}"
        for key, value in case.numbers.items():
            if key == "count":  # a table names rows up to the true count: see `Work.check`
                others = [value + 1, value + 1000]
            else:
                others = [0, -1, value + 1, 2 * value + 3, 1 << 20, 1 << 40, (1 << 62) + 1]
            for other in others:
                self.try_call(case, {**case.numbers, key: other})  # computes within, or refuses


# Buffers that a function reads as far as its tables say, by the beginning of its name: a call may do with less.
UNREAD = {
    **{"find_cells": (1,), "shift_taps": (1, 2, 3, 8, 9), "fill": (0, 4, 5, 6), "gather_mixing": (4, 5)},
}


def main() -> None:
    kernels = Kernels(sys.argv[1], int(sys.argv[2]))
    done = Counter[str]()
    for name, make in kernels.cases():
        for _ in range(int(sys.argv[3])):
            print(name, end="", flush=True, file=sys.stderr)  # the last one before a process that is ended
            case = make()
            if case is not None:
                kernels.check(name, case)
                done[name] += 1
            print(f"\r{' ' * 50}\r", end="", file=sys.stderr)
            free()
    for name, count in sorted(done.items()):
        print(name, count)


if __name__ == "__main__":
    main()
