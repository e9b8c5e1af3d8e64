"""The log of a run: one row per step, as CSV or for TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from cadsurgery.support.errors import import_optional
from cadsurgery.support.files import as_file_error, write_whole

_INSTALL = "pip install 'cadsurgery[train]'"
Row = dict[str, float | None]  # None: not measured in this step


def check_packages(log: str) -> None:
    """Refuse to train, with a log of this kind, where a package is missing, before any work.

    Raises:
        NotInstalled: Accelerate or TensorBoard is not installed.
    """
    import_optional("accelerate", "training needs Accelerate.", _INSTALL)
    if log == "tensorboard":
        import_optional("torch.utils.tensorboard", "this log needs TensorBoard.", _INSTALL)


def open_log(kind: str, folder: Path, step: int) -> CsvLog | TensorBoardLog:
    """Open the log of a run and drop rows of later steps.

    Args:
        kind: `csv` or `tensorboard`.
        folder: folder of the run.
        step: last step to keep.

    Raises:
        FileError: the log cannot be read or written.
    """
    return CsvLog(folder / "log.csv", step) if kind == "csv" else TensorBoardLog(folder, step)


class CsvLog:
    """A CSV file; each row is written at once, so that a killed run loses none."""

    def __init__(self, path: Path, step: int) -> None:
        """Keep the rows up to a step, and append after them."""
        self.path = path
        with as_file_error(f"{path} cannot be continued.", "choose another output folder."):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # a killed process may leave half a row
            rows = whole[:1] + [row for row in whole[1:] if int(row.partition(",")[0]) <= step]
            with write_whole(path) as temporary:
                temporary.write_text("".join(rows), encoding="utf-8")
            self._file = path.open("a", newline="", encoding="utf-8")
        self._columns = next(csv.reader(rows[:1]), None)

    def write(self, row: Row) -> None:
        """Write a row; the first one defines the columns, and missing values stay empty."""
        writer = csv.writer(self._file, lineterminator="\n")
        if self._columns is None:
            self._columns = list(row)
            writer.writerow(self._columns)
        writer.writerow([row.get(name) for name in self._columns])
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLog:
    """Scalars for TensorBoard."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continue after a step."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, row: Row) -> None:
        """Write a row."""
        for name, value in row.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Write buffered values and close the file."""
        self._writer.close()
