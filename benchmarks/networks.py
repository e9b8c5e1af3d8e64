"""Networks with random weights that the bench, the export matrix and the recipes refer to as `module:function`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, resnet18, vgg16
from torchvision.models.segmentation.fcn import FCNHead


def vgg16_trunk() -> nn.Module:
    """Build VGG-16 up to conv4_3, as in local features: output stride 8, or 1 without its three pools."""
    return vgg16(weights=None).features[:23]


class Segmentation(nn.Module):
    """A backbone and a head; class scores are resized to the image."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, classes, H, W)."""
        return F.interpolate(self.head(self.trunk(x)), size=x.shape[2:], mode="bilinear", align_corners=False)


def mobilenet_v2_fcn() -> nn.Module:
    """Build MobileNetV2 with an FCN head, 21 classes."""
    return Segmentation(mobilenet_v2(weights=None).features, FCNHead(1280, 21))


class ResNet18UNet(nn.Module):
    """A U-Net on ResNet-18: bilinear upsampling, concatenated skip connections, two 3x3 convolutions per scale."""

    def __init__(self, classes: int = 21) -> None:
        super().__init__()
        resnet = resnet18(weights=None)
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu)
        self.stages = nn.ModuleList(
            [nn.Sequential(resnet.maxpool, resnet.layer1), resnet.layer2, resnet.layer3, resnet.layer4]
        )
        self.up = nn.ModuleList(
            _double(deep + skip, out)
            for deep, skip, out in ((512, 256, 256), (256, 128, 128), (128, 64, 64), (64, 64, 32))
        )
        self.head = nn.Conv2d(32, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, classes, H, W)."""
        skips = [self.stem(x)]
        for stage in self.stages:
            skips.append(stage(skips[-1]))
        deep = skips.pop()
        for block in self.up:
            skip = skips.pop()
            deep = F.interpolate(deep, size=skip.shape[2:], mode="bilinear", align_corners=False)
            deep = block(torch.cat((deep, skip), 1))
        return F.interpolate(self.head(deep), size=x.shape[2:], mode="bilinear", align_corners=False)


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def resnet18_unet() -> nn.Module:
    """Build `ResNet18UNet` with 21 classes."""
    return ResNet18UNet()


class FactorisedBlock(nn.Module):
    """A residual block of four convolutions of 3x1 and 1x3, the second pair dilated."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, (3, 1), padding=(1, 0))
        self.second = nn.Conv2d(width, width, (1, 3), padding=(0, 1))
        self.third = nn.Conv2d(width, width, (3, 1), padding=(dilation, 0), dilation=(dilation, 1))
        self.fourth = nn.Conv2d(width, width, (1, 3), padding=(0, dilation), dilation=(1, dilation))
        self.norm, self.last_norm = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        y = F.relu(self.norm(self.second(F.relu(self.first(x)))))
        return F.relu(x + self.last_norm(self.fourth(F.relu(self.third(y)))))


class PooledDownsampling(nn.Module):
    """A strided convolution beside max pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs - inputs, 3, 2, 1)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to half the size."""
        return F.relu(self.norm(torch.cat((self.conv(x), F.max_pool2d(x, 2, 2)), 1)))


def factorised(rounds: int = 2) -> nn.Module:
    """Build an encoder and decoder of factorised, dilated blocks, 19 classes; `rounds` of dilations 2 to 16."""
    up = [nn.ConvTranspose2d(128, 64, 3, 2, 1, 1), nn.ConvTranspose2d(64, 16, 3, 2, 1, 1)]
    dilated = [FactorisedBlock(128, dilation) for _ in range(rounds) for dilation in (2, 4, 8, 16)]
    return nn.Sequential(
        PooledDownsampling(3, 16),
        PooledDownsampling(16, 64),
        *(FactorisedBlock(64, 1) for _ in range(5 * rounds // 2)),
        PooledDownsampling(64, 128),
        *dilated,
        *(nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU()) for layer in up),
        FactorisedBlock(16, 1),
        nn.ConvTranspose2d(16, 19, 2, 2),
    )


def factorised_twice() -> nn.Module:
    """Build `factorised` with twice the blocks of the encoder."""
    return factorised(4)
