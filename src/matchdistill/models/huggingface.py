"""Image classifiers of Hugging Face transformers by name, and networks that give every pixel a class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from matchdistill.messages import cause, did_you_mean
from matchdistill.models.huggingface_images import (
    RESAMPLING,
    harmless,
    interpolation_of,
    load_processor,
    processor_cut,
    processor_values,
)
from matchdistill.models.preparation import Preparation
from matchdistill.models.pretrained import ANY_PRETRAINED, Wanted


class Kind(NamedTuple):
    """What networks of transformers are for.

    Attributes:
        words: what one is called.
        auto: the class of transformers that builds one.
        table: the dictionary of transformers that has their model types.
        logits: whether logits are all that is needed of what one returns.
    """

    words: str
    auto: str
    table: str
    logits: bool = True


CLASSIFIER = Kind("image classifier", "AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")
SEGMENTER = Kind(
    "network with logits for every pixel",
    "AutoModelForSemanticSegmentation",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
)


class Logits:
    """Has a network of transformers return its logits alone; a hook, so that modules and weights stay as they are."""

    def __call__(self, model: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, Mapping):
            return output["logits" if "logits" in output else "last_hidden_state"]  # as PP-LCNet calls them
        return output[0] if isinstance(output, tuple) else output


def transformers_names(kind: Kind = CLASSIFIER) -> list[str]:
    """The model types that have networks of a kind, such as "vit"; empty where the package is missing."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return []
    return list(getattr(modeling_auto, kind.table))


def build_transformers_segmenter(entry: str, pretrained: str | None, options: dict[str, Any]) -> nn.Module:
    """A network that takes images (N, 3, H, W) and returns logits (N, classes, h, w); see `build_transformers`."""
    return build_transformers(entry, pretrained, options, SEGMENTER)


def build_transformers(
    entry: str, pretrained: str | None, options: dict[str, Any], kind: Kind = CLASSIFIER
) -> nn.Module:
    """A network that takes images (N, 3, H, W) and returns logits.

    It takes red, green and blue. Where its image processor gives its pretrained weights blue first, as MobileViT's does, the
    input channels of its first convolution are exchanged.

    Args:
        entry: a folder with a ``config.json``, a name of the Hub, or a model type such as "vit".
        pretrained: "pretrained" for the weights of the folder or name; None starts at random.
        options: fields of its config, and ``num_classes``.
        kind: what it is for.

    Raises:
        ValueError: in one line, no such model, a package that is missing, or options that do not fit.
    """
    name = f"transformers:{entry}"
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"model {name!r} needs {error.name}: pip install 'matchdistill[transformers]'") from error
    options = dict(options)
    num_classes = options.pop("num_classes", None)
    config = _config(entry, options, kind)
    if pretrained is None and hasattr(config, UNTRAINED):
        setattr(config, UNTRAINED, False)  # nothing is downloaded without being asked for
    if num_classes is not None and num_classes != config.num_labels:
        config.num_labels = num_classes
    if pretrained is not None and (entry in transformers_names(kind) or pretrained.lower() not in ANY_PRETRAINED):
        raise ValueError(
            f"model {name!r} has no pretrained weights {pretrained!r}, nor is it a file: name a folder or a model of the "
            "Hub, with the weights 'pretrained'"
        )
    # Of a type with several classes transformers takes the first one, unless the config names another; it fails on None.
    config.architectures = config.architectures or []
    auto = getattr(transformers, kind.auto)
    try:
        if pretrained is None:
            model = auto.from_config(config)
        else:
            with _without_bars():
                model = auto.from_pretrained(entry, config=config, ignore_mismatched_sizes=True, **harmless(entry))
    except Exception as error:  # each architecture fails in a way of its own
        raise ValueError(f"model {name!r} cannot be built, it fails with {cause(error)}") from error
    found: nn.Module = model
    if pretrained is not None and kind.logits and _takes_bgr(entry):
        _take_rgb(name, found)
    if kind.logits:
        found.register_forward_hook(Logits())
    return found


def transformers_wants(entry: str, pretrained: str, options: dict[str, Any]) -> Wanted | None:
    """How the weights of a folder or a name of the Hub want their images, by its image processor; see `Source.wants`.

    Raises:
        ValueError: the image processor does what a `Preparation` cannot say.
    """
    types = {*transformers_names(), *transformers_names(SEGMENTER)}
    if entry in types or pretrained.lower() not in ANY_PRETRAINED:
        return None
    try:
        config = _config(entry, options, None)
    except (ImportError, ValueError):  # a model that is missing is told when it is built
        return None
    processor = load_processor(entry)
    if processor is None:
        return None
    # Networks for pixels take images of any size.
    whole = "ForSemanticSegmentation" not in "".join(getattr(config, "architectures", None) or ())
    try:
        found = processor_values(processor)
        values = {"mean": found.mean, "std": found.std, **interpolation_of(processor)}
        values |= processor_cut(processor, found) if whole else {}
    except ValueError as error:
        names = ", ".join(Preparation().plain())
        raise ValueError(
            f"the image processor of 'transformers:{entry}' ({type(processor).__name__}) {error}: say yourself how images "
            f"are prepared, by all fields of teacher.preparation or student.preparation ({names})"
        ) from error
    # Position embeddings are of one size, and only some architectures interpolate them.
    return Wanted(values, fixed=whole and isinstance(getattr(config, "image_size", None), int))


def _take_rgb(name: str, model: nn.Module) -> None:
    """Have a network that was trained on blue, green and red take red, green and blue, as all others do.

    Raises:
        ValueError: it is not clear which of its modules is given the images.
    """
    first = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d) and module.in_channels == 3 and module.groups == 1
    ]
    if len(first) != 1:
        raise ValueError(
            f"model {name!r} was trained on BGR images, and {len(first)} of its convolutions take three channels: expected "
            "one, to exchange its channels; give a function of your own that builds the network for RGB"
        )
    with torch.no_grad():
        first[0].weight.copy_(first[0].weight.flip(1))


def _takes_bgr(entry: str) -> bool:
    """Whether the image processor of a folder or a name of the Hub gives blue first."""
    processor = load_processor(entry)
    try:
        return processor is not None and processor_values(processor).reversed
    except ValueError:  # which is told where images are prepared
        return False


def _config(entry: str, options: dict[str, Any], kind: Kind | None) -> Any:
    """The config of a model, with options over it.

    Raises:
        ValueError: there is no such model, none of the kind has its type, or it has no such option.
    """
    from transformers import AutoConfig

    kinds = [CLASSIFIER, SEGMENTER] if kind is None else [kind]
    name, known = f"transformers:{entry}", [each for one in kinds for each in transformers_names(one)]
    try:
        by_type = entry in known
        config = AutoConfig.for_model(entry) if by_type else AutoConfig.from_pretrained(entry, **harmless(entry))
    except Exception as error:  # the Hub cannot be reached in many ways
        hint = "" if "/" in entry else did_you_mean(entry, known)
        raise ValueError(
            f"model {name!r}: expected a folder with a config.json, a name of the Hub that can be reached, or a model type"
            f"{hint} ({cause(error)})"
        ) from error
    if config.model_type not in known:
        words = " nor ".join(each.words for each in kinds)
        raise ValueError(f"model {name!r}: transformers has no {words} of the type {config.model_type!r}")
    for option in options:
        if not hasattr(config, option):
            hint = did_you_mean(option, config.to_dict())
            raise ValueError(f"model {name!r} cannot be built with the option {option!r}{hint}")
    try:
        given = {option: _inner_config(value) for option, value in options.items()}
        if by_type:  # fields that follow from others, as D-FINE's head_dim, are made of these
            return AutoConfig.for_model(entry, **given)
    except Exception as error:  # each config checks itself in a way of its own
        raise ValueError(f"model {name!r} cannot be built with these options: {cause(error)}") from error
    for option, value in given.items():
        setattr(config, option, value)
    return config


def _inner_config(value: Any) -> Any:
    """A value of a config; of a network inside, such as a backbone, its own config."""
    if not isinstance(value, Mapping) or "model_type" not in value:
        return value
    from transformers import AutoConfig

    return AutoConfig.for_model(**value)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without the bars of progress of transformers, which would stand between the lines that we print."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def described_config(model: nn.Module, class_names: list[str]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """What builds a network of transformers anywhere: its name by type, its options, and its config.json.

    Args:
        model: the network.
        class_names: of its classes; empty: its head is of no use, and as large as it is.
    """
    config: Any = model.config
    options = {
        name: {**value, UNTRAINED: False} if isinstance(value, dict) and UNTRAINED in value else value
        for name, value in config.to_diff_dict().items()
        if name not in NOT_OPTIONS
    }
    if class_names:
        labels = {
            "id2label": {str(number): text for number, text in enumerate(class_names)},
            "label2id": {text: number for number, text in enumerate(class_names)},
        }
    else:
        labels, options["num_labels"] = {}, config.num_labels
    written = {**config.to_dict(), **labels, "architectures": [type(model).__name__]}
    return f"transformers:{config.model_type}", options, written


def pixel_processor_config(preparation: Preparation, size: int | None) -> dict[str, Any]:
    """The `preprocessor_config.json` of an image processor that prepares images as networks for pixels see them.

    Args:
        preparation: whose mean and deviation images get.
        size: pixels of the shorter side; None: images keep theirs.
    """
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": size is not None,
        **({} if size is None else {"size": {"shortest_edge": size}, "resample": RESAMPLING.index("bilinear")}),
        "do_reduce_labels": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preparation.mean),
        "image_std": list(preparation.std),
    }


def processor_config(preparation: Preparation, size: int) -> dict[str, Any] | None:
    """The `preprocessor_config.json` of an image processor that prepares images so; None: there is none that pads so.

    Args:
        preparation: how images are prepared.
        size: of the images in pixels.
    """
    if preparation.crop_mode == "border":
        return None
    resized = preparation.uncropped(size)
    squashed = preparation.crop_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",  # which has each of these steps
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": resized, "width": resized} if squashed else {"shortest_edge": resized},
        "resample": RESAMPLING.index(preparation.interpolation),
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preparation.mean),
        "image_std": list(preparation.std),
    }


UNTRAINED = "use_pretrained_backbone"  # of configs, and of those of backbones in them
NOT_OPTIONS = {"architectures", "id2label", "label2id", "model_type", "num_labels", "transformers_version", "dtype"}
