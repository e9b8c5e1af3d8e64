"""Two more kinds of data: SBD, and the trimaps of the Oxford-IIIT pets.

    cadsurgery eval MODEL --data recipes.voc_deeplab.more_data:pets:PATH --split test

They are examples of kinds that are not the package's own, see docs/reference/data.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import cadsurgery as cs
from cadsurgery.data.datasets import identity_table
from cadsurgery.data.sources import VOC_CLASSES, of_torchvision
from cadsurgery.support.errors import import_optional


@cs.data_kind(
    "sbd",
    {},
    ("train", "val", "train_noval"),
    "Get benchmark.tgz at http://home.bharathh.info/pubs/codes/SBD and take what is in its folder dataset.",
    "img/*.jpg\ncls/*.mat\nSPLIT.txt",
)
def sbd(place: str, split: str, options: Mapping[str, str], spec: str) -> cs.SegmentationData:
    """Open the Semantic Boundaries Dataset, 21 classes."""
    from torchvision.datasets import SBDataset

    import_optional("scipy", "the labels of SBD are MATLAB files, which need SciPy.", "pip install scipy")
    make = partial(SBDataset, place, split, mode="segmentation", download=False)
    return of_torchvision(make, VOC_CLASSES, dict(identity_table(len(VOC_CLASSES))), spec, split)


@cs.data_kind(
    "pets",
    {},
    ("train", "trainval", "test"),
    "Get images.tar.gz and annotations.tar.gz at https://www.robots.ox.ac.uk/~vgg/data/pets.",
    "oxford-iiit-pet/images/*.jpg\noxford-iiit-pet/annotations/trimaps/*.png\n"
    "oxford-iiit-pet/annotations/trainval.txt and test.txt",
)
def pets(place: str, split: str, options: Mapping[str, str], spec: str) -> cs.SegmentationData:
    """Open the Oxford-IIIT pets, 3 classes; `train` is `trainval`."""
    from torchvision.datasets import OxfordIIITPet

    folder = "trainval" if split == "train" else split
    make = partial(OxfordIIITPet, place, folder, target_types="segmentation", download=False)
    classes = ("pet", "background", "border")
    return of_torchvision(make, classes, {1: 0, 2: 1, 3: 2}, spec, split, "_images")
