"""D2-Net's VGG-16 trunk (Dusmanu et al., CVPR 2019), as used for content-adaptive downsampling (Hesse et al., CVPRW
2023): released weights, output stride 8 with all pools and 1 without pools.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchvision.models.vgg import make_layers

import cadsurgery as cs
from cadsurgery.data.weight_files import read_weights

BUILDER = "recipes.d2net_vgg.network:trunk"
CHANNELS: tuple[Any, ...] = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512)
PREFIX = "dense_feature_extraction.model."  # prefix of the released file's keys
# Number of pools, from the first, that the published networks keep at each output stride.
POOLS = {8: 3, 4: 2, 2: 1, 1: 0}
MEAN = (123.68, 116.779, 103.939)  # means of Caffe's VGG, RGB in 0..255


class Trunk(nn.Module):
    """VGG-16 up to the activation of conv4_3, (B, 3, H, W) to (B, 512, H / s, W / s).

    Its input is RGB in 0..255 minus the means; it converts to BGR itself.
    """

    pretrained_cfg = {"mean": tuple(value / 255 for value in MEAN), "std": (1 / 255,) * 3}  # noqa: RUF012

    def __init__(self, output_stride: int = 8) -> None:
        """Build the network with random weights.

        Args:
            output_stride: 8 as trained; for 4, 2 and 1 the last pools are omitted and later layers are dilated.

        Raises:
            InvalidInput: the output stride is not one of these.
        """
        super().__init__()
        if output_stride not in POOLS:
            raise cs.InvalidInput(
                f"output_stride={output_stride} is not possible.",
                next=f"use one of {', '.join(map(str, POOLS))}.",
            )
        layers = make_layers(list(CHANNELS))
        pools, dilation = 0, 1
        for index, layer in enumerate(layers):
            if isinstance(layer, nn.MaxPool2d):
                pools += 1
                if pools > POOLS[output_stride]:
                    layers[index], dilation = nn.Identity(), 2 * dilation
            elif isinstance(layer, nn.Conv2d):
                layer.dilation = layer.padding = (dilation, dilation)
        self.model = layers
        self.register_load_state_dict_pre_hook(_without_prefix)

    def forward(self, image: Tensor) -> Tensor:
        """Return the map of an image (B, 3, H, W) in RGB."""
        return self.model(image.flip(1))


def _without_prefix(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Remove the prefix of released files, so that e.g. `cadsurgery ... --weights d2_tf.pth` loads them."""
    for name in [name for name in state if name.startswith(f"{prefix}{PREFIX}")]:
        state[f"{prefix}model.{name.removeprefix(f'{prefix}{PREFIX}')}"] = state.pop(name)


def trunk(output_stride: int = 8) -> Trunk:
    """Build the trunk with random weights; see `Trunk`."""
    return Trunk(output_stride)


def load_released(net: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Load the weights of a released file, `d2_tf.pth` or a sibling, into a trunk or a converted trunk.

    Raises:
        FileError: the file is missing or unreadable; tensors are missing, unknown, in another order or of another
            shape.
    """
    if isinstance(source, Mapping):
        state = source
    else:  # a released file has a loss beside its dictionary of tensors
        state = max((weights.state for weights in read_weights(Path(source))), key=_tensors_in)
    net.load_state_dict(from_released(state, net.state_dict()))


def _tensors_in(state: Mapping[str, object]) -> int:
    return sum(isinstance(value, Tensor) for value in state.values())


def from_released(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the released tensors under the trunk's names, each used once.

    Raises:
        FileError: see `load_released`.
    """
    renamed = {key.removeprefix(PREFIX): value for key, value in state.items()}
    names = [name.removeprefix("model.") for name in own]
    differences = "; ".join(sorted(set(renamed) ^ set(names))[:4])
    if list(renamed) != names or len(renamed) != len(state):
        raise cs.FileError(
            "this is no released D2-Net file.",
            where=differences or "the order of its tensors",
            why=f"it has {len(state)} tensors; the trunk has {len(names)}, {PREFIX}{names[0]} to {PREFIX}{names[-1]}.",
            next="give d2_tf.pth as it was downloaded.",
        )
    found = {name: renamed[name.removeprefix("model.")] for name in own}
    wrong = [name for name, value in found.items() if value.shape != own[name].shape]
    if wrong:
        raise cs.FileError(
            f"the shape of {wrong[0]} is {tuple(found[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}.",
            next="give d2_tf.pth as it was downloaded.",
        )
    return found


def released_state(net: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a trunk in the released format."""
    return {f"{PREFIX}{name.removeprefix('model.')}": value for name, value in net.state_dict().items()}
