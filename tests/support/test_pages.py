"""Memory of large results."""

from __future__ import annotations

import threading

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


def test_what_is_offered_is_given_once_to_a_result_that_fits() -> None:
    like, memory = torch.zeros(2, 3), torch.zeros(10, 3)
    with pages.offering(memory):
        others = [
            pages.new_result(like, 11, 3),  # too long
            pages.new_result(like, 4, 2),
            pages.new_result(like.double(), 4, 3),
            pages.new_result(like, 2, 2, 3),
        ]
        first, second = pages.new_result(like, 4, 3), pages.new_result(like, 4, 3)
    after = pages.new_result(like, 4, 3)
    assert first.data_ptr() == memory.data_ptr() and first.shape == (4, 3)
    for found in (*others, second, after):
        assert found.untyped_storage().data_ptr() != memory.untyped_storage().data_ptr()


def test_what_one_thread_is_offered_no_other_takes() -> None:
    memory, found = torch.zeros(10, 3), list[torch.Tensor]()
    with pages.offering(memory):
        other = threading.Thread(target=lambda: found.append(pages.new_result(memory, 4, 3)))
        other.start()
        other.join()
        own = pages.new_result(memory, 4, 3)
    assert own.data_ptr() == memory.data_ptr() != found[0].data_ptr()
