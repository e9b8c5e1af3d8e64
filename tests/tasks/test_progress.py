"""Long work says which step it is at, and how many items of how many are done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from networks import segmenter

import cadsurgery as cs
from cadsurgery.data.images import write_picture
from cadsurgery.tasks.evaluation import evaluate


class Told(list[tuple[Any, ...]]):
    """The steps of some work."""

    def __call__(self, text: str, *count: Any) -> None:
        self.append((text, *count))

    def counts(self, start: str) -> list[tuple[Any, ...]]:
        """The counts of the steps whose text starts so, each once."""
        return list(dict.fromkeys(step[1:3] for step in self if step[0].startswith(start)))

    def texts(self) -> list[str]:
        return [step[0] for step in self]


def adaptive(mask: str = "edges | budget:fraction=0.3") -> cs.AdaptiveModel:
    return cs.adaptify(
        segmenter().eval(), mask, output_stride=(8, 16), normalisation="raw", verify_laws=False
    )


def test_an_evaluation_counts_images_also_those_that_fail_and_rounds(tmp_path: Path) -> None:
    from torchvision.transforms.functional import to_pil_image

    for number in range(4):
        write_picture(to_pil_image(torch.rand(3, 40, 56)), tmp_path / f"{number}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    told = Told()
    evaluate(adaptive(), f"images:{tmp_path}", ["edges"], split="all", rounds=1, step=told)
    assert told.counts("image") == [(0, 4), (2, 4), (3, 4)]
    assert told.texts()[-6].startswith("measuring, warming up") and told.texts()[-1].startswith(
        "measuring, round 1"
    )
    assert told.counts("measuring") == [(place, 6) for place in range(6)]
