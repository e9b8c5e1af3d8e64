"""Networks of other people's libraries, as they are: built by their own classes, converted without a wrapper, compared.

    python -m benchmarks.zoo.libraries [LIBRARY...] --out FILE

Every network has random weights and is small: fewer channels and blocks where its library lets one choose, its
smallest size where not. A library that is not installed is skipped, and that is said. Networks that are in the file
already are not checked again.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.as_they_are import check_as_it_is
from benchmarks.zoo.check import Check, Limits, check_networks
from benchmarks.zoo.corpus import Builder, Call, Subject
from cadsurgery.tasks.zoo_record import Row

ROWS = Path(__file__).with_name("libraries.jsonl")
Declared = dict[str, Builder | tuple[Builder, Call]]


@dataclass(frozen=True)
class Library:
    """A library and its networks.

    Attributes:
        package: name under which it is installed.
        declare: imports it and returns its networks by name: a builder, or a builder and its `Subject.call`.
        written: patterns of the networks that are also written as ONNX files.
        sizes: image sizes of networks that take few, by pattern.
    """

    package: str
    declare: Callable[[], Declared]
    written: tuple[str, ...] = ()
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """The installed version; "" if it is not installed."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return ""

    def subjects(self, name: str) -> Iterator[Subject]:
        """Yield its networks."""
        for network, declared in self.declare().items():
            build, call = declared if isinstance(declared, tuple) else (declared, None)
            fixed = [size for pattern, size in self.sizes.items() if fnmatch.fnmatch(network, pattern)]
            yield Subject(f"{name}:{network}", name, build, call=call, size=fixed[0] if fixed else None)


# -- transformers ----------------------------------------------------------------------------------------


def _transformers() -> Declared:
    """Of each convolutional family its classes, from small configurations; and families with attention."""
    tf = importlib.import_module("transformers")
    four = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    heads = {"num_attention_heads": [1, 1, 2, 2]}
    configs: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
        "ResNet": ("ResNetConfig", {**four, "embedding_size": 16}, ("ForImageClassification", "Model", "Backbone")),
        "RegNet": (
            "RegNetConfig",
            {**four, "embedding_size": 16, "groups_width": 8},
            ("ForImageClassification", "Model"),
        ),
        "ConvNext": ("ConvNextConfig", four, ("ForImageClassification", "Model", "Backbone")),
        "ConvNextV2": ("ConvNextV2Config", four, ("ForImageClassification", "Model", "Backbone")),
        "DINOv3ConvNext": ("DINOv3ConvNextConfig", four, ("Model", "Backbone")),
        "MobileNetV1": ("MobileNetV1Config", {"depth_multiplier": 0.25}, ("ForImageClassification",)),
        "MobileNetV2": (
            "MobileNetV2Config",
            {"depth_multiplier": 0.35},
            ("ForImageClassification", "ForSemanticSegmentation"),
        ),
        "EfficientNet": (
            "EfficientNetConfig",
            {"width_coefficient": 0.25, "depth_coefficient": 0.25, "hidden_dim": 320},
            ("ForImageClassification",),
        ),
        "Bit": (
            "BitConfig",
            {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1], "embedding_size": 32, "num_groups": 8},
            ("ForImageClassification", "Backbone"),
        ),
        "PoolFormer": ("PoolFormerConfig", four, ("ForImageClassification", "Model")),
        "FocalNet": (
            "FocalNetConfig",
            {"embed_dim": 16, "depths": [1, 1, 1, 1]},
            ("ForImageClassification",),
        ),
        "HGNetV2": ("HGNetV2Config", {}, ("ForImageClassification", "Backbone")),
        "RTDetrResNet": (
            "RTDetrResNetConfig",
            {**four, "embedding_size": 16, "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]},
            ("Backbone",),
        ),
        "TextNet": ("TextNetConfig", {}, ("ForImageClassification", "Backbone")),
        "PPLCNet": ("PPLCNetConfig", {}, ("ForImageClassification", "Backbone")),
        "PPLCNetV3": ("PPLCNetV3Config", {}, ("Backbone",)),
        "SuperPoint": ("SuperPointConfig", {}, ("ForKeypointDetection",)),
        "Segformer": (
            "SegformerConfig",
            {**four, **heads, "decoder_hidden_size": 16},
            ("ForSemanticSegmentation", "ForImageClassification"),
        ),
        "GLPN": ("GLPNConfig", {**four, **heads, "decoder_hidden_size": 16}, ("ForDepthEstimation",)),
        "PvtV2": ("PvtV2Config", {**four, **heads}, ("ForImageClassification", "Backbone")),
        "Cvt": (
            "CvtConfig",
            {
                "embed_dim": [16, 32, 48],
                "depth": [1, 2, 3],
                "num_heads": [1, 2, 2],
                "drop_path_rate": [0.0, 0.0, 0.0],
            },
            ("ForImageClassification",),
        ),
        "MobileViT": (
            "MobileViTConfig",
            {"hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]},
            ("ForImageClassification", "ForSemanticSegmentation"),
        ),
        "MobileViTV2": (
            "MobileViTV2Config",
            {"width_multiplier": 0.25},
            ("ForImageClassification", "ForSemanticSegmentation"),
        ),
        "SwiftFormer": (
            "SwiftFormerConfig",
            {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 48, 64]},
            ("ForImageClassification",),
        ),
        "Levit": (
            "LevitConfig",
            {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]},
            ("ForImageClassification",),
        ),
        "PPOCRV5MobileDet": ("PPOCRV5MobileDetConfig", {}, ("ForObjectDetection",)),
    }  # fmt: skip
    found: Declared = {}
    for family, (config, options, kinds) in configs.items():
        for kind in kinds:
            more = stages if kind == "Backbone" and "out_features" not in options else {}
            more = {"out_features": ["stage2", "stage3"]} if more and family == "PPLCNetV3" else more
            labels = {"num_labels": 5} if kind.startswith("ForImage") or kind.startswith("ForSem") else {}
            found[family + kind] = partial(
                _from_config, tf, family + kind, config, {**options, **more, **labels}
            )
    for name, how in _on_backbones(four).items():
        found[name] = partial(_on_backbone, tf, name, *how)
    for name in ("resnet18", "mobilenetv3_small_050"):
        found[f"TimmWrapperForImageClassification-{name}"] = partial(
            _from_config,
            tf,
            "TimmWrapperForImageClassification",
            "TimmWrapperConfig",
            {"architecture": name, "num_labels": 5},
        )
    found["TimmBackbone-resnet18"] = partial(
        _from_config,
        tf,
        "TimmBackbone",
        "TimmBackboneConfig",
        {"backbone": "resnet18", "use_pretrained_backbone": False, "out_indices": (1, 2, 3, 4)},
    )
    return found


def _from_config(tf: Any, name: str, config: str, options: dict[str, Any]) -> nn.Module:
    network: nn.Module = getattr(tf, name)(getattr(tf, config)(**options))
    return network


# The smallest encoder and decoder of networks like DETR.
SMALL_DETR = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 10,
}


def _on_backbones(four: dict[str, Any]) -> dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """Return networks around a backbone by name: their configuration, the backbone's, and the options of both."""
    residual = {**four, "embedding_size": 16}
    stages = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
    upernet = {"hidden_size": 32, "auxiliary_in_channels": 48}
    channels = {"encoder_in_channels": [32, 48, 64], "decoder_in_channels": [32, 32, 32]}
    real_time = {**residual, "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}
    masks = {"fpn_feature_size": 32, "mask_feature_size": 32}
    return {
        "UperNetForSemanticSegmentation-ConvNext": ("UperNet", "ConvNext", {**four, **stages}, upernet),
        "UperNetForSemanticSegmentation-ResNet": ("UperNet", "ResNet", {**residual, **stages}, upernet),
        "RTDetrForObjectDetection": (
            *("RTDetr", "RTDetrResNet", real_time),
            {**SMALL_DETR, **channels, "encoder_hidden_dim": 32},
        ),
        "DetrForObjectDetection": (
            *("Detr", "ResNet", {**residual, "out_features": ["stage4"]}),
            {**SMALL_DETR, "use_timm_backbone": False, "backbone": None},
        ),
        "MaskFormerForInstanceSegmentation": ("MaskFormer", "ResNet", {**residual, **stages}, masks),
    }


def _on_backbone(
    tf: Any, name: str, config: str, backbone: str, own: dict[str, Any], options: dict[str, Any]
) -> nn.Module:
    """Build a network around a backbone of another family, each from its configuration."""
    given = {"backbone_config": getattr(tf, f"{backbone}Config")(**own), "num_labels": 5, **options}
    if config == "MaskFormer":
        given["decoder_config"] = tf.DetrConfig(**SMALL_DETR)
    return _from_config(tf, name.partition("-")[0], f"{config}Config", given)


# -- ultralytics -----------------------------------------------------------------------------------------

# Tasks by the end of a file's name; the class of `ultralytics.nn.tasks` that reads it.
TASKS = {
    "-seg": "SegmentationModel",
    "-seg-p6": "SegmentationModel",
    "-pose": "PoseModel",
    "-pose-p6": "PoseModel",
    "-obb": "OBBModel",
    "-cls": "ClassificationModel",
    "-cls-resnet18": "ClassificationModel",
    "-cls-resnet50": "ClassificationModel",
    "-sem": "SemanticSegmentationModel",
    "-depth": "DepthModel",
    "-world": "WorldModel",
    "-worldv2": "WorldModel",
    "-rtdetr": "RTDETRDetectionModel",
}
# Files whose networks have one size: too large for a check in a minute are those of their last letters.
LARGE = ("yolov3-spp", "yolov9m", "yolov9c", "yolov9e", "rtdetr-", "yolov8-cls-resnet", "yolov5-p6")


def _ultralytics() -> Declared:
    """Every YAML file of a network, at its smallest scale."""
    configs = importlib.import_module("ultralytics.cfg.models")
    folder = Path(next(iter(configs.__path__)))
    found: Declared = {}
    for file in sorted(folder.glob("*/*.yaml")):
        name = file.stem
        if name.startswith(LARGE) or (name.startswith("yolov10") and name != "yolov10n"):
            continue
        ending = max((end for end in TASKS if name.endswith(end)), key=len, default="")
        kind = TASKS.get(ending, "DetectionModel")
        kind = "RTDETRDetectionModel" if name.startswith("rtdetr") else kind
        if name.startswith("yoloe"):
            kind = "YOLOESegModel" if ending == "-seg" else "YOLOEModel"
        found[name] = partial(_yolo, file, kind)
    return found


def _yolo(file: Path, kind: str) -> nn.Module:
    """The network of a file at scale n, with the usual number of classes."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    settings = tasks.yaml_model_load(file)
    settings["scale"] = min(settings.get("scales", {"n": 0}), key=lambda name: "nslmx".find(name[0]))
    for _, _, module, arguments in (layer for part in ("backbone", "head") for layer in settings[part]):
        if module == "TorchVision":
            arguments[2] = None  # its weights
    network: nn.Module = getattr(tasks, kind)(settings, verbose=False)
    return network


# -- other libraries -------------------------------------------------------------------------------------


def _built(module: str, name: str, *args: Any, **options: Any) -> Builder:
    """Return a builder by the name of a class or function of a module, imported when it is called."""

    def build() -> nn.Module:
        network: nn.Module = getattr(importlib.import_module(module), name)(*args, **options)
        return network

    return build


def _doctr() -> Declared:
    """Detectors, classifiers, and the recogniser that is convolutional up to its recurrence."""
    importlib.import_module("doctr.models")
    detectors = ("db_mobilenet_v3_large", "linknet_resnet18", "fast_tiny")
    plain = {"pretrained": False, "pretrained_backbone": False}
    found: Declared = {}
    forms = {"": plain, " (exportable)": {**plain, "exportable": True}}
    others = (("recognition", "crnn_mobilenet_v3_small"), ("table_structure", "tablecenternet"))
    for module, name in (*(("detection", name) for name in detectors), *others):
        for form, options in forms.items():
            found[f"{name}{form}"] = _built(f"doctr.models.{module}", name, **options)
    classifiers = (
        *("mobilenet_v3_small", "mobilenet_v3_small_r", "resnet18", "resnet31", "textnet_tiny", "vgg16_bn_r"),
        *("starnet_s3",),
    )
    found |= {name: _built("doctr.models.classification", name, pretrained=False) for name in classifiers}
    return found


def _easyocr() -> Declared:
    """The detector of the default reader, and its recognisers."""
    importlib.import_module("easyocr")
    return {
        "CRAFT": _built("easyocr.craft", "CRAFT", pretrained=False),
        "recogniser (vgg)": (_built("easyocr.model.vgg_model", "Model", 1, 64, 32, 97), _grey_with_text),
        "recogniser (resnet)": (_built("easyocr.model.model", "Model", 1, 64, 32, 97), _grey_with_text),
        "features (vgg)": _built("easyocr.model.modules", "VGG_FeatureExtractor", 1, 64),
        "features (resnet)": _built("easyocr.model.modules", "ResNet_FeatureExtractor", 1, 64),
    }


def _grey_with_text(image: Tensor) -> tuple[Tensor, Tensor]:
    return image[:, :1], torch.zeros(len(image), 1, dtype=torch.long)


def _monai() -> Declared:
    """Its networks for images of two dimensions."""
    importlib.import_module("monai.networks.nets")
    sizes = {"kernel_size": (3, 3, 3, 3), "strides": (1, 2, 2, 2), "upsample_kernel_size": (2, 2, 2)}
    small = {"out_channels": 4, "channels": (8, 16, 32, 64), "strides": (2, 2, 2)}
    options: dict[str, dict[str, Any]] = {
        "UNet": small,
        "UNet-residual": {**small, "num_res_units": 2},
        "UNet-batch": {**small, "norm": "batch", "act": "relu"},
        "BasicUNet": {"out_channels": 4, "features": (8, 8, 16, 32, 64, 8)},
        "BasicUNetPlusPlus": {"out_channels": 4, "features": (8, 8, 16, 32, 64, 8), "deep_supervision": True},
        "AttentionUnet": small,
        "FlexibleUNet": {"out_channels": 4, "backbone": "efficientnet-b0"},
        "FlexibleUNet-resnet": {"out_channels": 4, "backbone": "resnet18"},
        "DynUNet": {"out_channels": 4, "filters": (8, 16, 32, 64), **sizes},
        "DynUNet-supervised": {
            **sizes,
            "out_channels": 4,
            "filters": (8, 16, 32, 64),
            "deep_supervision": True,
            "deep_supr_num": 2,
            "res_block": True,
        },
        "SegResNet": {"out_channels": 4, "init_filters": 8},
        "SegResNetDS": {"out_channels": 4, "init_filters": 8, "blocks_down": (1, 2, 2, 2)},
        "VNet": {"in_channels": 1, "out_channels": 4},
        "AutoEncoder": {"out_channels": 3, "channels": (8, 16, 32), "strides": (2, 2, 2)},
        "MedNeXt": {"out_channels": 4, "init_filters": 8},
        "RegUNet": {"num_channel_initial": 8, "depth": 3, "out_channels": 2},
        "DenseNet121": {"out_channels": 4, "growth_rate": 8, "block_config": (2, 2, 2, 2), "init_features": 16},
        "EfficientNetBN": {"num_classes": 4, "model_name": "efficientnet-b0", "pretrained": False},
        "SegResNetVAE": {"out_channels": 4, "init_filters": 8, "input_image_size": (96, 160)},
        "PatchDiscriminator": {"channels": 16, "num_layers_d": 3},
    }  # fmt: skip
    found: Declared = {
        name: _built(
            "monai.networks.nets", name.partition("-")[0], **{"spatial_dims": 2, "in_channels": 3, **given}
        )
        for name, given in options.items()
    }
    found["QuickNAT"] = _quicknat
    return found


def _quicknat() -> nn.Module:
    """QuickNAT, which MONAI builds without the package that its forward needs."""
    importlib.import_module("squeeze_and_excitation")
    return _built("monai.networks.nets", "Quicknat", num_classes=4, num_channels=3, num_filters=16)()


def _nnunet() -> Declared:
    """nnU-Net's architectures in two dimensions, with the norm and activation of its plans."""
    module = "dynamic_network_architectures.architectures"
    importlib.import_module(f"{module}.unet")
    plan: dict[str, Any] = {
        "input_channels": 1,
        "n_stages": 5,
        "features_per_stage": [8, 16, 32, 48, 64],
        "conv_op": nn.Conv2d,
        "kernel_sizes": 3,
        "strides": [1, 2, 2, 2, 2],
        "num_classes": 3,
        "conv_bias": True,
        "norm_op": nn.InstanceNorm2d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    }
    decoder = {"n_conv_per_stage_decoder": [1, 1, 1, 1]}
    batch = {"norm_op": nn.BatchNorm2d, "norm_op_kwargs": {}}
    of_plan = {"n_conv_per_stage": 2, **plan, **decoder}
    residual = {"n_blocks_per_stage": [1, 1, 2, 2, 2], **plan}
    return {
        "PlainConvUNet": _built(f"{module}.unet", "PlainConvUNet", **of_plan),
        "PlainConvUNet-supervised": _built(
            f"{module}.unet", "PlainConvUNet", **of_plan, deep_supervision=True
        ),
        "PlainConvUNet-batch": _built(f"{module}.unet", "PlainConvUNet", **{**of_plan, **batch}),
        "ResidualEncoderUNet": _built(f"{module}.unet", "ResidualEncoderUNet", **residual, **decoder),
        "ResidualEncoderUNet-batch": _built(
            f"{module}.unet", "ResidualEncoderUNet", **{**residual, **batch}, **decoder
        ),
        "ResidualUNet": _built(
            f"{module}.unet", "ResidualUNet", **residual, n_conv_per_stage_decoder=[1, 1, 1, 1]
        ),
        "ResNet18": _built(f"{module}.resnet", "ResNet18", 5),
        "ResNet50bn": _built(f"{module}.resnet", "ResNet50bn", 5),
    }


def _kornia() -> Declared:
    """Its convolutional networks for images."""
    importlib.import_module("kornia.feature")
    return {
        "DISK": lambda: importlib.import_module("kornia.feature").DISK().unet,
        "DexiNed": _built("kornia.models.dexined", "DexiNed", pretrained=False),
        "SOLD2": lambda: importlib.import_module("kornia.feature").SOLD2_detector(pretrained=False).model,
        "XFeat": lambda: importlib.import_module("kornia.feature").XFeat().net,
        "ALIKED": _built("kornia.feature", "ALIKED"),
        "KeyNet": _built("kornia.feature", "KeyNet", pretrained=False),
        "HardNet": _built("kornia.feature", "HardNet", pretrained=False),
        "DeDoDe-detector": lambda: (
            importlib.import_module("kornia.feature").DeDoDe(descriptor_model="B").detector
        ),
        "SmallSRNet": _built("kornia.models.small_sr", "SmallSRNet", upscale_factor=3, pretrained=False),
        "RRDBNet": _built("kornia.models.rrdbnet", "RRDBNet", 3, 3, num_feat=16, num_block=2, num_grow_ch=8),
        "YuNet": _built("kornia.models.yunet.model", "YuNet", "test", pretrained=False),
        "EfficientViT-b0": _built("kornia.models.efficient_vit.backbone", "efficientvit_backbone_b0"),
        "ResNetD18": lambda: importlib.import_module(
            "kornia.models.rt_detr.architecture.resnet_d"
        ).ResNetD.from_config(18),
    }


def _spandrel() -> Declared:
    """Restoration and super-resolution; architectures with attention over windows among them."""
    importlib.import_module("spandrel")
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "Compact": ("SRVGGNetCompact", {"num_feat": 16, "num_conv": 3}),
        "DRUNet": ("DRUNet", {"in_nc": 3, "out_nc": 3, "nc": [16, 32, 48, 64], "nb": 1}),
        "DnCNN": ("DnCNN", {"in_nc": 3, "out_nc": 3, "nc": 16, "nb": 4}),
        "ESRGAN": ("RRDBNet", {"num_filters": 16, "num_blocks": 2, "scale": 2}),
        "ESRGAN-unshuffle": (
            "RRDBNet",
            {"in_nc": 12, "num_filters": 16, "num_blocks": 2, "scale": 4, "shuffle_factor": 2},
        ),
        "FBCNN": ("FBCNN", {"nc": [8, 8, 16, 512], "nb": 1}),
        "HVICIDNet": ("CIDNet", {"channels": [12, 12, 24, 48]}),
        "KBNet": (
            "KBNet_s",
            {"width": 16, "middle_blk_num": 1, "enc_blk_nums": [1, 1, 1, 1], "dec_blk_nums": [1, 1, 1, 1]},
        ),
        "MixDehazeNet": ("MixDehazeNet", {}),
        "MoESR": ("MoESR", {"dim": 16, "n_blocks": 1, "n_block": 1}),
        "MoSR": ("MoSR", {"dim": 16, "n_block": 2}),
        "NAFNet": (
            "NAFNet",
            {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1, 1, 1], "dec_blk_nums": [1, 1, 1, 1]},
        ),
        "PLKSR": ("PLKSR", {"dim": 16, "n_blocks": 2}),
        "RealPLKSR": ("RealPLKSR", {"dim": 16, "n_blocks": 2}),
        "RealPLKSR-dysample": ("RealPLKSR", {"dim": 16, "n_blocks": 2, "dysample": True}),
        "RCAN": ("RCAN", {"n_resgroups": 1, "n_resblocks": 2, "n_feats": 16}),
        "RealCUGAN-2x": ("UpCunet2x", {}),
        "RealCUGAN-4x": ("UpCunet4x", {}),
        "SAFMN": ("SAFMN", {"dim": 16, "n_blocks": 2}),
        "SAFMNBCIE": ("SAFMN_BCIE", {"dim": 16, "n_blocks": 1, "num_layers": 1}),
        "SPAN": ("SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 16}),
        "SeemoRe": ("SeemoRe", {"num_experts": 2, "num_layers": 1, "embedding_dim": 16}),
        "SwiftSRGAN": ("Generator", {"num_channels": 16, "num_blocks": 2}),
        "SCUNet": ("SCUNet", {"config": [1] * 7, "dim": 64}),
        "OmniSR": ("OmniSR", {"num_feat": 16}),
        "DITN": ("DITN_Real", {"dim": 12, "ITL_blocks": 1, "SAL_blocks": 1}),
    }  # fmt: skip
    folders = {"RealPLKSR": "PLKSR", "RealPLKSR-dysample": "PLKSR"}
    found: Declared = {
        name: partial(_of_spandrel, folders.get(name, name.partition("-")[0]), kind, given)
        for name, (kind, given) in options.items()
    }
    found["LaMa"] = (_small_lama, _with_a_hole)
    return found


def _small_lama() -> nn.Module:
    """LaMa, whose class has no options, around a small generator."""
    network = _of_spandrel("LaMa", "LaMa", {"in_nc": 4})
    generator = _of_spandrel(
        "LaMa", "FFCResNetGenerator", {"input_nc": 4, "output_nc": 3, "ngf": 8, "n_blocks": 2}
    )
    network.model = generator
    return network


def _with_a_hole(image: Tensor) -> tuple[Tensor, Tensor]:
    """An image and the mask of what is to be filled."""
    hole = torch.zeros_like(image[:, :1])
    hole[..., 20:40, 30:60] = 1
    return image, hole


def _of_spandrel(folder: str, kind: str, options: dict[str, Any]) -> nn.Module:
    """A class of spandrel's own modules, whose names begin with underscores."""
    package = importlib.import_module(f"spandrel.architectures.{folder}.__arch")
    for file in sorted(Path(next(iter(package.__path__))).glob("*.py")):
        module = importlib.import_module(f"{package.__name__}.{file.stem}")
        if hasattr(module, kind):
            network: nn.Module = getattr(module, kind)(**options)
            return network
    raise ImportError(f"no {kind} in {package.__name__}")


def _torchgeo() -> Declared:
    """Segmentation and change detection of satellite images."""
    importlib.import_module("torchgeo.models")
    no_weights = {"encoder_weights": None, "classes": 3, "decoder_channels": (64, 48, 32, 16, 8)}
    found: Declared = {
        "FCN": _built("torchgeo.models", "FCN", 4, 3, num_filters=16),
        "FarSeg-resnet18": _built(
            "torchgeo.models", "FarSeg", "resnet18", classes=3, backbone_pretrained=False
        ),
        "RCF": _built("torchgeo.models", "RCF", in_channels=4, features=16),
        "resnet18 (Sentinel-2)": _built("torchgeo.models", "resnet18", in_chans=13),
    }
    for kind in ("FCSiamConc", "FCSiamDiff"):
        found[f"{kind}-resnet18"] = (
            _built("torchgeo.models", kind, encoder_name="resnet18", **no_weights),
            _two_dates,
        )
    found["ChangeStarFarSeg-resnet18"] = (
        _built("torchgeo.models", "ChangeStarFarSeg", "resnet18", classes=2, backbone_pretrained=False),
        _two_dates,
    )
    return found


def _two_dates(image: Tensor) -> Tensor:
    """Two images of the same place, (B, 2, C, H, W)."""
    return torch.stack([image, image.flip(3)], 1)


def _controlnet_aux() -> Declared:
    """The networks of its annotators."""
    importlib.import_module("controlnet_aux")
    return {
        "HED": _built("controlnet_aux.hed", "ControlNetHED_Apache2"),
        "Lineart": _built("controlnet_aux.lineart", "Generator", 3, 1, 3),
        "LineartAnime": lambda: importlib.import_module("controlnet_aux.lineart_anime").UnetGenerator(
            3, 1, 6, 16, norm_layer=partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)
        ),
        "MLSD-large": _built("controlnet_aux.mlsd.models.mbv2_mlsd_large", "MobileV2_MLSD_Large"),
        "MLSD-tiny": _built("controlnet_aux.mlsd.models.mbv2_mlsd_tiny", "MobileV2_MLSD_Tiny"),
        "OpenPose-body": _built("controlnet_aux.open_pose.model", "bodypose_model"),
        "OpenPose-hand": _built("controlnet_aux.open_pose.model", "handpose_model"),
        "OpenPose-face": _built("controlnet_aux.open_pose.face", "FaceNet"),
        "TEED": _built("controlnet_aux.teed.ted", "TED"),
        "PiDiNet": lambda: importlib.import_module("controlnet_aux.pidi.model").pidinet(),
    }


def _smp() -> Declared:
    """Every decoder on a small encoder, and one decoder on encoders of several families."""
    importlib.import_module("segmentation_models_pytorch")
    decoders = (
        *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "UPerNet", "Segformer"),
        *("DeepLabV3", "DeepLabV3Plus", "DPT"),
    )
    pairs = [*product(decoders, ("resnet18",))]
    pairs += [*product(("Unet",), ("mobilenet_v2", "timm-mobilenetv3_small_minimal_100", "tu-convnext_atto"))]
    pairs += [("Unet", "efficientnet-b0"), ("FPN", "mit_b0"), ("DeepLabV3Plus", "mobilenet_v2")]
    return {
        f"{decoder}-{encoder}": _built(
            "segmentation_models_pytorch",
            decoder,
            "tu-vit_tiny_patch16_224" if decoder == "DPT" else encoder,
            encoder_weights=None,
            classes=5,
        )
        for decoder, encoder in pairs
    }


LIBRARIES = {
    "transformers": Library(
        "transformers",
        _transformers,
        ("MobileNetV2ForS*", "ResNetForI*"),
        {"SuperPoint*": (96, 160), "Levit*": (224, 224)},
    ),
    "ultralytics": Library("ultralytics", _ultralytics, ("yolov8",)),
    "doctr": Library("python-doctr", _doctr, ("linknet*exp*",), {"crnn*": (32, 128)}),
    "easyocr": Library("easyocr", _easyocr, (), {"*(vgg)": (64, 160), "*(resnet)": (32, 160)}),
    "monai": Library("monai", _monai, ("UNet-batch",)),
    "nnunet": Library("dynamic-network-architectures", _nnunet, ("PlainConvUNet-batch",)),
    "kornia": Library("kornia", _kornia, ("XFeat",), {"HardNet": (32, 32)}),
    "spandrel": Library("spandrel", _spandrel, ("DRUNet",)),
    "torchgeo": Library("torchgeo", _torchgeo, ("FCN",)),
    "controlnet_aux": Library("controlnet-aux", _controlnet_aux, ("MLSD-tiny",)),
    "smp": Library("segmentation-models-pytorch", _smp, ("FPN-resnet18",), {"DPT*": (224, 224)}),
}


def find_subjects(names: Iterable[str], pattern: str = "*") -> tuple[list[Subject], dict[str, str]]:
    """Return the networks of libraries, and of libraries that cannot be imported the reason."""
    subjects: list[Subject] = []
    missing: dict[str, str] = {}
    for name in names:
        try:
            found = list(LIBRARIES[name].subjects(name))
        except ImportError as error:
            missing[name] = str(error)
        else:
            subjects += [entry for entry in found if fnmatch.fnmatch(entry.name.partition(":")[2], pattern)]
    return subjects, missing


def check_named(name: str, seconds: float = 100.0) -> Row:
    """Check the network of a row's name, which runs in a process of its own."""
    library_name, _, network = name.partition(":")
    library = LIBRARIES[library_name]
    subject = next(entry for entry in library.subjects(library_name) if entry.name == name)
    is_written = any(fnmatch.fnmatch(network, pattern) for pattern in library.written)
    return check_as_it_is(subject, write=is_written, seconds=seconds)


def _known(subject: Subject) -> Row:
    """Library and versions of a row."""
    library = LIBRARIES[subject.family]
    return {
        "family": subject.family,
        "versions": {library.package: library.version, "torch": version("torch")},
    }


def _in_turn(names: list[str]) -> list[str]:
    """Return the names with one of each library in turn, so that a run that is stopped has some of each."""
    of_each: dict[str, list[str]] = {}
    for name in names:
        of_each.setdefault(name.partition(":")[0], []).append(name)
    return [name for round_ in zip_longest(*of_each.values()) for name in round_ if name]


def main() -> None:
    """Check networks, and print a line for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", nargs="*", help=f"{', '.join(LIBRARIES)}; default all")
    parser.add_argument("--out", type=Path, default=ROWS)
    parser.add_argument("--pattern", default="*", help="of networks' names")
    parser.add_argument("--workers", type=int, default=1, help="number of networks at a time")
    parser.add_argument("--seconds", type=float, default=150.0, help="limit for a network")
    options = parser.parse_args()
    if unknown := set(options.library) - set(LIBRARIES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(LIBRARIES)}")
    subjects, missing = find_subjects(options.library or LIBRARIES, options.pattern)
    for name, why in missing.items():
        print(f"{name} is skipped: {why}", flush=True)
    names = _in_turn([subject.name for subject in subjects])
    check = Check(
        partial(check_named, seconds=options.seconds * 0.6),
        {subject.name: _known(subject) for subject in subjects},
        ("benchmarks.zoo.libraries",),
    )

    def tell(row: Row) -> None:
        compared = " ".join(f"{name}={value}" for name, value in row.get("compared", {}).items())
        print(
            f"{row['model']:50} {row['seconds']:5} s {row['result']} {row.get('why', '')} {compared}",
            flush=True,
        )

    check_networks(
        names,
        options.out,
        check=check,
        workers=options.workers,
        limits=Limits(seconds=options.seconds),
        on_row=tell,
    )


if __name__ == "__main__":
    main()
