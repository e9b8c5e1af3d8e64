"""Keypoints and descriptors of images from an adaptive network, and how well they match."""

from cadsurgery.tasks.keypoints.evaluation import evaluate_matching
from cadsurgery.tasks.keypoints.extraction import Extraction, Extractor, Features
from cadsurgery.tasks.keypoints.folder import extract, read_features, write_features
from cadsurgery.tasks.keypoints.report import MatchingReport
from cadsurgery.tasks.keypoints.sequences import ImageSequence, find_sequences

__all__ = [
    "Extraction",
    "Extractor",
    "Features",
    "ImageSequence",
    "MatchingReport",
    "evaluate_matching",
    "extract",
    "find_sequences",
    "read_features",
    "write_features",
]
