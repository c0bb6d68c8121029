"""Distillation in a training script like torchvision's for classification: a folder of images, SGD, a cosine schedule.

    python examples/torchvision_reference.py --data-path /data/birds --teacher resnet50 --teacher-weights teacher.pth \\
        --model mobilenet_v2 --weights IMAGENET1K_V1 --epochs 90 --device cuda

DATA_PATH has train/CLASS/*.jpg and val/CLASS/*.jpg. The lines that add the distillation end with "# MGD".
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from matchdistill import MatchingDistiller  # MGD
from matchdistill.models import build_model

NORMALIZE = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", type=Path, required=True)
    parser.add_argument("--model", default="resnet18", choices=models.list_models(models), metavar="NAME")
    parser.add_argument("--weights", default=None, help="a file, or torchvision's name for its own")
    parser.add_argument("--teacher", default="resnet50", choices=models.list_models(models), metavar="NAME")  # MGD
    parser.add_argument("--teacher-weights", default=None)  # MGD
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("-b", "--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("-j", "--workers", type=int, default=0)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/torchvision_reference"))
    return parser


def train_one_epoch(model, criterion, optimizer, data_loader, device, epoch):
    model.train()
    for image, target in data_loader:
        image, target = image.to(device), target.to(device)
        output, distillation = model(image)  # MGD: of the distiller
        loss = criterion(output, target) + distillation  # MGD
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}, of which distillation {distillation.item():.3f}")


def evaluate(model, data_loader, device):
    model.eval()
    hits = 0
    with torch.inference_mode():
        for image, target in data_loader:
            hits += (model(image.to(device)).argmax(1).cpu() == target).sum().item()
    return hits / len(data_loader.dataset)


def main(arguments=None):
    """Returns the top-1 accuracy of the last epoch."""
    args = get_args_parser().parse_args(arguments)
    device, size = torch.device(args.device), args.image_size
    augment = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.ToTensor(), NORMALIZE]
    )
    centre = transforms.Compose(
        [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size), transforms.ToTensor(), NORMALIZE]
    )
    train, val = ImageFolder(args.data_path / "train", augment), ImageFolder(args.data_path / "val", centre)
    options = {"batch_size": args.batch_size, "num_workers": args.workers}
    data_loader, data_loader_test = (
        DataLoader(train, shuffle=True, drop_last=True, **options),
        DataLoader(val, **options),
    )
    classes = len(train.classes)
    model = build_model(f"torchvision:{args.model}", classes, args.weights)
    teacher = build_model(f"torchvision:{args.teacher}", classes, args.teacher_weights)  # MGD
    distiller = MatchingDistiller(teacher, model, example=torch.zeros(2, 3, size, size)).to(device)  # MGD
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        distiller.parameters(), args.lr, momentum=0.9, weight_decay=1e-4
    )  # MGD: not the model's
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    for epoch in range(args.epochs):
        distiller.refresh(data_loader)  # MGD
        train_one_epoch(distiller, criterion, optimizer, data_loader, device, epoch)
        lr_scheduler.step()
        accuracy = evaluate(model, data_loader_test, device)
        print(f"epoch {epoch}: top-1 {accuracy:.1%}")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.output_dir / "model.pth")  # the student as it is without MGD
    return accuracy


if __name__ == "__main__":
    main()
