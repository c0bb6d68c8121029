"""Networks of timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.zoo.network import Network, images, numbered


def network(name: str, size: int | None = None, **options: Any) -> Network:
    import timm

    configured = timm.get_pretrained_cfg(name)
    channels, *_, own = configured.input_size if configured else (3, 224, 224)
    if size and configured and configured.fixed_input_size:
        options["img_size"] = size
    model = timm.create_model(name, **{"num_classes": 10, **options})
    example = images(size or options.get("img_size", own), options.get("in_chans", channels))
    network = Network(model, (example,))
    infos = getattr(model, "feature_info", None) or []
    network.features = [(info["module"], info["num_chs"]) for info in infos]
    callable_modules = {path for path, module in model.named_modules() if not isinstance(module, nn.ModuleList)}
    if name.startswith("hrnet"):  # its names are those of another class
        network.features = numbered(model, "incre_modules.#")
    elif any(path not in callable_modules for path, _ in network.features):
        network.intermediates = _intermediates(network)
    return network


def _intermediates(network: Network) -> Callable[[], list[Tensor]]:
    return lambda: network.model.forward_intermediates(*network.example, intermediates_only=True)  # type: ignore[operator]
