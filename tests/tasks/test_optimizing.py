"""Which networks are transformers."""

import pytest
import timm
import torch
from torchvision import models

from matchdistill.tasks.optimizing import is_transformer

TRANSFORMERS = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
    "levit_128",
]
OTHERS = ["resnet18", "resnet50_clip", "botnet26t_256", "resnest14d", "seresnet50", "convnext_tiny", "mixer_s32_224"]


@pytest.mark.parametrize("name", [*TRANSFORMERS, *OTHERS])
def test_networks_of_timm(name):
    with torch.device("meta"):
        assert is_transformer(timm.create_model(name)) == (name in TRANSFORMERS)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "resnet18", "mobilenet_v3_small"])
def test_networks_of_torchvision(name):
    with torch.device("meta"):
        assert is_transformer(models.get_model(name)) == (name in ("vit_b_16", "swin_t"))
