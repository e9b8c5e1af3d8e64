"""Converted networks that laws of several files hold on, made at most once in a process, since each takes seconds.

Nobody changes them: a mask is given to a call, and what a test changes is a copy.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

import cadsurgery as cs


def detector() -> nn.Module:
    """A detector of torchvision, which torch.fx cannot follow whole, on a backbone of three convolutions."""
    torch.manual_seed(0)
    body = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, 8, 3, 2, 1), nn.ReLU()) for a in (3, 8, 8)))
    body.out_channels = 8
    anchors, pool = AnchorGenerator(((32, 64),), ((1.0,),)), MultiScaleRoIAlign(["0"], 5, 2)
    options = {"min_size": 96, "max_size": 192, "box_score_thresh": 0.0}
    return FasterRCNN(body, 3, rpn_anchor_generator=anchors, box_roi_pool=pool, **options).eval()


@cache
def given_detector() -> nn.Module:
    """The detector that is converted."""
    return detector()


@cache
def adaptive_detector() -> cs.AdaptiveModel:
    """The detector, converted in one call without an example: its backbone is adaptive, everything else is its own."""
    return cs.adaptify(given_detector(), "edges", verify_laws=False)
