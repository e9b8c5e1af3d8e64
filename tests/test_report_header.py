"""The suite says on what it runs, and at the end what it did not run; its cases cover what they say."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace

from conftest import covering, in_words, pytest_report_header, slow

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


def test_cases_have_every_pair_of_values_and_the_few_every_plain_value() -> None:
    axes = (range(5), "abc", (True, False), (0.5, slow(1.5)))
    cases = covering(*axes)
    seen = {pair for case in cases for pair in combinations(enumerate(case.values), 2)}
    values = (range(5), "abc", (True, False), (0.5, 1.5))
    assert seen == {pair for case in product(*values) for pair in combinations(enumerate(case), 2)}
    few = [case.values for case in cases if not case.marks]
    assert [set(column) for column in zip(*few, strict=True)] == [{*range(5)}, {*"abc"}, {True, False}, {0.5}]
    assert len(few) == 5 and len(cases) < 25
