"""The suite says on what it runs, and at the end what it did not run; its cases cover what they say."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace

import pytest
from conftest import covering, in_words, left_out, pytest_report_header, slow, some

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


def test_a_law_keeps_some_of_its_cases_and_the_others_are_slow() -> None:
    plain, marked, *others = some([(1, 2), (3, 4), (5, 6), (7, 8)], every=2, rows=True)
    assert plain == (1, 2) and others[0] == (5, 6)
    assert all(case.values == values for case, values in ((marked, (3, 4)), (others[1], (7, 8))))
    for mark in (mark for case in (marked, others[1]) for mark in case.marks):
        assert mark.name == "thorough" and mark.kwargs == {"few": 3}
    assert [case.values for case in some("abc", every=3)[1:]] == [("b",), ("c",)]


def test_few_leaves_out_what_is_thorough_or_all_but_one_case_of_so_many() -> None:
    def item(name: str, mark: pytest.Mark | None) -> SimpleNamespace:
        return SimpleNamespace(nodeid=name, get_closest_marker=lambda _: mark)

    few = pytest.mark.thorough(few=3).mark
    many = [item(f"tests/a.py::test_tile[{number}]", few) for number in range(9)]
    alone = item("tests/a.py::test_alone", pytest.mark.thorough.mark)
    other, one = item("tests/a.py::test_other", None), item("tests/b.py::test_tile[0]", few)
    out = left_out([*many, alone, other, one])  # type: ignore[list-item]
    assert alone in out and other not in out and one not in out
    assert [case for case in many if case not in out] == many[::3]
