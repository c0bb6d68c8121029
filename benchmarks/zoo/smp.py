"""Networks of segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.network import Network, images


def network(name: str, encoder: str, size: int | None = None, **options: Any) -> Network:
    import segmentation_models_pytorch as smp

    model = getattr(smp, name)(encoder, encoder_weights=None, classes=5, **options)
    network = Network(model, (images(size or (128 if name == "PAN" else 64)),))
    network.intermediates = lambda: [value for value in model.encoder(*network.example)[1:] if value.shape[1]]
    return network
