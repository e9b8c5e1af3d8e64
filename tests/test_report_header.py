"""The suite says on what it runs, and at the end what it did not run; its cases cover what they say."""

from __future__ import annotations

from itertools import combinations, product
from types import SimpleNamespace

from conftest import LEFT_OUT, ROOT, TESTS, covering, in_words, left_out, pytest_report_header, slow

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


def test_what_few_leaves_out_is_named_as_tests_are() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py"))
    for part in LEFT_OUT:
        function, _, case = part.partition("[")
        assert f"{function}(" in sources, part
        assert case.rstrip("]").rpartition("/")[2] in sources or (ROOT / case.rstrip("]")).exists(), part


def test_few_leaves_out_only_slow_tests_and_two_of_three_of_some() -> None:
    def item(name: str, is_slow: bool) -> SimpleNamespace:
        return SimpleNamespace(nodeid=name, get_closest_marker=lambda _: is_slow or None)

    many = [item(f"tests/elements/test_gpu_ahead.py::test_tile[{number}]", True) for number in range(9)]
    other, named = item("tests/a.py::test_a", True), item(f"tests/b.py::{LEFT_OUT[0]}]", True)
    quick = item(f"tests/b.py::{LEFT_OUT[0]}]", False)
    out = left_out([*many, other, named, quick])  # type: ignore[list-item]
    assert named in out and other not in out and quick not in out
    assert [one for one in many if one not in out] == many[::3]
