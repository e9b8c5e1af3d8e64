"""What a call gives its masks is one value: nested, of its own in each thread and task, and seen through wrappers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cadsurgery.masks import keypoints_at, labelled
from cadsurgery.masks.context import call_context, first_passes, masked

NET = nn.Identity()
GIVERS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "labels": lambda value: labelled(torch.full((1, 2, 2), value)),
    "points": lambda value: keypoints_at([torch.full((1, 2), float(value))]),
    "first_passes": lambda value: first_passes({1: torch.tensor(value)}),
    "masks": lambda value: masked(NET, torch.tensor(value)),
}
WITHOUT = dict.fromkeys(GIVERS, None)


def seen() -> dict[str, int | None]:
    """The number that was given for each kind."""
    context = call_context()
    points = context.points[0] if context.points is not None else None
    values = context.labels, points, context.first_passes.get(1), context.masks.get(NET)
    return {
        name: int(value.flatten()[0]) if isinstance(value, Tensor) else None
        for name, value in zip(GIVERS, values, strict=True)
    }


@pytest.mark.parametrize("name", GIVERS)
def test_what_is_given_is_nested_and_given_back_even_after_an_error(name: str) -> None:
    with GIVERS[name](1):
        assert seen() == {**WITHOUT, name: 1}
        with pytest.raises(RuntimeError, match="stop"), GIVERS[name](2):
            assert seen() == {**WITHOUT, name: 2}
            raise RuntimeError("stop")
        assert seen() == {**WITHOUT, name: 1}
        with ThreadPoolExecutor(1) as thread:  # has what was given in it
            assert thread.submit(seen).result() == WITHOUT
    assert seen() == WITHOUT


@pytest.mark.parametrize("name", GIVERS)
def test_tasks_take_turns_and_keep_what_is_theirs(name: str) -> None:
    async def work(value: int) -> int | None:
        with GIVERS[name](value):
            for _ in range(3):
                await asyncio.sleep(0)
            return seen()[name]

    async def both() -> list[int | None]:
        return await asyncio.gather(work(1), work(2))

    assert asyncio.run(both()) == [1, 2] and seen() == WITHOUT
