"""Models of images."""

from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from architecture import CLASSES, Architecture, hf, images, labelled_images, of_timm, of_torchvision
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torchvision.models import (
    ConvNeXt,
    DenseNet,
    EfficientNet,
    MaxVit,
    MobileNetV3,
    RegNet,
    ResNet,
    ShuffleNetV2,
    SwinTransformer,
    VisionTransformer,
)
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.mobilenetv3 import InvertedResidualConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import Bottleneck
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

SMALL_IMAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def hf_vision(name: str, kind: str, size: str, tiny: Mapping[str, Any], image: int = 16, **more: Any) -> Architecture:
    build = hf(kind, **{"num_labels": CLASSES, **tiny})
    return Architecture(name, "transformers", "image", build, hf(kind, **more), size, lambda: labelled_images(image))


def timm_vision(name: str, size: str, image: int, **tiny: Any) -> Architecture:
    build = of_timm(size, num_classes=CLASSES, **tiny)
    return Architecture(name, "timm", "image", build, of_timm(size), size, lambda: images(image))


def two_stages() -> nn.Module:
    """torchvision's ResNet without its wide half; the widths cannot be set."""
    model = ResNet(Bottleneck, [1, 1, 1, 1], width_per_group=4)
    model.layer3, model.layer4, model.fc = nn.Identity(), nn.Identity(), nn.Linear(512, CLASSES)
    return model


def regnet_y_1_6gf() -> nn.Module:
    """torchvision's own function computes the sizes with tensors, which must hold data."""
    with torch.device("cpu"):
        sizes = BlockParams.from_init_params(depth=27, w_0=48, w_a=20.71, w_m=2.65, group_width=24, se_ratio=0.25)
    return RegNet(sizes)


def torch_vision(name: str, size: str, image: int, tiny: Callable[[], nn.Module]) -> Architecture:
    return Architecture(name, "torchvision", "image", tiny, of_torchvision(size), size, lambda: images(image))


IMAGES = [
    hf_vision("ViT", "ViTForImageClassification", "vit-base-patch16-224", SMALL_IMAGE),
    hf_vision("DeiT", "DeiTForImageClassification", "deit-base-patch16-224", SMALL_IMAGE),
    hf_vision("DINOv2", "Dinov2ForImageClassification", "dinov2-base", SMALL_IMAGE, image_size=518, patch_size=14),
    hf_vision(
        "BEiT",
        "BeitForImageClassification",
        "beit-base-patch16-224",
        SMALL_IMAGE | {"use_relative_position_bias": True},
        use_relative_position_bias=True,
    ),
    hf_vision(
        "Swin",
        "SwinForImageClassification",
        "swin-tiny-patch4-window7-224",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    hf_vision(
        "ConvNeXt",
        "ConvNextForImageClassification",
        "convnext-tiny-224",
        {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]},
        image=32,
    ),
    hf_vision(
        "SegFormer",
        "SegformerForImageClassification",
        "mit-b0",
        {
            "hidden_sizes": [16, 16, 32, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
            "sr_ratios": [4, 2, 1, 1],
        },
        image=32,
    ),
    timm_vision("ViT", "vit_base_patch16_224", 16, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4),
    timm_vision(
        "DeiT III", "deit3_base_patch16_224", 16, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4
    ),
    timm_vision("BEiT", "beit_base_patch16_224", 16, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4),
    timm_vision("EVA-02", "eva02_base_patch14_224", 16, img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4),
    timm_vision(
        "Swin",
        "swin_tiny_patch4_window7_224",
        16,
        img_size=16,
        patch_size=2,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=4,
    ),
    Architecture(
        "MLP-Mixer",
        "timm",
        "image",
        lambda: MlpMixer(CLASSES, img_size=16, patch_size=4, embed_dim=32, num_blocks=2),
        of_timm("mixer_b16_224"),
        "mixer_b16_224",
        images,
    ),
    timm_vision("ConvNeXt", "convnext_tiny", 32, depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    timm_vision(
        "MaxViT",
        "maxvit_tiny_tf_224",
        32,
        img_size=32,
        embed_dim=(16, 32),
        depths=(1, 1),
        stem_width=8,
        transformer_dim_head=16,
    ),
    timm_vision(
        "CoAtNet",
        "coatnet_0_rw_224",
        32,
        img_size=32,
        embed_dim=(16, 16, 32, 32),
        depths=(1, 1, 1, 1),
        stem_width=8,
        transformer_dim_head=16,
    ),
    timm_vision("ResNet", "resnet50", 32, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8),
    timm_vision(
        "ResNeXt",
        "resnext50_32x4d",
        32,
        layers=(1, 1, 1, 1),
        channels=(8, 8, 16, 16),
        cardinality=4,
        base_width=32,
        stem_width=8,
    ),
    Architecture(
        "EfficientNet",
        "timm",
        "image",
        of_timm("test_efficientnet", num_classes=CLASSES),
        of_timm("efficientnet_b0"),
        "efficientnet_b0",
        lambda: images(32),
    ),
    Architecture(
        "MobileNetV3",
        "timm",
        "image",
        of_timm("mobilenetv3_small_050", num_classes=CLASSES),
        of_timm("mobilenetv3_large_100"),
        "mobilenetv3_large_100",
        lambda: images(32),
    ),
    Architecture(
        "RegNet",
        "timm",
        "image",
        lambda: timm.models.regnet.RegNet(
            timm.models.regnet.RegNetCfg(depth=4, w0=8, wa=20.0, wm=1.6, group_size=8, se_ratio=0.25, stem_width=8),
            num_classes=CLASSES,
        ),
        of_timm("regnety_032"),
        "regnety_032",
        lambda: images(32),
    ),
    timm_vision("DenseNet", "densenet121", 32, growth_rate=8, block_config=(2, 2)),
    torch_vision("ViT", "vit_b_16", 16, lambda: VisionTransformer(16, 4, 2, 4, 32, 64, num_classes=CLASSES)),
    torch_vision(
        "Swin", "swin_t", 16, lambda: SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], num_classes=CLASSES)
    ),
    torch_vision(
        "Swin V2",
        "swin_v2_t",
        16,
        lambda: SwinTransformer(
            [2, 2],
            16,
            [1, 1],
            [2, 2],
            [4, 4],
            num_classes=CLASSES,
            block=SwinTransformerBlockV2,
            downsample_layer=PatchMergingV2,
        ),
    ),
    torch_vision(
        "ConvNeXt",
        "convnext_tiny",
        32,
        lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=CLASSES),
    ),
    torch_vision(
        "MaxViT", "maxvit_t", 32, lambda: MaxVit((32, 32), 8, 4, [16, 32], [1, 1], 16, 0.0, num_classes=CLASSES)
    ),
    torch_vision("ResNet", "resnet50", 32, two_stages),
    torch_vision(
        "EfficientNet V2",
        "efficientnet_v2_s",
        32,
        lambda: EfficientNet(
            [FusedMBConvConfig(2, 3, 1, 8, 16, 1), MBConvConfig(4, 3, 2, 16, 32, 1)],
            0.1,
            num_classes=CLASSES,
            last_channel=64,
        ),
    ),
    torch_vision(
        "MobileNetV3",
        "mobilenet_v3_large",
        32,
        lambda: MobileNetV3(
            [
                InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1.0),
                InvertedResidualConfig(16, 5, 32, 24, True, "HS", 2, 1, 1.0),
            ],
            64,
            num_classes=CLASSES,
        ),
    ),
    Architecture(
        "RegNet",
        "torchvision",
        "image",
        lambda: RegNet(BlockParams([1, 1], [16, 32], [8, 8], [1.0, 1.0], [2, 2], 0.25), CLASSES, stem_width=8),
        regnet_y_1_6gf,
        "regnet_y_1_6gf",
        lambda: images(32),
    ),
    torch_vision("DenseNet", "densenet121", 32, lambda: DenseNet(8, (2, 2), 16, num_classes=CLASSES)),
    torch_vision(
        "ShuffleNet V2", "shufflenet_v2_x1_0", 32, lambda: ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 64], CLASSES)
    ),
]
