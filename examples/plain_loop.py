"""Distillation in a plain PyTorch loop, on scikit-learn's digits.

    python examples/plain_loop.py

A teacher learns from all training images, a student a quarter as wide from 300 of them, once alone and once with the
teacher. Half a minute on one core; prints both students' accuracies.
"""

import torch
import torch.nn.functional as F

from matchdistill import MatchingDistiller
from matchdistill.data import ImageData
from matchdistill.models import small_resnet


def train(model, data, epochs, distiller=None):
    """Train a model, with the guidance of its distiller's teacher where there is one; returns its accuracy."""
    loader = data.train_dataloader()
    parameters = model.parameters() if distiller is None else distiller.parameters()  # with the normalisation
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        if distiller is not None and epoch % 2 == 0:
            distiller.refresh(loader)
        (distiller or model).train()
        for images, labels in loader:
            if distiller is None:
                loss = F.cross_entropy(model(images), labels)
            else:
                output, distillation = distiller(images)
                loss = F.cross_entropy(output, labels) + distillation
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        hits = [(model.eval()(images).argmax(1) == labels) for images, labels in data.val_dataloader()]
    return torch.cat(hits).float().mean().item()


def main(epochs=20, width=32, seed=0):
    """Returns the accuracies of the teacher, and of the student without and with it."""
    torch.manual_seed(seed)
    teacher = small_resnet(width=width)
    accuracies = {"teacher": train(teacher, ImageData(batch_size=50), epochs)}
    few = ImageData(batch_size=50, train_limit=300, seed=seed)
    for name in ("student alone", "student with MGD"):
        torch.manual_seed(seed)
        student = small_resnet(width=width // 4)
        example = torch.zeros(2, 3, 16, 16)
        distiller = MatchingDistiller(teacher, student, example=example) if name.endswith("MGD") else None
        accuracies[name] = train(student, few, 2 * epochs, distiller)
    for name, accuracy in accuracies.items():
        print(f"{name}: {accuracy:.1%}")
    return accuracies


if __name__ == "__main__":
    main()
