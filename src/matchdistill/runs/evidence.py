"""What a run leaves in its folder for its page, beside metrics and logs.

Axes: N images, Cs student channels, Ct teacher channels, G group, M members shown, H height, W width.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
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
from matchdistill.losses import ignored
from matchdistill.matching import Matching
from matchdistill.measuring import network_costs, watch_memory
from matchdistill.messages import attempt, cause
from matchdistill.probing import evaluating, unchanged
from matchdistill.refreshed import RefreshedPosition
from matchdistill.tasks.module import DistilledModule
from matchdistill.tasks.picture import Picture

FOLDER = "evidence"
ENVIRONMENT, REFRESHES, COSTS = f"{FOLDER}/environment.json", f"{FOLDER}/refreshes.json", f"{FOLDER}/costs.json"
EPOCHS = f"{FOLDER}/epochs.json"
FIRST, LAST, FINAL = (f"{FOLDER}/{name}.safetensors" for name in ("first", "last", "final"))
PICTURES = f"{FOLDER}/pictures.safetensors"

LOOKED_AT = 512  # training images that the final student is compared with its teacher on
SHOWN_IMAGES, SHOWN_CHANNELS, SHOWN_MEMBERS = 4, 4, 4  # channels: so many of the best matched, and of the worst
HEAT = (96, 192)  # cells of a heat map, at most
SIDE, MAP_SIDE = 224, 56  # pixels of shown images and maps, at most
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
            described = environment(pl_module.device, trainer.world_size)
            if trainer.global_step:  # the run goes on
                first = read_json(self.out / ENVIRONMENT) if (self.out / ENVIRONMENT).is_file() else {}
                resumed = [*first.get("resumed", []), described["begun"]]
                described |= {"begun": first.get("begun", "unknown"), "resumed": resumed}
            write_json(self.out / ENVIRONMENT, described)
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


def look(module: DistilledModule, data: Any, out: Path, device: torch.device) -> None:
    """Compare the trained student with its teacher, and keep what is to be seen of it; a warning says what could not be.

    Args:
        module: after the training.
        data: of the training.
        out: folder of the run.
        device: that it was trained on.
    """

    networks = [network for network in (module.network(), module.teacher) if network is not None]

    @functools.cache
    def prepared_batch() -> Any:
        return module.transfer_batch_to_device(_shown_batch(data), device, 0)

    def look_at(what: str, work: Callable[[], None]) -> None:
        """Each finds the networks as the training left them."""

        def undone() -> None:
            module.to(device)
            with unchanged(*networks):
                work()

        attempt(what, undone)

    with torch.no_grad(), evaluating(module, *networks):
        look_at("measure the networks", lambda: _measure(module, prepared_batch(), out))
        look_at("take pictures", lambda: _take_pictures(module, prepared_batch(), data.class_names, out))
        look_at("compare the student with its teacher", lambda: _compare(module, data, out))


def _measure(module: DistilledModule, batch: Any, out: Path) -> None:
    costs = read_json(out / COSTS) if (out / COSTS).is_file() else {}
    for role, network in (("student", module.network()), ("teacher", module.teacher)):
        if network is not None:
            costs[role] = network_costs(network, module.one_image(batch))
    write_json(out / COSTS, costs)


def _take_pictures(module: DistilledModule, batch: Any, class_names: list[str], out: Path) -> None:
    pictures, described = module.gallery(batch, class_names)
    tensors, told = _maps(module, batch)
    for number, picture in enumerate(pictures):
        tensors[f"image{number}"] = _small(picture)
        for role, drawn in described[number].items():
            if isinstance(drawn, Picture):
                tensors[f"drawn {role}{number}"] = _small(drawn.pixels)
                described[number][role] = {"words": drawn.words}
    save(out / PICTURES, tensors, {"images": described, "positions": told})


def _shown_batch(data: Any) -> Any:
    """A few validation images, from all over the set."""
    count = min(SHOWN_IMAGES, len(data.val_set))
    return data.val_set.__getitems__(torch.linspace(0, len(data.val_set) - 1, count).round().int().tolist())


def _compare(module: DistilledModule, data: Any, out: Path) -> None:
    """Keep what the matching in force costs the trained student, and what the partial loss ignores."""
    distiller = module.distiller
    if not isinstance(distiller, MatchingDistiller):
        return
    sums = [position.accumulator() for position in distiller.positions]
    counts = torch.zeros(len(sums), 2)
    with module.trainer.precision_plugin.forward_context():
        for batch in data.refresh_dataloader(LOOKED_AT, module.trainer.current_epoch):
            captured, mask = distiller.run(batch, module.run_part)
            distiller.add_up(captured, mask, sums)
            values = distiller.teacher_values(captured)
            for number, position in enumerate(distiller.positions):
                student, target, margin, counted = position.loss_arguments(
                    captured.values[number], values[number], mask
                )
                left = ignored(student, target, margin)
                if counted is not None:
                    left = left.movedim(1, -1)[counted]
                counts[number] += torch.tensor([int(left.sum()), left.numel()])
    told = {"images": sums[0].count, "ignored": (counts[:, 0] / counts[:, 1].clamp_min(1)).tolist()}
    found = [position.found(total) for position, total in zip(distiller.positions, sums, strict=True)]
    save_matched(out / FINAL, distiller.positions, found, told)


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


def _maps(module: DistilledModule, batch: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Of the best and the worst matched student channels of each position: their maps, their members' and the target's.

    By position ``student`` (channels, N, H, W), ``members`` (channels, M, N, H, W) and ``target`` (channels, N, H, W), and
    the channels' numbers, similarities and members on these images.
    """
    if not isinstance(module.distiller, MatchingDistiller):
        return {}, []
    with module.trainer.precision_plugin.forward_context():
        captured, mask = module.distiller.run(batch, module.run_part)
    values = module.distiller.teacher_values(captured)
    tensors, told = {}, []
    for number, position in enumerate(module.distiller.positions):
        sums = position.accumulator()
        student, teacher, counted = position.masked_maps(captured.values[number], values[number], mask)
        sums.update(student, teacher, counted)
        fit = position.found(sums)
        similarity = fit.similarity
        order = most_similar_first(similarity)[: int(similarity.isfinite().sum())]
        few = min(SHOWN_CHANNELS, len(order) // 2) or len(order)
        chosen = torch.cat([order[:few], order[few:][-few:]])
        target = student.new_zeros(student.shape)
        guided = position.guided()
        target[:, slice(None) if guided is None else guided] = position.target(teacher).to(target)
        members = position.members(chosen, fit, SHOWN_MEMBERS)
        found = {
            "student": student[:, chosen],
            "target": target[:, chosen],
            "members": teacher[:, members.flatten()],
        }
        for name, maps in found.items():
            maps = _as_images(maps.float(), counted).movedim(1, 0)
            tensors[f"{name}{number}"] = maps.reshape(*members.shape, *maps.shape[1:]) if name == "members" else maps
        told.append(
            {
                "channels": chosen.tolist(),
                "similarity": similarity[chosen].tolist(),
                "members": members.tolist(),
                "group": position.group_size,
                "first": position.first_members,
            }
        )
    return tensors, told


def _as_images(maps: Tensor, counted: Tensor | None) -> Tensor:
    """Maps (N, C, *) as (N, C, H, W), of a modest size: tokens as a grid, one value as a point.

    The padding of a batch is set to zero.
    """
    if counted is not None:
        maps = maps.masked_fill(~counted[:, None], 0)
    if maps.ndim != 4:
        maps = maps.flatten(2) if maps.ndim > 2 else maps[:, :, None]
        side = math.isqrt(maps.shape[2])
        maps = maps[:, :, -side * side :].reshape(*maps.shape[:2], side, side)
    return _shrunk(maps, MAP_SIDE)


def _small(picture: Tensor) -> Tensor:
    """An image (3, H, W) in 0..1 as bytes, of a modest size."""
    return (_shrunk(picture[None].float(), SIDE)[0].clamp(0, 1) * 255).round().byte()


def _shrunk(images: Tensor, side: int) -> Tensor:
    scale = side / max(images.shape[2:])
    if scale >= 1:
        return images
    return F.interpolate(images, [max(1, round(scale * size)) for size in images.shape[2:]], mode="area")


def save(path: Path, tensors: Mapping[str, Tensor], told: dict[str, Any]) -> None:
    """Write tensors, floating ones in 16 bits, and what is told of them."""
    plain = {
        name: (value.half() if value.is_floating_point() else value).detach().cpu().contiguous()
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
