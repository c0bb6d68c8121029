"""Distillation in the Trainer of Hugging Face transformers, on scikit-learn's digits.

    python examples/transformers_trainer.py

Needs pip install transformers accelerate. A minute on one core; prints the accuracies. The student's folder loads with
from_pretrained, as without distillation.
"""

from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from matchdistill.data import ImageData
from matchdistill.integrations.transformers import MatchingTrainer


def network(width):
    """A small ResNet for ten digits."""
    sizes = [width, 2 * width, 4 * width]
    config = ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=[1, 1, 1], layer_type="basic", num_labels=10)
    return ResNetForImageClassification(config)


def items(loader):
    """The images of a loader as the Trainer takes them, one by one."""
    pairs = [pair for images, labels in loader for pair in zip(images, labels.tolist(), strict=True)]
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def main(epochs=20, width=32, folder="runs/transformers_trainer"):
    """Returns the accuracies of the teacher, and of the student without and with it."""
    everything, few = ImageData(batch_size=50), ImageData(batch_size=50, train_limit=300)
    training, fewer = items(everything.train_dataloader()), items(few.train_dataloader())
    validation = items(everything.val_dataloader())

    def accuracy_of(prediction):
        return {"accuracy": (prediction.predictions.argmax(1) == prediction.label_ids).mean().item()}

    def trained(kind, model, data, epochs, **options):
        set_seed(0)
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=50, learning_rate=1e-3, report_to="none"
        )
        sets = {"train_dataset": data, "eval_dataset": validation}
        trainer = kind(model, arguments, **sets, compute_metrics=accuracy_of, **options)
        trainer.train()
        return trainer.evaluate()["eval_accuracy"], trainer

    set_seed(0)
    teacher, alone, student = network(width), network(width // 4), network(width // 4)
    student.load_state_dict(alone.state_dict())
    accuracies = {"teacher": trained(Trainer, teacher, training, epochs)[0]}
    accuracies["student alone"] = trained(Trainer, alone, fewer, 2 * epochs)[0]
    accuracies["student with MGD"], trainer = trained(
        MatchingTrainer, student, fewer, 2 * epochs, teacher=teacher, refresh_every=2
    )
    trainer.save_model(f"{folder}/student")
    for name, accuracy in accuracies.items():
        print(f"{name}: {accuracy:.1%}")
    return accuracies


if __name__ == "__main__":
    main()
