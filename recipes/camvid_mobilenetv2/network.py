"""The network, weights and data of this recipe."""

from __future__ import annotations

from pathlib import Path

import timm
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

import cadsurgery as cs

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
THIN = ("pole", "sign", "pedestrian")


class Segmenter(nn.Module):
    """timm MobileNetV2, torchvision FCN head, bilinear upsampling; trained at output stride 8."""

    def __init__(self, output_stride: int = 8) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "mobilenetv2_100", features_only=True, output_stride=output_stride, out_indices=(4,)
        )
        self.head = FCNHead(320, len(CLASSES))
        self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}  # images are x / 127.5 - 1

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores at the image's resolution."""
        scores = self.head(self.backbone(x)[0])
        return F.interpolate(scores, size=x.shape[-2:], mode="bilinear", align_corners=False)


def build(data: Path, weights: Path | None = None) -> Segmenter:
    """Build the network with the given weights, or with the weights of a fine-tuned file."""
    file = weights or data / "camvid_mobilenetv2_fcn" / "mobilenetv2_fcn_os8_camvid.fp16.safetensors"
    tensors = {
        name: value.float() if value.is_floating_point() else value for name, value in load_file(file).items()
    }
    model = Segmenter()
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return model.eval()


def images(data: Path, split: str) -> cs.SegmentationData:
    """Return a split of CamVid."""
    return cs.open_data(f"folder:{data / 'camvid'},classes={'/'.join(CLASSES)},ignore=11", split)
