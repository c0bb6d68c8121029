"""The trainer of Lightning for a machine, and what of that machine has to be known."""

from __future__ import annotations

import functools
import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

from matchdistill.distributed import leave_at_exit
from matchdistill.messages import cause
from matchdistill.runs.settings import Machine


def machine_trainer(machine: Machine, **options: Any) -> pl.Trainer:
    """A Lightning trainer for a machine, with further options of Lightning's.

    Raises:
        ValueError: values that Lightning or this computer does not have.
    """
    leave_at_exit()
    try:
        trainer = pl.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.num_nodes,
            strategy=machine.strategy,
            precision=machine.precision,
            deterministic=machine.deterministic,
            use_distributed_sampler=False,
            enable_model_summary=False,
            **options,
        )
    except (MisconfigurationException, ImportError, ValueError, RuntimeError) as error:
        raise ValueError(f"trainer does not fit this machine: {cause(error)}") from error
    if machine.precision == "16-mixed" and trainer.precision == "bf16-mixed":
        raise ValueError(f"trainer.precision {machine.precision!r} needs a GPU: give 'bf16-mixed' or '32-true' here")
    return trainer


@functools.cache
def check_compiler(device: torch.device) -> None:
    """Raise a ValueError unless torch.compile works for a device."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # compilers fail in every way
        raise ValueError(
            "trainer.compile needs a C++ compiler that torch.compile can use: install one (g++, or what CXX names), or "
            f"train without: {cause(error)}"
        ) from error


def corrupts_memory(network: nn.Module) -> bool:
    """Whether training with the channels innermost may end the process: oneDNN writes beyond the gradient's end.

    Seen with torch 2.14 on a CPU that has AVX2 and no AVX-512: strided 1x1 convolutions of 2, 4 or 6 channels.
    """
    convolutions = (module for module in network.modules() if isinstance(module, nn.Conv2d))
    return any(each.in_channels < 8 and set(each.kernel_size) == {1} and max(each.stride) > 1 for each in convolutions)


def is_first(machine: Machine) -> bool:
    """Whether this is the process that writes and reports: the only one, or rank 0.

    Ranks in the environment count where there are several processes alone: one of SLURM's tasks, or what is left of another
    run, may have any.
    """
    quieten()
    trainer = machine_trainer(machine, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    rank_zero_only.rank = trainer.global_rank  # type: ignore[attr-defined]  # by which Lightning logs and warns
    return bool(trainer.is_global_zero)


def quieten() -> None:
    """Keep Lightning's hints about hardware and loaders out of the output."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
