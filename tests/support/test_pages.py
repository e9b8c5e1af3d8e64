"""Memory of large results."""

from __future__ import annotations

import pytest
import torch

from cadsurgery.support import pages


@pytest.mark.parametrize("large", [1, 1 << 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_is_a_tensor_as_any(large: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LARGE", large)
    like = torch.zeros(2, 3, dtype=dtype)
    for shape in ((0,), (3, 5), (1025, 1027)):  # none, less than a page, and more than one
        found = pages.new_memory(like, *shape)
        assert found.shape == shape and found.dtype == dtype and found.is_contiguous()
        assert bool((found.fill_(1) == 1).all())
    assert pages.new_memory(like.to("meta"), 4, 4).is_meta


def test_without_large_pages_it_is_memory_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "LARGE", 1)
    monkeypatch.setattr(pages, "_advise", lambda: None)
    assert pages.new_memory(torch.zeros(1), 7, 5).shape == (7, 5)
