"""Extract keypoints, scores and descriptors from images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cadsurgery.data.images import normalise
from cadsurgery.masks import resolve_mask
from cadsurgery.masks.context import keypoints_at
from cadsurgery.masks.detectors import call_detector, in_pixels, opencv, peaks, points_of, sift
from cadsurgery.masks.filters import grey_of
from cadsurgery.masks.keypoint_masks import OF_POINTS, OWN, SIFT, named_outputs, own_scores
from cadsurgery.network.model import AdaptiveModel, pictures_for
from cadsurgery.network.points import macs_at, read_at, readable, sample_at
from cadsurgery.support.describe import describe
from cadsurgery.support.errors import InvalidInput, UnknownName
from cadsurgery.support.provenance import function_at
from cadsurgery.tasks.task_options import Extraction as Extraction

BORDER = 5  # margin of a network's score map without keypoints, where values depend on padding


@dataclass(frozen=True)
class Features:
    """Keypoints of an image.

    Attributes:
        keypoints: (n, 2) float32, x and y in pixels of the image file, 0 at the centre of the first one; the best
            first.
        scores: (n,) float32; ones if the detector returns no scores.
        descriptors: (n, C) float32.
        size: (height, width) of the image file.
    """

    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor
    size: tuple[int, int]


class PreparedPicture(NamedTuple):
    """An image prepared for a network, a batch of one, and its keypoints (n, 2) in pixels of the batch, with scores
    (n,).

    Points and scores are None for detector `own`, which finds them in the network's output. `size` is that of the
    file.
    """

    size: tuple[int, int]
    batch: Tensor
    points: Tensor | None = None
    scores: Tensor | None = None


@dataclass
class Extractor:
    """Extracts features with one network.

    Attributes:
        net: converted network; use `net.optimize()` for speed.
        settings: settings of the extraction.
        device: device of the network.

    Raises:
        InvalidInput: the network returns no descriptor map, several without a name to choose, or no score map for
            detector `own`; or that detector is to find points that the mask needs before.
        UnknownName: there is no such detector or output.
        NotInstalled: detector `sift` needs OpenCV.
    """

    net: AdaptiveModel
    settings: Extraction
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        name = self.settings.detector
        self._function: Callable[[Tensor], Any] | None = None
        if name == SIFT:
            opencv()  # refuse before any image is read
        provider = resolve_mask(self.settings.mask) if self.settings.mask else self.net.mask
        if name == OWN and provider.dependence == OF_POINTS:
            raise InvalidInput(
                f"--detector own under mask {provider.spec()}.",
                why="the mask needs the keypoints before the network runs, and the network finds them.",
                next='give --mask "keypoints:detector=own", which finds them in a first pass with everything '
                "downsampled, or a mask of the picture: --mask edges.",
            )
        if name not in (SIFT, OWN):
            self._function = function_at(name, "--detector", "my_module:my_function")
        output = self.settings.output
        self._output: str | int | None = int(output) if output.isdecimal() else output or None
        if self.reads_elements:
            return
        with torch.inference_mode():  # find errors before any image is read
            example = torch.zeros(1, *self.net.plan.example_shape[1:], device=self.device)
            outputs = self.net(example, mask="none")
        if name == OWN:
            own_scores(outputs, 1, "detector own")
        descriptor_map(outputs, self._output)

    @property
    def mask(self) -> str:
        """The text form of the mask in use."""
        return self.settings.mask or self.net.mask.spec()

    @cached_property
    def reads_elements(self) -> bool:
        """True if descriptors are read from elements instead of a dense map."""
        return self.settings.detector != OWN and readable(self.net, self._output)

    def __call__(self, image: Tensor) -> Features:
        """Return the features of an image (3, H, W) in 0..1.

        Raises:
            InvalidInput: the image is too small, or the detector does not return points.
        """
        return self.features(self.seen(image))

    def seen(self, image: Tensor) -> PreparedPicture:
        """Prepare an image (3, H, W) in 0..1; extractors that differ only in their mask can share the result."""
        shown = self.resize(image)
        batch = normalise(shown, pictures_for(self.net)).unsqueeze(0).to(self.device)
        batch, size = batch.contiguous(memory_format=torch.channels_last), (image.shape[1], image.shape[2])
        if self.settings.detector == OWN:
            return PreparedPicture(size, batch)
        with torch.inference_mode():
            return PreparedPicture(size, batch, *self._points(shown, batch))

    def features(self, seen: PreparedPicture) -> Features:
        """Return the features of a prepared image."""
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
        """Reduce an image to the network's size (3, h, w) by area averaging, and crop it to a multiple."""
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
                next="use larger images, or a smaller multiple.",
            )
        return image if size == [height, width] else F.interpolate(image[None], size=size, mode="area")[0]

    def _points(self, shown: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Detect points (n, 2), in pixels of the network's input, and scores (n,); not for detector `own`."""
        if self._function is None:
            grey = (255 * grey_of(shown[None])[0]).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
            points, scores = map(torch.from_numpy, sift(grey, self.settings.count))
            return points.to(self.device, torch.float64), scores.to(self.device)
        picture = self.net.normalisation.in_unit(batch) if self.net.normalisation else batch
        detected = points_of(
            call_detector(self._function, picture), batch, self.settings.count, self.settings.detector
        )
        points = detected[0][: self.settings.count]
        return points, points.new_ones(len(points))

    def macs(self, seen: PreparedPicture) -> int:
        """Count the network's MACs for the descriptors of a prepared image."""
        batch, mask = seen.batch, self.settings.mask or None
        points = seen.points if seen.points is not None else batch.new_zeros(0, 2)
        if self.reads_elements:
            options: Any = {"mask": mask, "align": self.settings.align}
            macs = macs_at(self.net, batch, [points], output=self._output, **options)
            return macs.receptive if self.settings.reach == "receptive" else macs.all
        with keypoints_at([points]):
            return self.net.macs(batch, mask=mask).mask

    def _sample(self, output: Any, batch: Tensor, points: Tensor) -> Tensor:
        """Sample the dense descriptor map at points."""
        descriptors = descriptor_map(output, self._output)
        size = (descriptors.shape[2], descriptors.shape[3])
        y, x = sample_at(points, batch, size, batch.shape[2] / size[0], self.settings.align)
        return descriptors[0, :, y, x].T


def descriptor_map(output: Any, name: str | int | None) -> Tensor:
    """Return the descriptor map (1, C, h, w) among the outputs of a network.

    Raises:
        UnknownName: there is no such output.
        InvalidInput: there is no map of several channels, or more than one.
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
            f"the network returns no map of descriptors, but {', '.join(map(describe, several.values()))}.",
            why="descriptors are read from a map (1, C, h, w) of several channels.",
            next="give module:function of your own that returns the part of the network with such a map, "
            "e.g. the `features` of a classifier.",
        )
    if len(maps) > 1:
        raise InvalidInput(
            f"the network returns {len(maps)} maps of several channels.",
            why="one of them must be the descriptors.",
            next=f"name it: --set output_name={' or '.join(map(str, several))}.",
        )
    return maps[0]
