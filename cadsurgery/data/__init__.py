"""Data: images, labelled folders, and networks by name.

In come paths and names of the libraries; out come image batches and labels as tensors, and networks with their weights.
"""

from cadsurgery.data.augment import Augment
from cadsurgery.data.datasets import IGNORED, SegmentationData
from cadsurgery.data.samples import Samples, as_data, is_labelled, sample_of
from cadsurgery.data.sources import data_kind, open_data, open_pictures
