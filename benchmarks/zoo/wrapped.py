"""What people put around a network: adapters, compilation, parallel copies, another precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.zoo.network import Network


def _lora(network: Network) -> Network:
    """Low-rank adapters beside the linear layers of attention and MLPs, or beside convolutions; all weights are trained."""
    import peft

    names = "qkv|query|value|fc1|conv1|q_proj|v_proj"
    network.model = peft.get_peft_model(network.model, peft.LoraConfig(r=4, target_modules=rf".*\.({names})"))
    network.features = [(f"base_model.model.{path}", channels) for path, channels in network.features]
    return network


def _compiled(network: Network) -> Network:
    network.model = torch.compile(network.model, backend="eager")  # type: ignore[assignment]
    network.features = [(f"_orig_mod.{path}", channels) for path, channels in network.features]
    return network


def _parallel(network: Network) -> Network:
    network.model = nn.DataParallel(network.model)
    network.features = [(f"module.{path}", channels) for path, channels in network.features]
    return network


def _bfloat16(network: Network) -> Network:
    network.model.to(torch.bfloat16)
    network.example = tuple(
        value.to(torch.bfloat16) if isinstance(value, Tensor) else value for value in network.example
    )
    return network


WRAPPERS: dict[str, Callable[[Network], Network]] = {
    "lora": _lora,
    "compiled": _compiled,
    "parallel": _parallel,
    "bfloat16": _bfloat16,
}
