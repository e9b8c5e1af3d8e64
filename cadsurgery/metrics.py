"""Figures of segmentation: the public names of `cadsurgery.tasks.segmentation.metrics`."""

from cadsurgery.tasks.segmentation.metrics import *  # noqa: F403
