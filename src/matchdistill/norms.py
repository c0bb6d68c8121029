"""What student features pass before they are compared.

Axes: N batch, C channels, * position axes.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


class FeatureNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of features (N, C, *) with any position axes.

    A batch that leaves a channel a single value has no variance to normalise by; there the running statistics are used.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == input.shape[1]:
            assert self.running_mean is not None
            return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)
        return super().forward(input)


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm of 32 groups, or of the most that divide both 32 and the channels: for batches of a few images.

    Examples:
        >>> [group_norm(channels).num_groups for channels in (256, 24)]
        [32, 8]
    """
    return nn.GroupNorm(math.gcd(32, channels), channels)
