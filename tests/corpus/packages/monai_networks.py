"""MONAI: its networks for images of two dimensions."""

from __future__ import annotations

from monai.networks import nets

from benchmarks.zoo.corpus import network


def declare(name: str, **options) -> None:
    """One of them, with random weights."""
    kind = name.partition("-")[0]

    @network(name=name)
    def build():
        return getattr(nets, kind)(**{"spatial_dims": 2, "in_channels": 3, **options})


declare("UNet", out_channels=4, channels=(16, 32, 64, 128), strides=(2, 2, 2))
declare("UNet-residual", out_channels=4, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2)
declare("BasicUNet", out_channels=4)
declare("BasicUNet-nearest", out_channels=4, upsample="nontrainable")
declare("BasicUNetPlusPlus", out_channels=4, features=(16, 16, 32, 64, 128, 16), deep_supervision=True)
declare("AttentionUnet", out_channels=4, channels=(16, 32, 64, 128), strides=(2, 2, 2))
declare("FlexibleUNet", out_channels=4, backbone="efficientnet-b0")
declare("FlexibleUNet-resnet", out_channels=4, backbone="resnet18")
SIZES = {"kernel_size": (3, 3, 3, 3), "strides": (1, 2, 2, 2), "upsample_kernel_size": (2, 2, 2)}
declare("DynUNet", out_channels=4, filters=(16, 32, 64, 128), **SIZES)
declare("DynUNet-supervised", out_channels=4, deep_supervision=True, deep_supr_num=2, res_block=True, **SIZES)
declare("SegResNet", out_channels=4, init_filters=8)
declare("SegResNetDS", out_channels=4, init_filters=16, blocks_down=(1, 2, 2, 2))
declare("VNet", in_channels=1, out_channels=4)
declare("AHNet", out_channels=4)
declare("AutoEncoder", out_channels=3, channels=(16, 32, 64), strides=(2, 2, 2))
declare("HighResNet", out_channels=4)
declare("MedNeXt", out_channels=4, init_filters=16)
declare("RegUNet", num_channel_initial=8, depth=3, out_channels=2)
declare("DenseNet121", out_channels=4)
declare("EfficientNetBN", num_classes=4, model_name="efficientnet-b0", pretrained=False)
declare("ResNetFeatures", model_name="resnet18", pretrained=False)
declare("SEResNet50", num_classes=4)
declare("PatchDiscriminator", channels=16, num_layers_d=3)


@network(name="HoVerNet", size=(256, 256))
def hovernet():
    """Nuclei: a dictionary of three branches."""
    return nets.HoVerNet(mode="fast", in_channels=3, out_classes=5)


@network(name="QuickNAT")
def quicknat():
    """Dense blocks, pooling with indices."""
    return nets.Quicknat(num_classes=4, num_channels=3, num_filters=16)


@network(name="TorchVisionFCModel")
def fully_connected():
    """torchvision's ResNet with another head."""
    return nets.TorchVisionFCModel("resnet18", num_classes=4, use_conv=True, pool=None)
