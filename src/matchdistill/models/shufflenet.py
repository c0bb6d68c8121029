"""ShuffleNet-V2 with its activations where the paper's experiments have them."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual

from matchdistill.models.build import build_model


class ActivatedFirst(nn.Sequential):
    """Layers behind a ReLU, which has no place among them: the layers keep their names."""

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C, H, W) before their activation -> what the layers make of them."""
        return super().forward(features.relu())  # type: ignore[no-any-return,no-untyped-call]


def shufflenet_v2_x1_0(num_classes: int = 1000, weights: str | None = None) -> nn.Module:
    """torchvision's ShuffleNet-V2 1.0x whose stages end before their activation.

    There the branches of a block end in a ReLU. Here it comes first in what uses their output, and a stage's output is there
    before it. K. Yue et al. made the same change for "Matching Guided Distillation", ECCV 2020. The network computes the
    same, and its weights have the same names.

    Args:
        num_classes: size of the head.
        weights: pretrained ones by torchvision's name for them.

    Examples:
        >>> import torch
        >>> shufflenet_v2_x1_0(num_classes=4)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 4])
    """
    model = build_model("torchvision:shufflenet_v2_x1_0", num_classes, weights)
    for block in list(model.modules()):
        if isinstance(block, InvertedResidual):
            # Empty, and not used, where half of the channels is passed on as it is.
            block.branch1 = ActivatedFirst(*block.branch1[:-1])
            block.branch2 = ActivatedFirst(*block.branch2[:-1])
    model.conv5 = ActivatedFirst(*model.get_submodule("conv5").children())
    return model
