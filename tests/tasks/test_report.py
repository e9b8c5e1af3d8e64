"""One shape of reports: a new one is a dataclass in one file, and prints, goes into JSON and is drawn as the others."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console, RenderableType
from rich.text import Text

import cadsurgery as cs
from cadsurgery.support.rows import Plain, number, ratio
from cadsurgery.support.tables import Column, table
from cadsurgery.tasks.report import Report, canvas, check_outputs


@dataclass(frozen=True)
class Speed(Plain):
    name: str
    size: tuple[int, int]
    milliseconds: float | None


@dataclass(frozen=True)
class SpeedReport(Report):
    model: str
    random: bool
    file: Path
    rows: tuple[Speed, ...]

    def parts(self) -> Iterator[RenderableType]:
        columns: list[Column[Speed]] = [
            Column("side", lambda row: row.name, False),
            Column("ms", lambda row: number(row.milliseconds, ".1f")),
            Column("of first", lambda row: ratio(row.milliseconds, self.rows[0].milliseconds)),
        ]
        yield Text(f"{self.model}, weights are random", style="bold red" if self.random else "bold")
        yield table(self.rows, columns, "speed", lambda row: "bold" if row.milliseconds else "")

    def figure(self) -> Figure:
        figure = canvas(2, 1)
        figure.subplots().plot([row.milliseconds for row in self.rows])
        return figure


REPORT = SpeedReport("net", True, Path("a/b"), (Speed("one", (2, 3), 4.0), Speed("two", (2, 3), None)))
VALUES = {
    "model": "net",
    "random_weights": True,
    "file": "a/b",
    "rows": [
        {"name": "one", "size": [2, 3], "milliseconds": 4.0},
        {"name": "two", "size": [2, 3], "milliseconds": None},
    ],
}


def test_a_new_report_prints_its_rows() -> None:
    text = str(REPORT)
    console = Console(file=io.StringIO(), width=120)
    console.print(REPORT.render())
    assert text == console.file.getvalue()  # type: ignore[attr-defined]
    assert "net, weights are random" in text
    cells = [
        [cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line
    ]
    assert cells == [["one", "4.0", "1.00"], ["two", "-", "-"]]


@pytest.mark.parametrize("width", [140, 100, 80, 60, 40])
def test_no_terminal_is_so_narrow_that_numbers_are_broken(width: int) -> None:
    numbers = [1.585e6, 0.292, 18.51, 4.25, 123456.7]
    columns: list[Column[str]] = [Column("setting", lambda row: row, False)]
    columns += [
        Column(f"long title {place}", lambda row, value=value: f"{value:.6g}")  # type: ignore[misc]
        for place, value in enumerate(numbers)
    ]
    names = ["all", "edges:threshold=0.95/0.15,dilation=3/11 | budget:fraction=0.3"]
    console = Console(file=io.StringIO(), width=width)
    console.print(table(names, columns, "of several"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    for value in numbers:
        assert len(re.findall(rf"(?<![\d.]){re.escape(f'{value:.6g}')}(?![\d.])", text)) == len(names)
    assert text.count("title") == len(numbers) and re.search(r"\ball\b", text)


def test_a_new_report_is_plain_values_in_a_file_and_a_picture(tmp_path: Path) -> None:
    assert REPORT.to_dict() == VALUES
    REPORT.write(tmp_path / "report.json", tmp_path / "report.png")
    assert json.loads((tmp_path / "report.json").read_text()) == VALUES
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.size == (180, 90)
    REPORT.write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.png"]


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ({"output": Path("nowhere/r.json")}, "no folder nowhere"),
        ({"output": Path(".")}, "is a folder"),
        ({"output": None, "picture": Path("r.txt")}, "does not end like a picture"),
        ({"output": None, "matches": Path("nowhere/m.png")}, "--matches"),
    ],
    ids=["no folder", "a folder", "no picture", "its option"],
)
def test_files_that_cannot_be_written_are_refused_first(paths: dict[str, Path | None], words: str) -> None:
    with pytest.raises(cs.FileError, match=words):
        check_outputs(**paths)
