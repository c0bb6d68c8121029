"""The student alone, in the formats that it is deployed in, each checked against the model.

Axes: N batch, n detections of an image, H height, W width.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from matchdistill.files import atomic_write
from matchdistill.messages import cause
from matchdistill.models import load_weights, save_weights
from matchdistill.trace import tensors_in

Format = Literal["safetensors", "onnx", "pt2"]
DETECTIONS = ("boxes", "scores", "labels", "masks")
_Program = TypeVar("_Program")


def export(model: nn.Module, images: Tensor, path: Path, kind: Format, rebuilt: nn.Module | None = None) -> float:
    """Write a model and read it back to see that it computes the same.

    Args:
        model: the student, images (N, 3, H, W) -> logits.
        images: an example (N, 3, H, W) with N of at least 2; N stays free in the exported graph.
        path: the file to write.
        kind: "safetensors" (a state dict), "onnx", or "pt2" (`torch.export`).
        rebuilt: for "safetensors", the plain model to load the file into.

    Returns:
        The largest absolute difference of the outputs.

    Raises:
        ValueError: an unknown format, a package that is missing, a model that cannot be exported, or an exported one that
            computes something else; nothing is left at `path` then.
    """
    if kind not in get_args(Format):
        raise ValueError(f"unknown format {kind!r}: expected one of {', '.join(get_args(Format))}")
    model = model.eval().cpu()
    write, run = {"safetensors": _safetensors, "onnx": _onnx, "pt2": _pt2}[kind](model, images, rebuilt)
    with torch.no_grad():
        # Another batch size than the example's: it must not have been fixed.
        checked = torch.cat([images, torch.randn(3, *images.shape[1:], generator=torch.Generator().manual_seed(0))])
        expected = model(checked)
    return _write_checked(path, write, lambda temporary: run(temporary, checked), expected)


def export_detector(model: nn.Module, path: Path, kind: Format, rebuilt: nn.Module) -> float:
    """Write a detector and read it back to see that it detects the same.

    Args:
        model: a list of images (3, H, W) -> a list of detections.
        path: the file to write.
        kind: "safetensors", or "onnx": a program for one image (3, H, W) of any size, float32 in 0..1, that gives
            "boxes" (n, 4), "scores" (n,), "labels" (n,) and "masks" (n, 1, H, W) where there are any. Sizes are rounded
            in 32 bits there: some images are resized to a pixel more or less.
        rebuilt: for "safetensors", the plain model to load the file into.

    Returns:
        The largest absolute difference: of "safetensors" of the backbone's features, boxes and scores; of "onnx" of the
        scores.

    Raises:
        ValueError: another format, a detector that cannot be exported or detects something else then; nothing is left at
            `path` then.
    """
    if kind == "onnx":
        return _export_program(model.eval().cpu(), path)
    if kind != "safetensors":
        raise ValueError(
            f"format {kind!r}: detectors are exported as safetensors or onnx; torch.export takes none of them"
        )
    images = [torch.rand(3, 96, 128, generator=torch.Generator().manual_seed(0))]

    def outputs(network: nn.Module) -> Tensor:
        with torch.no_grad():
            (found,) = network.eval().cpu()(images)
            # Of a network that finds nothing yet, these alone.
            levels = tensors_in(network.backbone(network.transform(images)[0].tensors))  # type: ignore[operator]
        return torch.cat([level.flatten() for level in [*levels, found["boxes"], found["scores"]]])

    def read(temporary: Path) -> Tensor:
        load_weights(rebuilt, temporary)
        return outputs(rebuilt)

    return _write_checked(path, lambda temporary: save_weights(model, temporary), read, outputs(model))


def _export_program(model: nn.Module, path: Path) -> float:
    _check_onnx()
    transform = model.get_submodule("transform")
    side, longest = int(getattr(transform, "min_size", (256,))[-1]), int(getattr(transform, "max_size", 512))
    chance = torch.Generator().manual_seed(0)
    # Of sizes that are not rounded on the way, and all of them are resized otherwise.
    sizes = [(side, min(side * 5 // 4, longest)), (min(side * 3 // 2, longest), side), (side // 2, side // 2)]
    images = [torch.rand(3, *size, generator=chance) for size in sizes]
    with torch.no_grad():
        expected = [model([image])[0] for image in images]  # padding, as in a batch, can change what is found
    names = [name for name in DETECTIONS if name in expected[0]]

    def write(temporary: Path) -> None:
        # The exporter by tracing: that by torch.export does not take torchvision's heads, whose outputs' sizes vary.
        _traced(
            "torch.onnx",
            lambda: torch.onnx.export(
                OneImage(model, names).eval(),
                (images[0],),
                str(temporary),
                dynamo=False,
                input_names=["image"],
                output_names=names,
                dynamic_axes={"image": [1, 2], **{name: [0] for name in names}},
            ),
        )

    def run(temporary: Path) -> Tensor:
        program = load_detector(temporary)
        return torch.tensor([_difference(program(image), own) for image, own in zip(images, expected, strict=True)])

    return _write_checked(path, write, run, torch.zeros(len(images)))


class OneImage(nn.Module):
    """A detector of one image, whose detections come as a tuple of tensors."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """(3, H, W) -> the detections' tensors."""
        (found,) = self.model([image])
        return tuple(found[name] for name in self.names)


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """How much two lists of detections differ in scores, infinite where they differ in more.

    Where scores are equal their order, and which of the last are left out, is a matter of rounding.
    """
    if len(found["scores"]) != len(expected["scores"]):
        return math.inf
    if not len(expected["scores"]):
        return 0.0
    difference = (found["scores"].sort().values - expected["scores"].sort().values).abs().max().item()
    for image, other in ((found, expected), (expected, found)):
        decisive = image["scores"] > image["scores"].min() + 1e-4
        near = (image["boxes"][:, None] - other["boxes"]).abs().amax(2) < 0.1  # pixels
        near &= (image["scores"][:, None] - other["scores"]).abs() < 1e-3
        near &= image["labels"][:, None] == other["labels"]
        if "masks" in image:
            near &= (image["masks"][:, None] - other["masks"]).abs().mean((2, 3, 4)) < 1e-2
        if not near.any(1)[decisive].all():
            return math.inf
    return difference


def _write_checked(
    path: Path, write: Callable[[Path], object], run: Callable[[Path], Tensor], expected: Tensor
) -> float:
    """Write a file and see that what is in it computes what is expected; returns the largest difference."""
    difference = 0.0

    def write_and_check(temporary: Path) -> None:
        nonlocal difference
        write(temporary)
        try:
            with torch.no_grad():
                difference = (run(temporary) - expected).abs().max().item()
        except Exception as error:  # whatever the runtime makes of, say, another number of images
            raise ValueError(f"the exported model does not run ({cause(error)}): {path} was not written") from error
        if not difference <= 1e-3 * max(1.0, expected.abs().max().item()):
            raise ValueError(f"the exported model's outputs differ by {difference:.2g}: {path} was not written")

    atomic_write(path, write_and_check)
    return difference


def _traced(exporter: str, trace: Callable[[], _Program]) -> _Program:
    """What the exporter makes of a model, or one line about why it makes nothing of it."""
    try:
        said = io.StringIO()  # an exporter that fails prints the graph so far
        with warnings.catch_warnings(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            warnings.simplefilter("ignore")
            return trace()
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise ValueError(f"{exporter} cannot take the model ({cause(root)})") from error


_Writer = tuple[Callable[[Path], object], Callable[[Path, Tensor], Tensor]]


def _safetensors(model: nn.Module, images: Tensor, rebuilt: nn.Module | None) -> _Writer:
    assert rebuilt is not None

    def run(path: Path, batch: Tensor) -> Tensor:
        load_weights(rebuilt, path)
        return torch.as_tensor(rebuilt.eval()(batch))

    return lambda path: save_weights(model, path), run


def _pt2(model: nn.Module, images: Tensor, _: nn.Module | None) -> _Writer:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = _traced("torch.export", lambda: torch.export.export(model, (images,), dynamic_shapes=dynamic))
    return lambda path: torch.export.save(program, path), lambda path, batch: load_exported(path, "pt2")(batch)


def _onnx(model: nn.Module, images: Tensor, _: nn.Module | None) -> _Writer:
    _check_onnx()
    program = _traced(
        "torch.onnx",
        lambda: torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        ),
    )
    assert program is not None
    return (
        lambda path: program.save(str(path), external_data=False),
        lambda path, batch: load_exported(path, "onnx")(batch),
    )


def _check_onnx() -> None:
    try:
        import onnxruntime  # noqa: F401  (to check the file)
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise _missing(error) from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)


def load_exported(path: Path, kind: Literal["onnx", "pt2"]) -> Callable[[Tensor], Tensor]:
    """What an exported file computes, images (N, 3, H, W) -> logits, on the CPU.

    "pt2" files are read by `torch.export`, which can run code that is in them: only those of your own.

    Raises:
        ValueError: a package that is missing, or no exported file.
    """
    try:
        if kind == "onnx":
            import onnxruntime

            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            name = session.get_inputs()[0].name
            return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])
        logging.getLogger("torch.export").setLevel(logging.ERROR)
        program = torch.export.load(path).module()
        return lambda images: torch.as_tensor(program(images))
    except ImportError as error:
        raise _missing(error) from error
    except Exception as error:  # readers of damaged files fail in every way
        raise ValueError(f"{path}: not an exported model, or a damaged one ({cause(error)})") from error


def load_detector(path: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """What an exported detector (.onnx) finds in an image (3, H, W), on the CPU.

    Raises:
        ValueError: a package that is missing, or no exported detector.
    """
    try:
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except ImportError as error:
        raise _missing(error) from error
    except Exception as error:  # readers of damaged files fail in every way
        raise ValueError(f"{path}: not an exported model, or a damaged one ({cause(error)})") from error
    names = [output.name for output in session.get_outputs()]
    if [given.name for given in session.get_inputs()] != ["image"] or not {*names} <= {*DETECTIONS}:
        raise ValueError(f"{path}: not an exported detector: it gives {', '.join(names)}")
    return lambda image: dict(
        zip(names, map(torch.from_numpy, session.run(None, {"image": image.numpy()})), strict=True)
    )


def _missing(error: ImportError) -> ValueError:
    return ValueError(f"ONNX needs {error.name}: pip install 'matchdistill[onnx]'")
