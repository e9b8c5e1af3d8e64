"""Masks that do not flicker over the frames of a video."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from cadsurgery.masks.provider import Grid, mask_provider
from cadsurgery.masks.resolve import MaskWrapper
from cadsurgery.support.errors import InvalidInput


@mask_provider("smooth")
class Smooth(MaskWrapper):
    """Over video frames, keep what another mask keeps until it has not asked for it for some frames (hysteresis).

    Every call is a frame, also that of `net.macs`. Each position of the batch is a video of its own; for videos in
    different calls use an object each, `net(frame, mask=smooth_of_this_video)`. Another batch, size or device starts
    anew, as `reset()` does. What is remembered is in no state dict, copy or file.
    """

    image_only = True

    needs = "earlier images"

    def __init__(self, mask: object, hold: int = 3) -> None:
        """Create the mask.

        Args:
            mask: anything `adaptify` takes as a mask.
            hold: frames for which a sample keeps its level after the last one that asked for it; 0 for none.

        Raises:
            InvalidInput: a negative hold.
        """
        super().__init__(mask)
        if hold < 0:
            raise InvalidInput(
                f"hold={hold}.", where="mask smooth", next="give a number of frames such as hold=3, or 0."
            )
        self.hold = hold
        self.reset()

    def reset(self) -> None:
        """Forget all frames: the next one is the first of its video."""
        self._levels, self._scores = _Frames(self.hold + 1), _Frames(self.hold + 1)

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """(B, h, w) int64: the finest level of this frame and the `hold` frames before it."""
        return self._levels.with_next(self.inner_levels(image, features, grid), grid).amin(0)

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The highest score in this frame and the `hold` frames before it, counted apart from those of `forward`."""
        return self._scores.with_next(self.inner_scores(image, features, grid), grid).amax(0)

    def __getstate__(self) -> dict[str, Any]:
        forgotten = {"_levels": _Frames(self.hold + 1), "_scores": _Frames(self.hold + 1)}
        return {**super().__getstate__(), **forgotten}


class _Frames:
    """The last maps of a stream, as long as they are for the same grid."""

    def __init__(self, count: int) -> None:
        self.maps: deque[Tensor] = deque(maxlen=count)
        self.key: object = None

    def with_next(self, found: Tensor, grid: Grid) -> Tensor:
        """(frames, B, h, w): those remembered with one more, which is remembered too."""
        key = (grid, found.dtype, found.device)
        if key != self.key:
            self.maps.clear()
            self.key = key
        self.maps.append(found.detach())
        return torch.stack(tuple(self.maps))
