"""Networks of open_clip: the encoder of images, or both."""

from __future__ import annotations

from typing import Any

from benchmarks.zoo.network import Network, images, numbered


def network(name: str, size: int | None = None, whole: bool = False) -> Network:
    import open_clip

    model = open_clip.create_model(name, pretrained=None, **({"force_image_size": size} if size else {}))
    visual: Any = model.visual
    side = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]
    patterns = (r"transformer.resblocks.#", r"layer#", r"trunk.(stages|blocks).#")
    if not whole:
        return Network(visual, (images(side),), numbered(visual, *patterns))
    text = open_clip.get_tokenizer(name)(["a cat", "a dog"])
    both = [*(f"visual.{pattern}" for pattern in patterns), r"transformer.resblocks.#"]
    return Network(model, (images(side), text), numbered(model, *both))
