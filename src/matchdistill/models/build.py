"""Networks by name: torchvision, timm, or a function of the user's own."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from matchdistill.files import path_of
from matchdistill.lookup import own_function
from matchdistill.messages import cause, did_you_mean
from matchdistill.models.huggingface import (
    build_transformers,
    build_transformers_segmenter,
    transformers_names,
    transformers_wants,
)
from matchdistill.models.pretrained import (
    ANY_PRETRAINED,
    Wanted,
    of_student,
    timm_wants,
    torchvision_wants,
    torchvision_weights,
)
from matchdistill.models.smp import build_smp, smp_names
from matchdistill.models.weights import STUDENTS, load_weights, no_file

WEIGHT_SUFFIXES = {".pt", ".pth", ".ckpt", ".safetensors", ".bin"}
# Arguments by which models over another network download that one's weights, if they are not told otherwise.
BACKBONE_WEIGHTS = {"weights_backbone": None, "encoder_weights": None, "pretrained_backbone": False}
WEIGHTS_OF_PARTS = ("backbone_weights", *BACKBONE_WEIGHTS)
BACKBONES = ("backbone",)  # of transformers, which looks it up on the Hub
OTHER_FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")  # options of timm's
COUNTS = {"num_classes", "num_columns"}  # of classes, which torchvision's detectors note beside their classifiers


def build_model(
    name: str,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    fresh_head: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a network by name.

    Args:
        name: ``"torchvision:resnet50"``, ``"timm:mobilenetv1_100"``, or a function of your own as
            ``"package.module:function"`` (or ``"package.module:Class.method"``), looked for in the current folder too.
        num_classes: size of the head; None is the library's default. A function of your own is given it if it has
            such an argument.
        weights: a file, which must fit exactly, as a path or ``"package:path/in/it"`` of an installed package; or
            pretrained weights of the library: a name that torchvision has for them (``"IMAGENET1K_V2"``), a timm tag
            (``"a1_in1k"``), or ``"pretrained"``. If these are for another number of classes, the head is a fresh one. A
            function of your own is given a name that is no file if it has an argument ``weights``. Without weights nothing
            is downloaded, for a backbone (``weights_backbone``, ``encoder_weights``) only if ``options`` say so.
        fresh_head: whether the head is a fresh one too where a file is for another number of classes.
        options: passed on to the function that builds the network.

    Raises:
        ValueError: an unknown name (the nearest are suggested), weights that do not fit or cannot be had.

    Examples:
        >>> import torch
        >>> model = build_model("matchdistill.models:small_resnet", num_classes=4, width=8)
        >>> model(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 4])
    """
    builders = {library: source.build for library, source in SOURCES.items()}
    return build_with(builders, name, num_classes, weights, fresh_head, options)


def build_with(
    builders: Mapping[str, Builder],
    name: str,
    num_classes: int | None,
    weights: str | Path | None,
    fresh_head: bool,
    options: dict[str, Any],
) -> nn.Module:
    """A network by name, by the functions that libraries have for its kind; see `build_model`."""
    file = None if weights is None else weights_file(str(weights))
    pretrained = str(weights) if weights is not None and file is None else None
    library, _, entry = name.partition(":")
    if not library or not entry:
        same = [f"{each}:{name}" for each, source in SOURCES.items() if name in source.names()]
        hint = f"; did you mean {' or '.join(map(repr, same))}?" if same else ""
        forms = ", ".join(f"'{each}:NAME'" for each in SOURCES)
        raise ValueError(f"model {name!r}: expected {forms} or 'package.module:function'{hint}")
    if num_classes is not None:
        options["num_classes"] = num_classes
    build = builders.get(library)
    model = _build_own(name, pretrained, options) if build is None else build(entry, pretrained, options)
    if file is not None:
        load_weights(model, file, fresh_head=fresh_head)
    return model


def weights_file(weights: str) -> Path | None:
    """The file that is meant by weights; None where they are a name that a library has for its own.

    The folder of a finished run stands for its student, the best one if the run kept it.

    Raises:
        ValueError: there is no such file or package.
    """
    file = path_of(weights)
    package, _, inside = weights.partition(":")
    # A single letter is a drive of Windows.
    named = len(package) > 1 and all(part.isidentifier() for part in package.split("."))
    if not file.is_file() and inside and named:
        folder = _package_folder(package)
        if folder is None:
            raise ValueError(f"weights {weights}: there is no package {package!r}: install it, or name a file")
        file = folder / inside
    elif (file / STUDENTS[-1]).is_file():
        file = next(file / name for name in STUDENTS if (file / name).is_file())
    # A folder may have the name that a library has for its own weights.
    elif not (file.suffix.lower() in WEIGHT_SUFFIXES or "/" in weights or file.is_file()):
        return None
    if not file.is_file():
        raise ValueError(f"weights {weights}: {no_file(file)}")
    return file


def _package_folder(package: str) -> Path | None:
    """Where a package is, which is not imported, nor are those around it."""
    outermost, *inside = package.split(".")
    try:
        spec = importlib.util.find_spec(outermost)
    except ValueError:  # __main__
        return None
    places = [] if spec is None else spec.submodule_search_locations or []
    return next((folder for place in places if (folder := Path(place, *inside)).is_dir()), None)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models())


def _timm_names() -> list[str]:
    import timm

    return list(timm.list_models())


def _build_torchvision(entry: str, pretrained: str | None, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    name = f"torchvision:{entry}"
    if entry not in (known := _torchvision_names()):
        raise ValueError(f"model {name!r}: torchvision has no such model{did_you_mean(entry, known)}")
    options = _without_backbone(inspect.signature(models.get_model_builder(entry)), options)

    def build(**options: Any) -> nn.Module:
        try:
            model: nn.Module = models.get_model(entry, **options)
        except TypeError as error:
            raise _bad_options(name, error) from error
        except Exception as error:
            # RuntimeError: the download has a wrong checksum
            if pretrained is not None and isinstance(error, OSError | HTTPException | RuntimeError):
                raise _not_loaded(name, pretrained, error) from error
            raise _not_built(name, error) from error
        return model

    if pretrained is None:
        return build(**options)
    choices = models.get_model_weights(entry)
    choice = torchvision_weights(entry, pretrained)
    if choice is None:
        raise _unknown_weights(name, pretrained, [member.name for member in choices])
    # torchvision refuses pretrained weights with another number of classes, so the head is exchanged afterwards.
    num_classes = options.pop("num_classes", None)
    model = build(weights=choice, **options)
    if num_classes not in (None, len(choice.meta["categories"])):
        take_head(model, build(num_classes=num_classes, **options))
    return model


def take_head(model: nn.Module, fresh: nn.Module) -> None:
    """Replace the modules whose tensors have another shape in ``fresh``: the classifiers."""
    shapes = {key: value.shape for key, value in fresh.state_dict().items()}
    for key, value in model.state_dict().items():
        if shapes.get(key, value.shape) != value.shape:
            path = key.rpartition(".")[0]
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, fresh.get_submodule(path))
    for path, module in model.named_modules():
        for count in COUNTS & vars(module).keys():
            setattr(module, count, getattr(fresh.get_submodule(path), count))


def _build_timm(entry: str, pretrained: str | None, options: dict[str, Any]) -> nn.Module:
    import timm

    architecture, _, tag = entry.partition(".")  # "resnet18.a1_in1k" names the weights as well
    if not timm.is_model(architecture):
        hint = did_you_mean(architecture, _timm_names())
        raise ValueError(f"model 'timm:{entry}': timm has no such model{hint}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if pretrained is not None and pretrained.lower() not in ANY_PRETRAINED:
        tag = pretrained
    if tag not in ("", *tags) or (pretrained is not None and not tags):
        raise _unknown_weights(f"timm:{architecture}", tag or "pretrained", tags)
    try:
        return timm.create_model(
            f"{architecture}.{tag}" if tag else architecture, pretrained=pretrained is not None, **options
        )
    except TypeError as error:
        raise _bad_options(f"timm:{entry}", error) from error
    except Exception as error:  # each way of downloading has exceptions of its own
        if pretrained is None:
            raise _not_built(f"timm:{entry}", error) from error
        raise _not_loaded(f"timm:{entry}", pretrained, error) from error


def find_preparation(name: str, weights: str, options: dict[str, Any]) -> Wanted | None:
    """How the weights of a network want their images, as far as is known: of a library's own, and of students of ours.

    Args:
        name: the network, as `build_model` takes it.
        weights: a library's own name for them, or a file, beside which a ``config.json`` or ``model.json`` may say it.
        options: of the function that builds the network.

    Returns:
        What is known; None: nothing.

    Raises:
        ValueError: what is beside the file is damaged.

    Examples:
        >>> find_preparation("timm:vit_tiny_patch16_224", "pretrained", {}).values["mean"]
        [0.5, 0.5, 0.5]
    """
    file = weights_file(weights)
    if file is not None:
        return of_student(file.parent)
    library, _, entry = name.partition(":")
    source = SOURCES.get(library)
    if source is None or source.wants is None:
        return None
    return source.wants(entry, weights, options)


Builder = Callable[[str, str | None, dict[str, Any]], nn.Module]


class Source(NamedTuple):
    """A library of networks that are built by name.

    Attributes:
        names: lists its networks.
        build: builds one: (its name, the library's own weights for it or None, options of the network, among them its
            `num_classes` if they are given) -> network. Raises a ValueError of one line if there is no such network, if
            there are no such weights, or if the options do not fit.
        wants: how its own weights want their images: (the network's name, the weights' name, options of the network) ->
            what is known of it, None where there are no such weights; None: nothing is known of any.
        reads: options by which it would read other files, which a folder of somebody else must not name.
        pixels: builds one that gives every pixel a class, where these are others than `build` makes.
    """

    names: Callable[[], Sequence[str]]
    build: Builder
    reads: tuple[str, ...] = ()
    wants: Callable[[str, str, dict[str, Any]], Wanted | None] | None = None
    pixels: Builder | None = None


SOURCES = {
    "torchvision": Source(_torchvision_names, _build_torchvision, wants=torchvision_wants),
    "timm": Source(_timm_names, _build_timm, OTHER_FILES, timm_wants),
    "transformers": Source(
        transformers_names, build_transformers, BACKBONES, transformers_wants, build_transformers_segmenter
    ),
    "smp": Source(smp_names, build_smp, OTHER_FILES),  # whose encoders are timm's, too
}


def _without_backbone(signature: inspect.Signature, options: dict[str, Any]) -> dict[str, Any]:
    """Options with which a function downloads nothing for a part of its model, unless they say so themselves."""
    return {**{name: none for name, none in BACKBONE_WEIGHTS.items() if name in signature.parameters}, **options}


def _build_own(name: str, pretrained: str | None, options: dict[str, Any]) -> nn.Module:
    function = own_function(name, "model", SOURCES)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:  # some functions that are not written in Python
        raise _not_built(name, error) from error
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    if "num_classes" not in signature.parameters and not takes_any:
        options.pop("num_classes", None)
    options = _without_backbone(signature, options)
    if pretrained is not None:
        if "weights" not in signature.parameters:
            raise ValueError(
                f"model {name!r}: expected weights from a file, got {pretrained!r}: {no_file(path_of(pretrained))}"
            )
        options["weights"] = pretrained
    try:
        signature.bind(**options)
    except TypeError as error:
        raise _bad_options(name, error, list(signature.parameters)) from error
    try:
        model = function(**options)
    except Exception as error:  # user code can fail in every way
        raise _not_built(name, error) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r}: expected an nn.Module, the function returned a {type(model).__name__}")
    return model


def _bad_options(name: str, error: TypeError, accepted: list[str] | None = None) -> ValueError:
    takes = f"; it takes {', '.join(accepted)}" if accepted else ""
    return ValueError(f"model {name!r} cannot be built with these options ({cause(error)}){takes}")


def _not_built(name: str, error: Exception) -> ValueError:
    download = isinstance(error, OSError | HTTPException)
    hint = ": check the network connection, if it downloads anything" if download else ""
    return ValueError(f"model {name!r} cannot be built, it fails with {cause(error)}{hint}")


def _unknown_weights(name: str, weights: str, choices: list[str]) -> ValueError:
    known = f"'pretrained' or one of {', '.join(choices)}" if choices else "a file, as there are none to download"
    return ValueError(f"model {name!r} has no pretrained weights {weights!r}, nor is it a file: expected {known}")


def _not_loaded(name: str, weights: str, error: Exception) -> ValueError:
    return ValueError(
        f"model {name!r}: pretrained weights {weights!r} could not be loaded ({cause(error)}): "
        "check the network connection, or give weights=FILE"
    )


def weightless(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a network without the weights that its backbone starts from."""
    return {name: value for name, value in options.items() if name not in WEIGHTS_OF_PARTS}
