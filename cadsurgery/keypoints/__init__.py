"""Keypoints and descriptors of images by an adaptive network, and how well they match."""

from cadsurgery.keypoints.evaluation import evaluate_matching
from cadsurgery.keypoints.extraction import Extraction, Extractor, Features
from cadsurgery.keypoints.folder import extract, read_features, write_features
from cadsurgery.keypoints.sequences import ImageSequence, find_sequences
from cadsurgery.matching_report import MatchingReport

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
