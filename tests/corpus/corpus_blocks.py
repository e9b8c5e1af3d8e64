"""Blocks that networks of the corpus share, and the idioms they stand for."""

from __future__ import annotations

from torch import Tensor, nn

# What users write, in words; the causes of the table of "Any network a user wrote".
IDIOMS = {
    "decisions": "Python that decides by sizes: `if`, `assert`, `isinstance`, `max`, messages with shapes",
    "sizes": "sizes taken apart, counted with and put together again: `int(x.size(2))`, `*x.shape[2:]`, `list(...)`",
    "factories": "tensors made for a size: zeros, `new_zeros`, `linspace`, `arange`",
    "kept": "tensors that `forward` keeps for the next call, made once for each size",
    "modules": "modules made in `forward`, slices of `Sequential`, loops over lists of modules and features",
    "arguments": "arguments of `forward` with defaults, which are no tensors",
    "transposed": "transposed convolutions",
    "dilation": "dilation by design: no stride was removed where it grows",
    "pads": "pads, crops and windows computed in the call",
    "bins": "adaptive pooling to a few bins",
    "norms": "batch norm by another name, other norms",
    "indices": "maximum pooling with indices, and back",
    "dropout": "functional dropouts",
    "data": "`.data`, `detach`, changes in place",
    "copy": "modules that `deepcopy` refuses",
    "wrapped": "hooks, checkpoints, DataParallel, functions of autograd and TorchScript",
    "inputs": "several inputs, a list, a dictionary, the image as a keyword",
    "outputs": "several outputs: a list, a dictionary, a named tuple, a dataclass",
    "resizing": "upsampling by a factor or to a size, shuffled pixels",
    "gates": "attention between channels and positions by means, maxima and products",
    "shapes": "reshaped channels: shuffles, splits, groups",
}


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, batch norm and ReLU that keep the size at stride 1."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def twice(inputs: int, outputs: int) -> nn.Sequential:
    """The two convolutions of a step of a U-Net."""
    return nn.Sequential(conv(inputs, outputs), conv(outputs, outputs))


class Residual(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(inputs, outputs, 3, stride, dilation)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.shortcut is None else self.shortcut(x)
        return self.relu(self.bn2(self.conv2(self.conv1(x))) + identity)


class Encoder(nn.Module):
    """A small ResNet that returns its maps at output strides 4, 8, 16 and 32, or dilated ones of the last stages."""

    widths = (8, 16, 32, 64)

    def __init__(self, inputs: int = 3, output_stride: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(inputs, 8, 3, 2), nn.MaxPool2d(3, 2, 1))
        before, stride, dilation, layers = 8, 4, 1, []
        for width in self.widths:
            step = 1 if not layers else 2
            if stride * step > output_stride:
                dilation, step = dilation * step, 1
            stride *= step
            layers.append(nn.Sequential(Residual(before, width, step), Residual(width, width, 1, dilation)))
            before = width
        self.layer1, self.layer2, self.layer3, self.layer4 = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        c1 = self.layer1(self.stem(x))
        c2 = self.layer2(c1)
        c3 = self.layer3(c2)
        return [c1, c2, c3, self.layer4(c3)]
