"""Labelled images for training and evaluation."""

from cadsurgery.data.augment import Augment
from cadsurgery.data.dataset import IGNORED, SegmentationData
from cadsurgery.data.sources import open_data

__all__ = ["IGNORED", "Augment", "SegmentationData", "open_data"]
