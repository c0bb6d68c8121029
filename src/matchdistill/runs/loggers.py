"""Where the curves of a run go besides its own files: loggers of Lightning by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from matchdistill.messages import cause

LOGS = "logs"  # the folder


class TensorBoard(TensorBoardLogger):
    """TensorBoard's logs in the folder that is named: Lightning would take "$HOME" in it for a variable."""

    @property
    def log_dir(self) -> str:
        """The folder of the logs."""
        return str(Path(self.root_dir, str(self.version)))


class Wandb(WandbLogger):
    """A run of Weights & Biases on the disk, which ends with its training: the next one in this process is another."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End it."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(0 if status == "success" else 1)


def new_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """The loggers of a run.

    Args:
        names: of `settings.LOGGERS`; their packages are installed.
        out: folder of the run, which is written to.

    Raises:
        ValueError: a package does not begin to log, for example because its version is too old or too new.
    """
    found = []
    for name in names:
        try:
            found.append(_logger(name, out.absolute()))  # Lightning takes "~" for a home
        except Exception as error:  # packages fail in every way
            raise ValueError(f"trainer.loggers: {name} does not begin to log here ({cause(error)})") from error
    return found


def _logger(name: str, out: Path) -> Logger:
    if name == "tensorboard":
        return TensorBoard(out, LOGS, name)
    if name == "wandb":
        folder = out / LOGS
        folder.mkdir(parents=True, exist_ok=True)  # wandb would take another one
        return Wandb(
            name=out.name,
            save_dir=folder,
            project="matchdistill",
            offline=os.environ.get("WANDB_MODE") != "online",
            settings={"silent": True},
        )
    if name == "mlflow":
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions want to be asked for files
        return MLFlowLogger("matchdistill", run_name=out.name, tracking_uri=(out / LOGS / name).as_uri())
    return CSVLogger(out, LOGS)
