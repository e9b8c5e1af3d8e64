"""Keypoints and descriptors of images from an adaptive network."""

from cadsurgery.tasks.keypoints.extraction import Extraction, Extractor, Features
from cadsurgery.tasks.keypoints.folder import extract, read_features, write_features

__all__ = [
    "Extraction",
    "Extractor",
    "Features",
    "extract",
    "read_features",
    "write_features",
]
