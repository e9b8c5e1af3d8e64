"""Masks: where a network keeps its resolution.

In come an image and the fine map of a network; out comes a level map on its cells. A mask is written as text, made
from a function, or learned; this room does not know networks.
"""

from cadsurgery.masks.basic import FixedMask, FunctionMask, RandomMask, UniformMask
from cadsurgery.masks.budget import Budget
from cadsurgery.masks.confidence import ConfidenceMask
from cadsurgery.masks.detail import DetailMask
from cadsurgery.masks.edges import EdgeMask, GradientMask
from cadsurgery.masks.graded import GradedMask
from cadsurgery.masks.keypoints import KeypointMask, keypoints_at
from cadsurgery.masks.learned import LearnedMask
from cadsurgery.masks.provider import Grid, MaskProvider, list_masks, mask_provider
from cadsurgery.masks.resolve import MaskWrapper, resolve_mask
from cadsurgery.masks.saliency import SaliencyMask
from cadsurgery.masks.smooth import Smooth
from cadsurgery.masks.trimap import TrimapMask, labelled
from cadsurgery.masks.wrappers import Dilate, Threshold, Union

__all__ = [
    "Budget",
    "ConfidenceMask",
    "DetailMask",
    "Dilate",
    "EdgeMask",
    "FixedMask",
    "FunctionMask",
    "GradedMask",
    "GradientMask",
    "Grid",
    "KeypointMask",
    "LearnedMask",
    "MaskProvider",
    "MaskWrapper",
    "RandomMask",
    "SaliencyMask",
    "Smooth",
    "Threshold",
    "TrimapMask",
    "UniformMask",
    "Union",
    "keypoints_at",
    "labelled",
    "list_masks",
    "mask_provider",
    "resolve_mask",
]
