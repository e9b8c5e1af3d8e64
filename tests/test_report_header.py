"""The suite says on what it runs, and at the end what it did not run."""

from __future__ import annotations

from types import SimpleNamespace

from conftest import in_words, pytest_report_header

from cadsurgery.kernels import isa
from cadsurgery.support.processor import processor


def test_the_suite_says_on_which_processor_and_instruction_sets_it_runs() -> None:
    said = pytest_report_header()
    assert isa.in_words() in said and processor().model in said


def test_the_last_line_says_how_many_were_skipped_and_why() -> None:
    reports = [
        SimpleNamespace(longrepr=("a.py", 1, f"Skipped: {why}")) for why in ("no GPU", "no data", "no GPU")
    ]
    said = in_words({"passed": [None] * 1200, "skipped": reports, "": [None]})
    assert said == "1,200 passed, 3 skipped: 2 since no GPU; 1 since no data"
    assert in_words({"error": [None], "failed": [None, None]}) == "2 failed, 1 error"
    assert in_words({}) == "no tests"
