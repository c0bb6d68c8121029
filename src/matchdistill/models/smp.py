"""The networks of segmentation_models_pytorch by name."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from matchdistill.messages import cause, did_you_mean

ARCHITECTURES = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet DeepLabV3 DeepLabV3Plus PAN UPerNet Segformer DPT".split()


def smp_names() -> list[str]:
    """Its architectures."""
    return list(ARCHITECTURES)


def build_smp(entry: str, pretrained: str | None, options: dict[str, Any]) -> nn.Module:
    """One of its architectures; the encoder starts at random unless the options name `encoder_weights`.

    Raises:
        ValueError: in one line, an unknown architecture, a package that is missing, or options that do not fit.
    """
    name = f"smp:{entry}"
    known = {each.lower(): each for each in ARCHITECTURES}
    if entry.lower() not in known:
        raise ValueError(
            f"model {name!r}: segmentation_models_pytorch has no such architecture{did_you_mean(entry, ARCHITECTURES)}"
        )
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ValueError(f"model {name!r} needs {error.name}: pip install 'matchdistill[segmentation]'") from error
    if pretrained is not None:
        raise ValueError(
            f"model {name!r} has no pretrained weights {pretrained!r}, nor is it a file: give those of its encoder as "
            "options.encoder_weights, for example imagenet"
        )
    given = {"encoder_weights": None, **options}
    if "num_classes" in given:
        given["classes"] = given.pop("num_classes")
    kind = getattr(smp, known[entry.lower()])
    takes = list(inspect.signature(kind).parameters)
    strange = [option for option in given if option not in takes]
    # Further ones are of the encoder: of timm's ("tu-NAME") they are used, others lose them without a word.
    if strange and not str(given.get("encoder_name", "")).startswith("tu-"):
        hint = did_you_mean(strange[0], takes)
        raise ValueError(f"model {name!r} cannot be built with the option {strange[0]!r}{hint}")
    try:
        model: nn.Module = kind(**given)
    except Exception as error:  # each encoder fails in a way of its own
        raise ValueError(f"model {name!r} cannot be built, it fails with {cause(error)}") from error
    return model
