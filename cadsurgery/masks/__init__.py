"""Masks: they decide where in the image a network keeps its resolution.

In come an image and the feature map that enters the adaptive region; out comes a level map. A mask is written as
text, made from a function, or learned. This package does not import the packages that build networks.
"""

import importlib
import pkgutil

from cadsurgery.masks.basic import FixedMask, FunctionMask, RandomMask, UniformMask
from cadsurgery.masks.content import ContentMask
from cadsurgery.masks.context import keypoints_at, labelled, sized
from cadsurgery.masks.graded import EdgeMask, GradedMask, GradientMask, TrimapMask
from cadsurgery.masks.keypoint_masks import KeypointMask
from cadsurgery.masks.learned import EstimatedMask, LearnedMask
from cadsurgery.masks.provider import (
    FineMapSpec,
    Grid,
    MaskProvider,
    TrainableMask,
    list_masks,
    mask_provider,
)
from cadsurgery.masks.scored import ConfidenceMask, DetailMask, PreviewMask
from cadsurgery.masks.spec import resolve_mask
from cadsurgery.masks.unit import Normalisation
from cadsurgery.masks.wrappers import Budget, Dilate, MaskWrapper, Smooth, Threshold, Union

for _module in pkgutil.iter_modules(__path__):  # masks get their names where they are defined
    importlib.import_module(f"{__name__}.{_module.name}")
