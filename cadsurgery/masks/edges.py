"""Edge masks as published (Hesse et al. 2023, supplementary; reference code `segmentation/main.py`)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.errors import InvalidInput
from cadsurgery.masks.provider import Grid, MaskProvider, mask_provider

GREY = (0.299, 0.587, 0.114)


@mask_provider("edges", source="Hesse et al., CVPRW 2023: thresholds 0.15, 0.35, 0.95 with dilation 11")
class EdgeMask(MaskProvider):
    """Keep high what lies near an edge of the image; several thresholds give graded levels.

    Edges are found in the tensor the network sees: RGB in [0, 1] after the ImageNet mean and standard
    deviation. On raw pixels other thresholds are needed.
    """

    def __init__(
        self, threshold: float | tuple[float, ...] = (0.35,), dilation: int | tuple[int, ...] = (11,)
    ) -> None:
        """Create the mask.

        Args:
            threshold: on the signed central difference of the normalised grey image; the i-th one decides
                what gets level i, everything else the lowest level.
            dilation: odd side in image pixels by which edges are widened, one for all or one per threshold.
        """
        super().__init__()
        self.threshold = tuple(threshold) if isinstance(threshold, (tuple, list)) else (threshold,)
        self.dilation = tuple(dilation) if isinstance(dilation, (tuple, list)) else (dilation,)
        if len(self.dilation) not in (1, len(self.threshold)):
            raise InvalidInput(
                f"{len(self.threshold)} thresholds but {len(self.dilation)} dilations.",
                where="mask edges",
                next="give one dilation for all thresholds or one for each, e.g. threshold=0.95/0.1,dilation=5/15.",
            )
        if any(math.isnan(value) for value in self.threshold):
            raise InvalidInput("a threshold is NaN.", where="mask edges", next="use a number such as 0.35.")
        if any(side < 1 or side % 2 == 0 for side in self.dilation):
            raise InvalidInput(
                f"dilation={'/'.join(map(str, self.dilation))} is not odd and positive.",
                where="mask edges",
                next="use an odd number of pixels such as 11.",
            )

    def forward(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """Level i within dilation i of an edge above threshold i, the lowest level elsewhere."""
        if len(self.threshold) > max(grid.max_level, 1):
            raise InvalidInput(
                f"{len(self.threshold)} thresholds for {grid.max_level} levels below the high one.",
                where="mask edges",
                next=f"give at most {max(grid.max_level, 1)} thresholds, or a larger output stride range.",
            )
        difference = _edge_strength(image)
        dilations = self.dilation if len(self.dilation) > 1 else self.dilation * len(self.threshold)
        levels = torch.full((grid.batch, *grid.size), grid.max_level, dtype=torch.int8, device=image.device)
        for level in reversed(range(len(self.threshold))):
            edges = (difference >= self.threshold[level]).to(torch.float32)
            near = _near(edges, dilations[level], grid) > 0
            levels[near] = min(level, grid.max_level)
        return levels

    def scores(self, image: Tensor, features: Tensor, grid: Grid) -> Tensor:
        """The strongest edge within the first dilation: what `forward` gives level 0 is at least the threshold."""
        return _near(_edge_strength(image), self.dilation[0], grid)


def _edge_strength(image: Tensor) -> Tensor:
    """(B, H, W): the larger of the signed central differences to the right and downwards, zero outside.

    Signed as published: only steps from dark to bright count.
    """
    if image.shape[1] == 3:
        weights = torch.tensor(GREY, dtype=image.dtype, device=image.device)
        grey = torch.einsum("bchw,c->bhw", image, weights)
    else:
        grey = image.mean(1)
    padded = F.pad(grey, (1, 1, 1, 1))
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    return torch.maximum(right, down)


def _near(values: Tensor, side: int, grid: Grid) -> Tensor:
    """(B, h, w): the largest of the values (B, H, W) in the side x side window around every output_stride-th pixel
    from the first; cut or replicated to the size of the fine map.

    Separable: the maximum over columns, then over rows; as views, many times faster than max-pooling.
    """
    half, stride = side // 2, grid.output_stride
    tall = F.pad(values, (0, 0, half, half), value=-math.inf).unfold(1, side, stride).amax(-1)
    sampled = F.pad(tall, (half, half), value=-math.inf).unfold(2, side, stride).amax(-1)
    height, width = grid.size
    missing = (max(0, width - sampled.shape[2]), max(0, height - sampled.shape[1]))
    if any(missing):
        padded = F.pad(sampled.unsqueeze(1), (0, missing[0], 0, missing[1]), mode="replicate")
        sampled = padded.squeeze(1)
    return sampled[:, :height, :width]
