"""Mask providers: from an image to a level map on the fine map."""

from cadsurgery.masks.basic import FixedMask, FunctionMask, RandomMask, UniformMask
from cadsurgery.masks.budget import Budget
from cadsurgery.masks.edges import EdgeMask
from cadsurgery.masks.provider import Grid, MaskProvider, list_masks, mask_provider
from cadsurgery.masks.resolve import MaskWrapper, resolve_mask

__all__ = [
    "Budget",
    "EdgeMask",
    "FixedMask",
    "FunctionMask",
    "Grid",
    "MaskProvider",
    "MaskWrapper",
    "RandomMask",
    "UniformMask",
    "list_masks",
    "mask_provider",
    "resolve_mask",
]
