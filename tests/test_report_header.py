"""The suite says on what it runs."""

from __future__ import annotations

from conftest import pytest_report_header

from cadsurgery.kernels import isa
from cadsurgery.support.processor import processor


def test_the_suite_says_on_which_processor_and_instruction_sets_it_runs() -> None:
    said = pytest_report_header()
    assert isa.in_words() in said and processor().model in said
