"""Distillation with Hugging Face Accelerate, on scikit-learn's digits.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py

Prepared are the distiller, the optimiser and the loader. A refresh is of the distiller itself, with that loader: each
process runs its own share of the images, and all get the matching of all of them. The teacher is trained first, once. Half a
minute on one core; prints the student's accuracy.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from matchdistill import MatchingDistiller
from matchdistill.data import ImageData
from matchdistill.models import load_weights, small_resnet


def digits(train_limit):
    """Training and validation images as plain datasets."""
    data = ImageData(train_limit=train_limit)
    data.setup()
    return [TensorDataset(*images.__getitems__(range(len(images)))) for images in (data.train_set, data.val_set)]


def train_teacher(teacher, epochs):
    """A teacher of all training images, without anything of Accelerate's."""
    optimizer = torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for images, labels in DataLoader(digits(None)[0], 50, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(teacher(images), labels).backward()
            optimizer.step()


def main(epochs=40, train_limit=300, weights="runs/accelerate_loop/teacher.pt", cpu=False):
    """Returns the accuracy of the student, and the distiller."""
    accelerator = Accelerator(cpu=cpu)
    torch.manual_seed(0)
    teacher = small_resnet(width=32)
    with accelerator.main_process_first():
        if not Path(weights).exists():
            train_teacher(teacher, epochs // 4)
            Path(weights).parent.mkdir(parents=True, exist_ok=True)
            torch.save(teacher.state_dict(), weights)
    load_weights(teacher, weights)
    torch.manual_seed(0)  # the same student and order, whoever has trained the teacher
    student = small_resnet(width=8)
    train, val = digits(train_limit)
    distiller = MatchingDistiller(teacher, student, example=torch.zeros(2, 3, 16, 16))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
    batches = DataLoader(train, 50 // accelerator.num_processes, shuffle=True)
    distilled, optimizer, loader = accelerator.prepare(distiller, optimizer, batches)
    for epoch in range(epochs):
        if epoch % 2 == 0:
            accelerator.unwrap_model(distilled).refresh(loader)
        distilled.train()
        for images, labels in loader:
            output, loss = distilled(images)
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(output, labels) + loss)
            optimizer.step()
    distiller = accelerator.unwrap_model(distilled)
    images, labels = (values.to(accelerator.device) for values in val[:])
    with torch.no_grad():
        accuracy = (distiller.student.eval()(images).argmax(1) == labels).float().mean().item()
    accelerator.print(f"student: {accuracy:.1%}")
    return accuracy, distiller


if __name__ == "__main__":
    main()
