"""Where memory ends, a call and a picture that is read say so, and what computes it in less."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import strided, unverified
from PIL import Image

import cadsurgery as cs
from cadsurgery.data import images

ENDS = [
    MemoryError("Unable to allocate 732. MiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 478560960 bytes."),
]


@pytest.mark.parametrize("error", ENDS, ids=["Python", "torch"])
def test_a_call_without_memory_names_bands(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    net = unverified(strided(3, outputs=2).eval(), "none")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(type(net), "answer", fail)
    with pytest.raises(cs.InvalidInput, match="not enough memory for an image of 64 x 96") as refusal:
        net(torch.rand(1, 3, 64, 96))
    assert "optimize(memory=" in refusal.value.next


@pytest.mark.parametrize("error", ENDS, ids=["Python", "torch"])
def test_a_picture_that_is_read_without_memory_names_rows(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(images.Image, "open", fail)
    with pytest.raises(cs.FileError, match="not enough memory to read") as refusal:
        images.read_image(path)
    assert "--memory" in refusal.value.next
