"""A copy of a teacher that does less for the same values: what its weights fix is worked out once."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from matchdistill.functional import wide
from matchdistill.taps import Tap, resolve
from matchdistill.trace import Trace

Folds = Sequence[tuple[str, str]]
Prepare = Callable[..., nn.Module]  # (model, folds=): as `prepared`

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_AND_ACTIVATION = "BatchNormAct2d"  # of timm: children drop and act follow the norm


def foldable(trace: Trace, taps: Iterable[Tap] = ()) -> list[tuple[str, str]]:
    """The convolutions and batch norms of a network that can become one, as pairs of their paths.

    Both run once in the pass, and nothing else takes the convolution's value: no operation, no output and no tap.
    """
    hooked = {(tap.module, tap.side) for whole in taps for tap in (whole, whole.plus) if tap is not None}
    runs = Counter(operation.module for operation in trace.operations)
    uses = Counter(number for operation in trace.operations for number in operation.inputs)
    pairs = []
    for norm in trace.operations:
        made = trace.made_by(norm.inputs[0]) if norm.name == "batch_norm" and len(norm.inputs) == 1 else None
        if (
            made is None
            or made.number in trace.outputs
            or uses[made.number] != 1
            or runs[made.module] != 1
            or runs[norm.module] != 1
        ):
            continue
        sides = [(path, "output") for path in made.outputs_of] + [(path, "input") for path in made.inputs_of]
        if hooked.isdisjoint(sides) and _folds(*(resolve(trace.model, path) for path in (made.module, norm.module))):
            pairs.append((made.module, norm.module))
    return pairs


def _folds(convolution: nn.Module, norm: nn.Module) -> bool:
    plain = type(convolution) in _CONVOLUTIONS and (
        type(norm) in _NORMS or (type(norm).__name__ == _NORM_AND_ACTIVATION and isinstance(norm, nn.BatchNorm2d))
    )
    own = (module for module in (convolution, norm) if module._forward_hooks or module._forward_pre_hooks)
    return plain and next(own, None) is None and getattr(norm, "running_mean", None) is not None


@torch.no_grad()
def prepared(model: nn.Module, folds: Folds, dtype: torch.dtype | None = None, compile: bool = False) -> nn.Module:
    """Make a network in evaluation mode faster, in place: for a copy of a teacher.

    Batch norms are folded into the convolutions before them, and the weights of convolutions of images get the channels
    innermost in memory. Features and output are the same within rounding.

    Args:
        model: the network.
        folds: paths of convolutions and of the batch norms behind them, as `foldable` finds them.
        dtype: of the weights and of what the network computes; None: as they are. With torch.bfloat16 features differ in
            the third digit.
        compile: also `torch.compile`, with the weights frozen on the CPU; needs a C++ compiler.

    Returns:
        `model`.
    """
    for convolution_path, norm_path in folds:
        convolution, norm = resolve(model, convolution_path), resolve(model, norm_path)
        assert isinstance(convolution, _CONVOLUTIONS)
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
        _fold(convolution, norm)
        parent, _, name = norm_path.rpartition(".")
        setattr(resolve(model, parent), name, nn.Sequential(OrderedDict(norm.named_children())).eval())
    if not any(parameter.ndim == 5 for parameter in model.parameters()):
        model.to(memory_format=torch.channels_last)
    if dtype is not None:
        model.to(dtype).register_forward_pre_hook(_Cast(dtype), with_kwargs=True)
    if compile:
        weight = next(model.parameters(), None)
        frozen = weight is not None and weight.device.type == "cpu"
        model.compile(options={"freezing": True} if frozen else {})
    return model


def _fold(convolution: nn.Conv1d | nn.Conv2d | nn.Conv3d, norm: nn.modules.batchnorm._BatchNorm) -> None:
    """Put a batch norm's scale and shift into a convolution's weight and bias, worked out in the widest type."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    like, dtype = convolution.weight, wide(convolution.weight.device)
    scale = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = (0 if convolution.bias is None else convolution.bias) - norm.running_mean.to(dtype)
    shift = shift * scale + (0 if norm.bias is None else norm.bias)
    weight = like * scale.reshape(-1, *[1] * (like.ndim - 1))
    convolution.weight, convolution.bias = (
        nn.Parameter(value.to(like.dtype), requires_grad=False) for value in (weight, shift)
    )


class _Cast:
    """Gives a network its floating point arguments in its own type; a class, so that it can be pickled."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map_only(Tensor, self._cast, (args, kwargs))

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value
