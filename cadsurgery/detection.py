"""Keypoints that masks are made of: the public names of `cadsurgery.masks.detectors`."""

from cadsurgery.masks.detectors import *  # noqa: F403
