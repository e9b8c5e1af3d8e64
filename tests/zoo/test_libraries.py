"""Networks of other libraries: what is compared of one, the list of builders, and the page of the recorded rows."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from benchmarks import libraries_report
from benchmarks.zoo import libraries
from benchmarks.zoo.as_they_are import COMPARISONS, check_as_it_is
from benchmarks.zoo.corpus import Subject
from cadsurgery.tasks.zoo_record import read_rows


class Named(nn.Module):
    """Three strides and a head, and a dictionary as some libraries return it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*[nn.Conv2d(c, 8, 3, 2, 1) for c in (3, 8, 8)])
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, pixel_values: Tensor) -> OrderedDict[str, Tensor]:
        return OrderedDict(logits=self.head(self.stem(pixel_values)))


SUBJECT = Subject("own:named", "own", Named)


@pytest.mark.filterwarnings("ignore")
def test_a_network_is_compared_as_its_users_call_it() -> None:
    row = check_as_it_is(SUBJECT)
    assert row["result"] == "converts" and "needs_example" not in row, row
    assert all(row["compared"][name] < 1e-4 for name in COMPARISONS), row
    assert row["compared"]["float64"] < 1e-9 and 0 < row["floor_share"] < 1


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_built_or_converted_has_a_row_with_the_reason() -> None:
    def fails() -> nn.Module:
        raise OSError("no such file")

    assert check_as_it_is(replace(SUBJECT, build=fails))["why"] == "OSError: no such file"
    refused = check_as_it_is(replace(SUBJECT, build=lambda: nn.Sequential(nn.Linear(4, 4))))
    assert refused["result"] == "refused" and refused["what"] and refused["next"]


def test_a_library_that_is_not_installed_is_skipped_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> libraries.Declared:
        raise ImportError("No module named 'nothing'")

    own = libraries.Library("torch", lambda: {"named": Named, "other": Named})
    monkeypatch.setattr(libraries, "LIBRARIES", {"own": own, "absent": libraries.Library("nothing", absent)})
    subjects, missing = libraries.find_subjects(["own", "absent"], "n*")
    assert [subject.name for subject in subjects] == ["own:named"]
    assert (
        missing == {"absent": "No module named 'nothing'"} and own.version == torch.__version__.split("+")[0]
    )


ROWS = libraries_report.ROWS


@pytest.mark.skipif(not ROWS.exists(), reason="there are no recorded rows")
def test_the_page_is_that_of_the_recorded_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row has the versions it was made with, and the page is generated of these rows."""
    monkeypatch.setattr("benchmarks.zoo_report.DOCS", tmp_path)
    libraries_report.main()
    assert (tmp_path / "libraries.md").read_text() == (ROOT / "docs" / "data" / "libraries.md").read_text()
    rows = read_rows(ROWS)
    assert all(row["versions"] and row["commit"] for row in rows)
    assert max(Counter(row["model"] for row in rows).values()) == 1
