"""Distillation of a LightningModule that is left as it is, on scikit-learn's digits.

    python examples/lightning_callback.py

The callback is all that distils: without it the same module trains alone. A minute on one core; prints the accuracies. The
checkpoint has the plain module's entries; `trainer.fit(..., ckpt_path=...)` with the callback goes on where it was.
"""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from matchdistill.data import ImageData
from matchdistill.integrations.lightning import MatchingDistillation
from matchdistill.models import small_resnet


class Classifier(pl.LightningModule):
    """Any module of yours: it knows nothing of a teacher."""

    def __init__(self, width=8, lr=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.model = small_resnet(width=width)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.model(images).argmax(1) == labels).float().mean(), batch_size=len(labels))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams.lr, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module, data, epochs, folder, *callbacks):
    """Train a module; returns its accuracy, and the trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="auto", devices=1, callbacks=list(callbacks), default_root_dir=folder, **quiet
    )
    trainer.fit(module, data)
    return trainer.callback_metrics["accuracy"].item(), trainer


def main(epochs=20, width=32, folder="runs/lightning_callback"):
    """Returns the accuracies of the teacher, and of the student without and with it."""
    pl.seed_everything(0, verbose=False)
    teacher = Classifier(width)
    accuracies = {"teacher": fit(teacher, ImageData(batch_size=50), epochs, folder)[0]}
    few = ImageData(batch_size=50, train_limit=300)
    example = torch.zeros(2, 3, 16, 16)
    callback = MatchingDistillation(teacher.model, student="model", refresh_every=2, example=example)
    for name, callbacks in (("student alone", []), ("student with MGD", [callback])):
        pl.seed_everything(0, verbose=False)
        accuracies[name], trainer = fit(Classifier(width // 4), few, 2 * epochs, folder, *callbacks)
    for name, accuracy in accuracies.items():
        print(f"{name}: {accuracy:.1%}")
    print(f"checkpoint: {trainer.checkpoint_callback.best_model_path}")
    return accuracies


if __name__ == "__main__":
    main()
