"""From an image to keypoints, scores and descriptors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data.images import normalise
from cadsurgery.elements.lattice import describe
from cadsurgery.masks.context import keypoints_at
from cadsurgery.masks.detectors import in_pixels, peaks, points_of, sift
from cadsurgery.masks.filters import grey_of
from cadsurgery.masks.keypoints import OWN, SIFT, named_outputs, own_scores
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.points import macs_at, read_at, readable, sample_at
from cadsurgery.support.errors import InvalidInput, UnknownName
from cadsurgery.support.provenance import function_at
from cadsurgery.tasks.options import Extraction as Extraction

BORDER = 5  # samples at the edge of a network's own score map that have no keypoint: they see padding


@dataclass(frozen=True)
class Features:
    """Keypoints of an image.

    Attributes:
        keypoints: (n, 2) float32, x and y in pixels of the image file, 0 the middle of the first one; the best first.
        scores: (n,) float32; ones if the detector gives none.
        descriptors: (n, C) float32.
        size: (height, width) of the image file.
    """

    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor
    size: tuple[int, int]


class Seen(NamedTuple):
    """An image as a network sees it, a batch of one, and the keypoints found in it: (n, 2) in pixels of the batch, with
    scores (n,). Detector `own` finds them in the network's output: they are None then. `size` is that of the file."""

    size: tuple[int, int]
    batch: Tensor
    points: Tensor | None = None
    scores: Tensor | None = None


@dataclass
class Extractor:
    """Extracts features with one network.

    Attributes:
        net: converted; `net.optimize()` for speed.
        settings: how.
        device: where the network is.

    Raises:
        InvalidInput: the network gives no map of descriptors, more than one without a name, or no score map where
            it is to detect.
        UnknownName: no such detector, or no such output.
    """

    net: AdaptiveModel
    settings: Extraction
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        name = self.settings.detector
        self._function: Callable[[Tensor], Any] | None = None
        if name not in (SIFT, OWN):
            self._function = function_at(name, "--detector", "my_module:my_function")
        output = self.settings.output
        self._output: str | int | None = int(output) if output.isdecimal() else output or None
        if self.reads_elements:
            return
        with torch.inference_mode():  # what cannot be done should be said before any image is read
            example = torch.zeros(1, *self.net.plan.example_shape[1:], device=self.device)
            outputs = self.net(example, mask="none")
        if name == OWN:
            own_scores(outputs, 1, "detector own")
        descriptor_map(outputs, self._output)

    @property
    def mask(self) -> str:
        """The spec of the mask that is used."""
        return self.settings.mask or self.net.mask.spec()

    @cached_property
    def reads_elements(self) -> bool:
        """True if descriptors are read from elements; otherwise the map leaves the network whole."""
        return self.settings.detector != OWN and readable(self.net, self._output)

    def __call__(self, image: Tensor) -> Features:
        """The features of an image (3, H, W) in 0..1.

        Raises:
            InvalidInput: an image too small, or a detector that gives no points.
        """
        return self.features(self.seen(image))

    def seen(self, image: Tensor) -> Seen:
        """An image (3, H, W) in 0..1 prepared; extractors that differ in their mask alone share it."""
        shown = self.resize(image)
        batch = normalise(shown, pictures_for(self.net)).unsqueeze(0).to(self.device)
        batch, size = batch.contiguous(memory_format=torch.channels_last), (image.shape[1], image.shape[2])
        if self.settings.detector == OWN:
            return Seen(size, batch)
        with torch.inference_mode():
            return Seen(size, batch, *self._points(shown, batch))

    def features(self, seen: Seen) -> Features:
        """The features of a prepared image."""
        batch, mask, settings = seen.batch, self.settings.mask or None, self.settings
        points, scores = seen.points, seen.scores
        with torch.inference_mode():
            if points is None or scores is None:
                output = self.net(batch, mask=mask)
                score_map = own_scores(output, 1, "detector own")
                ((places, scores),) = peaks(score_map.squeeze(1).float(), settings.count, border=BORDER)
                points = in_pixels(places, score_map, batch)
                descriptors = self._sample(output, batch, points)
            elif self.reads_elements:
                options: Any = {"mask": mask, "reach": settings.reach, "align": settings.align}
                (descriptors,) = read_at(self.net, batch, [points], output=self._output, **options)
            else:
                with keypoints_at([points]):
                    descriptors = self._sample(self.net(batch, mask=mask), batch, points)
        if not self.settings.raw:
            descriptors = F.normalize(descriptors, dim=1)
        height, width = seen.batch.shape[2:]
        ratio = points.new_tensor([seen.size[1] / width, seen.size[0] / height])
        keypoints = (points + 0.5) * ratio - 0.5
        return Features(keypoints.float().cpu(), scores.float().cpu(), descriptors.float().cpu(), seen.size)

    def resize(self, image: Tensor) -> Tensor:
        """The image (3, h, w) the network sees: made smaller by the means of areas, cut to a multiple."""
        height, width = image.shape[1:]
        limit = self.settings
        scale = min(
            1.0,
            limit.max_edge / max(height, width) if limit.max_edge else 1.0,
            limit.max_sum / (height + width) if limit.max_sum else 1.0,
        )
        size = [int(length * scale) // limit.multiple * limit.multiple for length in (height, width)]
        if min(size) < 1:
            raise InvalidInput(
                f"an image of {height} x {width} leaves nothing at a multiple of {limit.multiple}.",
                next="use larger images, or a smaller --multiple.",
            )
        return image if size == [height, width] else F.interpolate(image[None], size=size, mode="area")[0]

    def _points(self, shown: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 2) points in pixels of the image the network sees, and (n,) scores; not of detector `own`."""
        if self._function is None:
            grey = (255 * grey_of(shown[None])[0]).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            points, scores = map(torch.from_numpy, sift(grey, self.settings.count))
            return points.to(self.device, torch.float64), scores.to(self.device)
        picture = self.net.normalisation.in_unit(batch) if self.net.normalisation else batch
        detected = points_of(
            self._function(picture), batch, self.settings.count, f"detector {self.settings.detector}"
        )
        points = detected[0][: self.settings.count]
        return points, points.new_ones(len(points))

    def macs(self, seen: Seen) -> int:
        """Multiply-accumulates of the network for the descriptors of a prepared image."""
        batch, mask = seen.batch, self.settings.mask or None
        points = seen.points if seen.points is not None else batch.new_zeros(0, 2)
        if self.reads_elements:
            options: Any = {"mask": mask, "align": self.settings.align}
            macs = macs_at(self.net, batch, [points], output=self._output, **options)
            return macs.receptive if self.settings.reach == "receptive" else macs.all
        with keypoints_at([points]):
            return self.net.macs(batch, mask=mask).mask

    def _sample(self, output: Any, batch: Tensor, points: Tensor) -> Tensor:
        """The dense map of descriptors at points."""
        descriptors = descriptor_map(output, self._output)
        size = (descriptors.shape[2], descriptors.shape[3])
        y, x = sample_at(points, batch, size, batch.shape[2] / size[0], self.settings.align)
        return descriptors[0, :, y, x].T


def descriptor_map(output: Any, name: str | int | None) -> Tensor:
    """The map of descriptors (1, C, h, w) among the outputs of a network.

    Raises:
        UnknownName: no such output.
        InvalidInput: several, or none, of more than one channel.
    """
    several = named_outputs(output)
    if name is not None:
        if name not in several:
            raise UnknownName("output", str(name), map(str, several))
        return several[name]
    maps = [
        value
        for value in several.values()
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] > 1
    ]
    if not maps:
        raise InvalidInput(
            f"the network gives no map of descriptors, but {', '.join(map(describe, several.values()))}.",
            why="they are read from a map (1, C, h, w) of several channels.",
            next="give module:function of your own that returns the part which gives one, "
            "e.g. the `features` of a classifier.",
        )
    if len(maps) > 1:
        raise InvalidInput(
            f"the network gives {len(maps)} maps of several channels.",
            why="one of them must be the descriptors.",
            next=f"name it: --output-name {' or '.join(map(str, several))}.",
        )
    return maps[0]
