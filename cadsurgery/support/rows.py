"""Rows of reports: plain values, measured sides, and the columns that show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from cadsurgery.support.tables import Column

SLOWER = 1.03  # a side counts as slower than another from this ratio of times on


def plain(value: Any) -> Any:
    """Convert a value for JSON: sequences to lists, paths to text, objects by their `to_dict`."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


class Plain:
    """Base of rows and reports: dataclasses that convert to plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        return {("random_weights" if key == "random" else key): plain(v) for key, v in vars(self).items()}


@dataclass(frozen=True, kw_only=True)
class Row(Plain):
    """A measured side: values by name, which are also attributes and fields of the JSON.

    Attributes:
        label: a short name, for pictures.
        values: values by name.
        milliseconds: time for the first image in the best round; None if not measured.
        milliseconds_median: median over the rounds.
        curve: name of the curve that joins this row with others in pictures; empty for none.
    """

    label: str = field(kw_only=False)
    values: Mapping[str, Any] = field(kw_only=False)
    milliseconds: float | None = None
    milliseconds_median: float | None = None
    curve: str = ""

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})  # still missing while a row is copied
        if name in values:
            return values[name]
        raise AttributeError(f"a row of {', '.join(values)} has no {name}.")

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of this name, or the default."""
        return self.values.get(name, default)

    def with_values(self, label: str, **values: Any) -> Self:
        """Return a copy with another label and changed values."""
        return replace(self, label=label, values={**self.values, **values})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for `--json`."""
        times = {name: getattr(self, name) for name in ("milliseconds", "milliseconds_median")}
        return {name: plain(value) for name, value in {**self.values, **times}.items()}


def number(value: float | None, form: str = ".0f") -> str:
    """Format a number; "-" for None."""
    return "-" if value is None else format(value, form)


def percent(share: float | None) -> str:
    """Format a share as a percentage with two digits; "-" for None."""
    return "-" if share is None else f"{100 * share:.2f}"


def ratio(value: float | None, whole: float | None, form: str = ".2f") -> str:
    """Format the ratio of two numbers; "-" if one is missing or `whole` is 0."""
    return "-" if value is None or not whole else format(value / whole, form)


def strides_in_words(pair: tuple[int, int]) -> str:
    """Format a pair of output strides."""
    return "{} to {}".format(*pair)


def accuracy_columns(pixels: str = "pixels") -> tuple[Column[Row], Column[Row]]:
    """Return columns for the mean IoU and, under the title `pixels`, for the pixel accuracy."""
    return quality_column("mIoU", "miou"), Column(pixels, "pixel_accuracy", form=percent)


def quality_column(title: str, name: str) -> Column[Row]:
    """Return a column for a quality, with its standard error over pictures if there is one."""

    def shown(row: Row) -> str:
        error = row.get("errors", {}).get(name)
        return percent(row.get(name)) + ("" if error is None else f" ±{100 * error:.2f}")

    return Column(title, shown)


def macs_columns(of: str, whole: Callable[[Row], Row], form: str = ".2f") -> Iterator[Column[Row]]:
    """Yield columns for the MACs and for their ratio to another row, titled `of ...`."""
    yield Column("MACs", "macs", form=".3e")
    yield Column(f"of {of}", lambda row: ratio(row.macs, whole(row).macs, form))


def time_columns(
    of: str, whole: Callable[[Row], Row], form: str = ".0f", has_median: bool = False
) -> Iterator[Column[Row]]:
    """Yield columns for milliseconds, optionally the median, and the ratio to another row, titled `of ...`."""
    yield Column("ms", "milliseconds", form=form)
    if has_median:
        yield Column("median", "milliseconds_median", form=form)
    yield Column(f"of {of}", lambda row: ratio(row.milliseconds, whole(row).milliseconds))
