"""Pictures of a fixed camera: only what a change of the picture reaches is computed again.

    camera = cs.Changes(net)
    for frame in frames:
        output = camera(frame)  # as net(frame)

Clips store blocks in which nothing moves as copies, so that these decode to equal pixels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.elements.lattice import Lattice
from cadsurgery.masks.masking import check_image
from cadsurgery.network.model import AdaptiveModel, whole_program
from cadsurgery.network.regions import Box, PictureReads, Region, Values, boxes_of, runs_of
from cadsurgery.support.errors import InvalidInput

_BLOCK = 16  # pixels of the blocks that are compared, down and across: those of video


class Changes:
    """Computes the frames of a fixed camera one after the other; keeps the last frame and the last output.

    An output is that of the whole call up to rounding. Networks whose outputs depend on the whole picture are computed
    whole. After weights have changed, call `forget`.

    Attributes:
        share: the pixels that the last call computed, relative to those of the frame.
    """

    def __init__(self, net: AdaptiveModel, *, tolerance: float = 0.0) -> None:
        """Take a converted network in evaluation mode, or an inference copy of it.

        Args:
            net: the network.
            tolerance: a pixel has changed if a channel differs by more than that from what was computed last, in the
                unit of the network's input. Outputs are exact with 0 only.

        Raises:
            InvalidInput: a negative tolerance; a network that is in training mode, or only hosts an adaptive part.
        """
        whole_program(net, "cannot be computed where frames change")
        if not tolerance >= 0:
            raise InvalidInput(f"tolerance={tolerance!r} is no difference of pixels.", next="give 0 or more.")
        self.net, self.tolerance, self.share = net, tolerance, 1.0
        self.forget()

    def forget(self) -> None:
        """Compute the next frame whole."""
        self._frame: Tensor | None = None
        self._levels: Tensor | None = None
        self._leaves: list[Any] | None = None
        self._versions = list[int]()

    @torch.inference_mode(False)  # whose tensors do not tell changes in place
    @torch.no_grad()
    def __call__(self, frame: Tensor, boxes: Any = None, *, mask: object = None) -> Any:
        """Return the network's output for a frame.

        Args:
            frame: (B, C, H, W); the frames of B cameras.
            boxes: where it differs from the last one, if that is known, as for `cs.read_within`; otherwise it is
                compared with the last one.
            mask: mask for this call only.
        """
        check_image(frame)
        last = self._frame
        is_like = (
            last is not None and _kind(last) == _kind(frame) and self._versions == _versions(self._leaves)
        )
        if last is None or not is_like:
            self.forget()
            given = [[Box(0, frame.shape[2], 0, frame.shape[3])]] * len(frame)
        elif boxes is not None:
            given = boxes_of(boxes, frame)
        else:
            blocks = _changed_blocks(frame, last, self.tolerance)
            given = [[box.times(_BLOCK, frame) for box in runs_of(one)] for one in blocks]
        return self._computed(frame, given, mask)

    def _computed(self, frame: Tensor, changed: list[list[Box]], mask: object) -> Any:
        """Return the output of a frame of which boxes have changed."""
        if self._frame is None:
            seen = frame.clone()
        else:
            seen = self._frame.clone()
            for one, own, some in zip(seen, frame, changed, strict=True):
                for top, bottom, left, right in some:
                    one[:, top:bottom, left:right] = own[:, top:bottom, left:right]
        levels = self._levels

        def asked(reads: PictureReads, lattice: Lattice | None) -> list[list[Box]]:
            """Return the boxes of values that a change of the picture or of its cells reaches."""
            nonlocal levels
            every = [list(some) for some in changed]
            if lattice is not None:
                levels, before = lattice.pyramid.levels, levels
                if before is not None:
                    for some, differing in zip(every, levels != before, strict=True):
                        some += [box.times(self.net.plan.strides[0], frame) for box in runs_of(differing)]
            return [[reads.reached(box) for box in some] for some in every]

        def run(region: Region) -> tuple[Values, Region]:
            return region.read(self.net.answer, None), region

        found = self.net.in_region(seen, asked, run, lambda *_: None, mask)
        if found is None:
            self.forget()
            self.share = 1.0
            return self.net(frame, mask=mask)
        values, region = found
        before = self._leaves or values.blank(len(frame))
        assert not callable(region.boxes)
        leaves = values.onto(before, region.boxes, (frame.shape[2], frame.shape[3]))
        self._frame, self._levels, self._leaves, self.share = seen, levels, leaves, region.share
        self._versions = _versions(leaves)
        return values.filled(leaves)


def _kind(frame: Tensor) -> tuple[Any, ...]:
    return frame.shape, frame.dtype, frame.device


def _versions(leaves: list[Any] | None) -> list[int]:
    """Return how often the maps of an output were changed in place: by whom it was returned to."""
    return [leaf._version for leaf in leaves or () if isinstance(leaf, Tensor)]


def _changed_blocks(frame: Tensor, last: Tensor, tolerance: float) -> Tensor:
    """Return the blocks (B, h, w) of frames in which a pixel has changed."""
    differs = frame != last if tolerance == 0 else (frame - last).abs() > tolerance
    found = differs.any(1).float()
    return F.max_pool2d(found.unsqueeze(1), _BLOCK, ceil_mode=True).squeeze(1) > 0
