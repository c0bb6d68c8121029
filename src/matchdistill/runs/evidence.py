"""What a run leaves in its folder for its page, beside metrics and logs, and how these files are written and read.

Axes: Cs student channels, Ct teacher channels, G group.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import safetensors.torch
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from matchdistill.distiller import MatchingDistiller
from matchdistill.files import atomic_write, read_json, write_json
from matchdistill.matching import Matching
from matchdistill.measuring import watch_memory
from matchdistill.messages import attempt, cause
from matchdistill.refreshed import RefreshedPosition
from matchdistill.tasks.module import DistilledModule

FOLDER = "evidence"
ENVIRONMENT, REFRESHES, COSTS = f"{FOLDER}/environment.json", f"{FOLDER}/refreshes.json", f"{FOLDER}/costs.json"
EPOCHS = f"{FOLDER}/epochs.json"
FIRST, LAST, FINAL = (f"{FOLDER}/{name}.safetensors" for name in ("first", "last", "final"))
PICTURES, JUDGED, CONTESTED = (f"{FOLDER}/{name}.safetensors" for name in ("pictures", "judged", "contested"))

HEAT = (96, 192)  # cells of a heat map, at most
PACKAGES = ("matchdistill", "torch", "torchvision", "timm", "pytorch-lightning", "numpy", "scipy")


class Evidence(Callback):
    """Keeps, as a run goes on, what is matched at each refresh and how long the epochs take.

    Args:
        out: folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._told: list[Matching] = []
        self._validating = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep where the run takes place, and leave out the refreshes after the checkpoint that it goes on from."""

        def keep() -> None:
            keep_environment(pl_module, self.out)
            before = [each for each in read_refreshes(self.out) if each["step"] <= trainer.global_step]
            write_json(self.out / REFRESHES, {"refreshes": before})

        watch_memory(pl_module.device)
        if trainer.is_global_zero:
            attempt("keep the environment", keep)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the clock."""
        self._started, self._validating = time.monotonic(), 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what the refresh before the step came to."""
        self._keep(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Keep what the refresh at the end of the epoch came to, which a run that goes on does not repeat."""
        self._keep(trainer, pl_module)

    def _keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DistilledModule)
        matchings = pl_module.refreshed
        if not matchings or matchings is self._told:
            return
        self._told = matchings
        if trainer.is_global_zero:
            attempt("keep what was matched", lambda: self._write(pl_module, matchings))

    def _write(self, pl_module: DistilledModule, matchings: Sequence[Matching]) -> None:
        assert isinstance(pl_module.distiller, MatchingDistiller)
        found = {
            **pl_module.moment,
            "images": matchings[0].images,
            "cost": [matching.mean_cost for matching in matchings],
            "churn": [matching.churn for matching in matchings],
        }
        # Of a run that was cut after a refresh, it is the same once more.
        refreshes = [*(each for each in read_refreshes(self.out) if each["step"] < found["step"]), found]
        for place in (FIRST, LAST) if len(refreshes) == 1 else (LAST,):
            save_matched(self.out / place, pl_module.distiller.positions, matchings, found)
        write_json(self.out / REFRESHES, {"refreshes": refreshes})

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the clock."""
        self._validation_started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the validation up."""
        self._validating += time.monotonic() - self._validation_started

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the seconds of the epoch, refresh and validation with it, and of the validation."""
        seconds = {"seconds/epoch": time.monotonic() - self._started, "seconds/validation": self._validating}
        pl_module.log_dict(seconds)


def read_refreshes(out: Path) -> list[dict[str, Any]]:
    """The refreshes of a run so far, each with step, epoch, images, seconds, and cost and churn by position."""
    path = out / REFRESHES
    return list(read_json(path, refreshes=list)["refreshes"]) if path.is_file() else []


def read_epochs(out: Path) -> list[dict[str, Any]]:
    """The whole epochs of a run so far, each with epoch, step, and what it came to by name."""
    path = out / EPOCHS
    return list(read_json(path, epochs=list)["epochs"]) if path.is_file() else []


def keep_environment(module: pl.LightningModule, out: Path) -> None:
    """Write where a run takes place into its folder, and when it went on where it does."""
    trainer = module.trainer
    described = environment(module.device, trainer.world_size)
    if trainer.global_step:  # the run goes on
        first = read_json(out / ENVIRONMENT) if (out / ENVIRONMENT).is_file() else {}
        resumed = [*first.get("resumed", []), described["begun"]]
        described |= {"begun": first.get("begun", "unknown"), "resumed": resumed}
    write_json(out / ENVIRONMENT, described)


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Command, versions and machine."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "begun": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "python": platform.python_version(),
        **versions,
        "system": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": processes,
        "threads": torch.get_num_threads(),
    }


def save_matched(
    path: Path, positions: Sequence[RefreshedPosition], matchings: Sequence[Matching], told: dict[str, Any]
) -> None:
    """Write the matching in force at every position.

    Of each: ``index`` (Cs, G), ``similarity`` (Cs,) by the costs (Cs, Ct), ``margin`` (Cs,), and ``heat``, the costs
    reordered and averaged to at most `HEAT` cells.
    """
    tensors: dict[str, Tensor] = {}
    described = []
    for number, (position, matching) in enumerate(zip(positions, matchings, strict=True)):
        found = {"index": matching.index, "similarity": matching.similarity, "margin": position.margin}
        found["heat"] = heat_map(matching.cost, matching.index)
        tensors |= {f"{name}{number}": value for name, value in found.items()}
        described.append(
            {
                "teacher": str(position.teacher),
                "student": str(position.student),
                "teacher channels": position.teacher_channels,
                "student channels": position.student_channels,
                "partners": position.partners,
                "mean cost": matching.mean_cost,
                "margins": position.margin_norm or "measured",
            }
        )
    save(path, tensors, {**told, "positions": described})


def heat_map(cost: Tensor, index: Tensor) -> Tensor:
    """Costs (Cs, Ct) in an order that the matching (Cs, G) is the diagonal of, averaged to at most `HEAT` cells.

    Student channels come with the least mean cost of their group first, teacher channels as their students do; those
    without a partner last.

    Examples:
        >>> heat_map(torch.tensor([[0.5, 1.0, 3.0], [2.0, 0.1, 4.0]]), torch.tensor([[0], [1]]))
        tensor([[0.1000, 2.0000, 4.0000],
                [1.0000, 0.5000, 3.0000]])
    """
    rows = most_similar_first(Matching("", index, cost, 0).similarity)
    members = index[rows]
    members = members[members >= 0]
    others = torch.ones(cost.shape[1], dtype=torch.bool, device=cost.device)
    others[members] = False
    columns = torch.cat([members, others.nonzero().flatten()])
    cells = min(cost.shape[0], HEAT[0]), min(cost.shape[1], HEAT[1])
    return F.adaptive_avg_pool2d(cost[rows][:, columns][None], cells)[0]


def most_similar_first(similarity: Tensor) -> Tensor:
    """The student channels in the order of their similarities (Cs,), those without a partner (NaN) last."""
    return similarity.nan_to_num(-math.inf).argsort(descending=True, stable=True)


def save(path: Path, tensors: Mapping[str, Tensor], told: dict[str, Any]) -> None:
    """Write tensors, floating ones in 16 bits unless they have 64, and what is told of them."""
    plain = {
        name: (value.half() if value.is_floating_point() and value.dtype != torch.float64 else value)
        .detach()
        .cpu()
        .contiguous()
        for name, value in tensors.items()
    }
    # As bytes: the library would make a file that only its owner can read.
    content = safetensors.torch.save(plain, metadata={"told": json.dumps(told)})
    atomic_write(path, lambda temporary: temporary.write_bytes(content))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save` wrote; None where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return safetensors.torch.load(content), json.loads(head["__metadata__"]["told"])
    except Exception as error:  # a damaged file makes readers fail in every way
        raise ValueError(f"{path} is damaged ({cause(error)}): remove it, the page can do without it") from error
