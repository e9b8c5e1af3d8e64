"""Keypoints, depth, counting, edges, objects: backbones with decoders and heads."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from corpus_blocks import Encoder, Residual, conv, twice
from torch import nn

from benchmarks.zoo.corpus import network


@network("transposed", "norms")
class PoseBaseline(nn.Module):
    """The simple baseline of pose estimation: an encoder, transposed 4/2, heatmaps; batch norms with a momentum."""

    def __init__(self, num_joints: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(8, momentum=0.1), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.layer2, self.layer3 = Residual(8, 8), Residual(8, 16, 2), Residual(16, 32, 2)
        self.up1, self.up2 = (
            nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
            nn.ConvTranspose2d(16, 16, 4, 2, 1, bias=False),
        )
        self.bn2, self.bn3 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.final_layer = nn.Conv2d(16, num_joints, kernel_size=1)

    def forward(self, x):
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.relu(self.bn2(self.up1(x)))
        return self.final_layer(F.relu(self.bn3(self.up2(x))))


class Hourglass(nn.Module):
    """Recursive: down, the same one smaller, up by nearest, plus what stayed."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.up1, self.pool1, self.low1 = Residual(width, width), nn.MaxPool2d(2, 2), Residual(width, width)
        self.low2 = Hourglass(depth - 1, width) if depth > 1 else Residual(width, width)
        self.low3 = Residual(width, width)

    def forward(self, x):
        up1 = self.up1(x)
        low = self.low3(self.low2(self.low1(self.pool1(x))))
        return up1 + F.interpolate(low, size=up1.shape[2:])


@network("modules", "outputs", "resizing")
class StackedHourglass(nn.Module):
    """Two hourglasses with heatmaps after each, stacked in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Sequential(conv(3, 8, 7, 2), nn.MaxPool2d(2, 2), Residual(8, 16))
        self.hgs = nn.ModuleList([Hourglass(3, 16) for _ in range(2)])
        self.outs = nn.ModuleList([nn.Conv2d(16, 5, 1) for _ in range(2)])
        self.merge_features, self.merge_preds = nn.Conv2d(16, 16, 1), nn.Conv2d(5, 16, 1)

    def forward(self, imgs):
        x = self.pre(imgs)
        combined_hm_preds = []
        for i, (hg, out) in enumerate(zip(self.hgs, self.outs)):
            feature = hg(x)
            preds = out(feature)
            combined_hm_preds.append(preds)
            if i < len(self.hgs) - 1:
                x = x + self.merge_preds(preds) + self.merge_features(feature)
        return torch.stack(combined_hm_preds, 1)


@network("outputs", "pads", "modules")
class DepthDisparities(nn.Module):
    """Monocular depth: nearest upsampling, reflected borders, sigmoids of four scales in a dictionary."""

    def __init__(self, scales=range(3)) -> None:
        super().__init__()
        self.encoder, self.scales = Encoder(), scales
        self.convs = OrderedDict()
        widths = Encoder.widths
        for i in range(3, 0, -1):
            self.convs[("upconv", i, 0)] = self.block(64 if i == 3 else widths[i], widths[i - 1])
            self.convs[("upconv", i, 1)] = self.block(2 * widths[i - 1], widths[i - 1])
        for s in self.scales:
            self.convs[("dispconv", s)] = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(widths[s], 1, 3))
        self.decoder = nn.ModuleList(list(self.convs.values()))

    @staticmethod
    def block(a: int, b: int) -> nn.Sequential:
        """3x3 on a reflected border."""
        return nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(a, b, 3), nn.ELU(inplace=True))

    def forward(self, input_image):
        self.outputs = {}
        features = self.encoder((input_image - 0.45) / 0.225)
        x = features[-1]
        for i in range(3, 0, -1):
            x = self.convs[("upconv", i, 0)](x)
            skip = features[i - 1]
            x = [F.interpolate(x, scale_factor=2, mode="nearest")[:, :, : skip.shape[2], : skip.shape[3]]]
            x += [skip]
            x = self.convs[("upconv", i, 1)](torch.cat(x, 1))
            if i - 1 in self.scales:
                self.outputs[("disp", i - 1)] = torch.sigmoid(self.convs[("dispconv", i - 1)](x))
        return self.outputs


@network("resizing", "data", "arguments")
class DepthBins(nn.Module):
    """Bilinear up-projections; depth as the expectation over bins that are a buffer; `scale` with a default."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.register = Encoder(), None
        self.up3, self.up2, self.up1 = conv(96, 32), conv(48, 16), conv(24, 8)
        self.prob = nn.Conv2d(8, 8, 3, padding=1)
        self.register_buffer("centers", torch.linspace(0.1, 10, 8).view(1, 8, 1, 1))

    def join(self, step, x, skip):
        up = F.interpolate(x, size=[skip.size(2), skip.size(3)], mode="bilinear", align_corners=True)
        return step(torch.cat([up, skip.detach()], dim=1))

    def forward(self, image, scale: float = 2.0):
        c1, c2, c3, c4 = self.encoder(image)
        y = self.join(self.up1, self.join(self.up2, self.join(self.up3, c4, c3), c2), c1)
        depth = torch.sum(torch.softmax(self.prob(y), dim=1) * self.centers, dim=1, keepdim=True)
        return F.interpolate(depth, scale_factor=scale, mode="bilinear", align_corners=False)


Prediction = namedtuple("Prediction", ["shrink", "threshold", "binary"])


@network("outputs", "transposed", "resizing")
class TextSpotter(nn.Module):
    """Text (as DB): a pyramid concatenated at stride 4; two transposed 2/2; a named tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.reduce = nn.ModuleList([conv(c, 12, 1) for c in Encoder.widths])
        self.binarize, self.thresh = self.head(), self.head()

    @staticmethod
    def head() -> nn.Sequential:
        """To the image's resolution."""
        return nn.Sequential(
            conv(48, 12), nn.ConvTranspose2d(12, 12, 2, 2), nn.BatchNorm2d(12), nn.ReLU(),
            nn.ConvTranspose2d(12, 1, 2, 2), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x):
        c2, c3, c4, c5 = (r(f) for r, f in zip(self.reduce, self.encoder(x)))
        p4 = F.interpolate(c5, size=c4.size()[2:], mode="nearest") + c4
        p3 = F.interpolate(p4, size=c3.size()[2:], mode="nearest") + c3
        p2 = F.interpolate(p3, size=c2.size()[2:], mode="nearest") + c2
        h, w = p2.size()[2:]
        y = torch.cat([p2, *(F.interpolate(p, size=(h, w), mode="nearest") for p in (p3, p4, c5))], dim=1)
        shrink, threshold = self.binarize(y), self.thresh(y)
        return Prediction(shrink, threshold, torch.reciprocal(1 + torch.exp(-50 * (shrink - threshold))))


@dataclass
class Detections:
    """What a detector returns."""

    boxes: list
    scores: list


@network("outputs", "modules", "norms")
class DenseDetector(nn.Module):
    """Heads shared by the levels of a pyramid, group norms, a learned scale each; a dataclass of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.lateral = nn.ModuleList([nn.Conv2d(c, 16, 1) for c in Encoder.widths[1:]])
        self.p6 = nn.Conv2d(16, 16, 3, 2, 1)
        self.tower = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU())
        self.cls, self.reg = nn.Conv2d(16, 3, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(1.0)) for _ in range(4)])

    def forward(self, x):
        c3, c4, c5 = (lateral(f) for lateral, f in zip(self.lateral, self.encoder(x)[1:]))
        p4 = c4 + F.interpolate(c5, size=c4.shape[-2:])
        p3 = c3 + F.interpolate(p4, size=c3.shape[-2:])
        levels = [p3, p4, c5, self.p6(F.relu(c5))]
        towers = [self.tower(p) for p in levels]
        boxes = [F.relu(self.reg(t) * s) for t, s in zip(towers, self.scales)]
        return Detections(boxes=boxes, scores=[self.cls(t) for t in towers])


@network("resizing", "shapes", "outputs")
class OneStage(nn.Module):
    """Focus slices, cross-stage halves, pools of 5 in a row, nearest doubling, three flat heads (as YOLO)."""

    def __init__(self) -> None:
        super().__init__()
        self.focus, self.down1, self.down2 = conv(12, 8), conv(8, 12, 3, 2), conv(12, 16, 3, 2)
        self.down3, self.pool = conv(16, 24, 3, 2), nn.MaxPool2d(5, 1, 2)
        self.spp, self.neck = conv(96, 16, 1), conv(32, 16)
        self.upsample = nn.Upsample(None, 2, "nearest")
        self.heads = nn.ModuleList([nn.Conv2d(16, 3 * 7, 1), nn.Conv2d(16, 3 * 7, 1)])

    def forward(self, x):
        x = torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)
        c2 = self.down2(self.down1(self.focus(x)))
        c3 = self.down3(c2)
        y1 = self.pool(c3)
        y2 = self.pool(y1)
        c3 = self.spp(torch.cat((c3, y1, y2, self.pool(y2)), 1))
        maps = [self.neck(torch.cat([self.upsample(c3)[..., : c2.shape[2], : c2.shape[3]], c2], 1)), c3]
        z = []
        for head, m in zip(self.heads, maps):
            y = head(m)
            bs, _, ny, nx = y.shape
            z.append(y.view(bs, 3, 7, ny, nx).permute(0, 1, 3, 4, 2).contiguous())
        return z


@network("indices", "inputs", call=lambda x: (x, x[:, :1].sigmoid()))
class IndexMatting(nn.Module):
    """Matting: image and trimap side by side, pooled with indices, unpooled; alpha between 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.enc3 = twice(4, 8), twice(8, 16), twice(16, 32)
        self.dec2, self.dec1, self.out = conv(32, 16, 5), conv(16, 8, 5), nn.Conv2d(8, 1, 5, padding=2)

    def forward(self, image, trimap):
        x1, id1 = F.max_pool2d(self.enc1(torch.cat([image, trimap], 1)), (2, 2), (2, 2), return_indices=True)
        x2, id2 = F.max_pool2d(self.enc2(x1), (2, 2), (2, 2), return_indices=True)
        y = self.dec2(self.enc3(x2))
        y = F.max_unpool2d(y, id2, kernel_size=2, stride=2, output_size=x1.shape[2:])
        y = F.max_unpool2d(self.dec1(y), id1, kernel_size=2, stride=2, output_size=image.shape[2:])
        return torch.clamp(self.out(y), 0, 1)
