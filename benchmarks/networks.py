"""Networks with random weights that the bench, exports and the recipes refer to as `module:function`."""

from __future__ import annotations

from itertools import pairwise

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import mobilenet_v2, vgg16
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
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


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


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


class Normed(nn.Sequential):
    """A convolution that keeps its size but for the stride, norm and PReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.PReLU(outputs))


class ContextGuidedBlock(nn.Module):
    """A depthwise convolution beside a dilated one, joined, and a gate by the mean over the image."""

    def __init__(self, inputs: int, outputs: int, dilation: int, stride: int = 1) -> None:
        super().__init__()
        self.skips = stride == 1
        width = outputs // 2 if self.skips else outputs
        self.first = Normed(inputs, width, 1 if self.skips else 3, stride)
        self.local = nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
        self.around = nn.Conv2d(width, width, 3, 1, dilation, dilation, groups=width, bias=False)
        self.norm = nn.Sequential(nn.BatchNorm2d(2 * width), nn.PReLU(2 * width))
        self.reduce = nn.Identity() if self.skips else nn.Conv2d(2 * width, outputs, 1, bias=False)
        squeezed = outputs // 8
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.gate = nn.Sequential(
            nn.Linear(outputs, squeezed), nn.ReLU(), nn.Linear(squeezed, outputs), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape, or to half the size."""
        y = self.first(x)
        y = self.reduce(self.norm(torch.cat((self.local(y), self.around(y)), 1)))
        images, channels = y.shape[:2]
        y = y * self.gate(self.pool(y).view(images, channels)).view(images, channels, 1, 1)
        return x + y if self.skips else y


class ContextGuided(nn.Module):
    """Context-guided blocks at strides 4 and 8, with the image pooled to each scale and joined; 19 classes."""

    def __init__(self, blocks: tuple[int, int] = (3, 21)) -> None:
        super().__init__()
        self.stem = nn.Sequential(Normed(3, 32, stride=2), Normed(32, 32), Normed(32, 32))
        self.to_half, self.to_quarter = nn.AvgPool2d(3, 2, 1), nn.Sequential(*(nn.AvgPool2d(3, 2, 1),) * 2)
        self.norms = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.PReLU(width)) for width in (35, 131, 256)
        )
        self.down = nn.ModuleList((ContextGuidedBlock(35, 64, 2, 2), ContextGuidedBlock(131, 128, 4, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ContextGuidedBlock(width, width, dilation) for _ in range(count - 1)))
            for width, dilation, count in zip((64, 128), (2, 4), blocks, strict=True)
        )
        self.head = nn.Conv2d(256, 19, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, 19, H, W)."""
        y = self.norms[0](torch.cat((self.stem(x), self.to_half(x)), 1))
        first = self.down[0](y)
        y = self.norms[1](torch.cat((self.stages[0](first), first, self.to_quarter(x)), 1))
        first = self.down[1](y)
        y = self.head(self.norms[2](torch.cat((first, self.stages[1](first)), 1)))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


def context_guided() -> nn.Module:
    """Build `ContextGuided` of 3 and 21 blocks."""
    return ContextGuided()


def context_guided_twice() -> nn.Module:
    """Build `ContextGuided` with twice the blocks."""
    return ContextGuided((6, 42))


class UNet(nn.Module):
    """Five scales of two convolutions, max pooling, transposed convolutions, skips to whose size maps are padded."""

    def __init__(self, width: int = 64, pairs: int = 1) -> None:
        super().__init__()
        widths = [width << scale for scale in range(5)]
        self.first = _double(3, width)
        self.down = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), *_pairs(a, b, pairs)) for a, b in pairwise(widths)
        )
        self.grow = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.Sequential(*_pairs(2 * a, a, pairs)) for a in widths[:-1])
        self.head = nn.Conv2d(width, 19, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, 19, H, W)."""
        skips = [self.first(x)]
        for stage in self.down:
            skips.append(stage(skips[-1]))
        y = skips.pop()
        for grow, block in zip(reversed(self.grow), reversed(self.up), strict=True):
            skip, y = skips.pop(), grow(y)
            rows, columns = skip.shape[2] - y.shape[2], skip.shape[3] - y.shape[3]
            y = F.pad(y, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
            y = block(torch.cat((skip, y), 1))
        return self.head(y)


def _pairs(inputs: int, outputs: int, count: int) -> list[nn.Module]:
    return [_double(inputs if not place else outputs, outputs) for place in range(count)]


def unet() -> nn.Module:
    """Build `UNet` with 19 classes."""
    return UNet()


def unet_twice() -> nn.Module:
    """Build `UNet` with twice the convolutions of each scale but the first."""
    return UNet(pairs=2)


def resnet50_pyramid() -> nn.Module:
    """Build ResNet-50 with a feature pyramid of 256 channels, as torchvision's detectors have it."""
    return resnet_fpn_backbone(backbone_name="resnet50", weights=None)


def resnet34_unet() -> nn.Module:
    """Build the U-Net on ResNet-34 of segmentation_models_pytorch, which has to be installed."""
    import segmentation_models_pytorch

    network: nn.Module = segmentation_models_pytorch.Unet("resnet34", encoder_weights=None)
    return network


def hrnet_w18() -> nn.Module:
    """Build timm's HRNet-W18 up to its maps."""
    return timm.create_model("hrnet_w18", features_only=True, pretrained=False)
