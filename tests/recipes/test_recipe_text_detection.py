"""The recipe of the text detector, without its data: boxes, their agreement, windows and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")

from recipes.text_detection import recipe


def test_boxes_are_those_of_text_that_is_sure_and_not_too_thin() -> None:
    text = torch.zeros(1, 1, 60, 80)
    text[0, 0, 5:15, 10:40] = 0.9
    text[0, 0, 15, 40] = 0.9  # joined by a corner
    text[0, 0, 30:40, 10:40] = 0.5  # not sure
    text[0, 0, 50:52, 10:40] = 0.9  # too thin
    assert recipe.boxes(text) == [(5, 10, 16, 41)]
    assert recipe.boxes(text * 0) == []


def test_boxes_agree_where_they_overlap_by_half() -> None:
    right = [(0, 0, 10, 100), (20, 0, 30, 100), (40, 0, 50, 100)]
    found = [(0, 0, 10, 60), (20, 0, 30, 40), (41, 0, 51, 100), (80, 0, 90, 10)]
    same, many, asked, lost = recipe.agreement(found, right)
    assert (same, many, asked, lost) == (2, 4, 3, [right[1]])
    assert recipe.f1([(same, many, asked), (1, 1, 1)]) == pytest.approx(2 * 3 / (5 + 4))
    assert recipe.f1([recipe.agreement([], right)[:3]]) == 0


def test_an_error_holds_its_figure() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    mean, low, high = recipe.with_error(lambda at: float(np.mean([values[i] for i in at])), len(values))
    assert mean == 3.75 and low < mean < high
