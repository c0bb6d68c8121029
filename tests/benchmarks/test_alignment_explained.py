"""What the benchmark measures of a student that trains, and what it writes."""

import types

import pytest
import torch

from benchmarks import alignment_explained
from matchdistill.files import read_json
from matchdistill.models import small_resnet
from networks import Plain, as_if_trained


def batches(count: int) -> list[tuple[torch.Tensor, None]]:
    return [(torch.randn(count, 3, 8, 8), None)]


def test_a_copy_of_the_teacher_says_everything_and_another_network_less() -> None:
    torch.manual_seed(0)
    teacher, student = as_if_trained(Plain(4)), as_if_trained(Plain(4))
    before = {name: value.clone() for name, value in student.state_dict().items()}
    train, test = batches(40), batches(30)
    drawn = torch.get_rng_state()
    same, other = (alignment_explained.shares(teacher, each, train, test) for each in (teacher, student))
    assert len(same) == 3
    assert min(same) > 0.98
    assert max(other) < min(same)
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert student.training


def test_a_student_is_measured_before_some_epochs_and_at_the_end(tmp_path) -> None:
    torch.manual_seed(0)
    torch.save(small_resnet(width=32).state_dict(), tmp_path / "teacher.pt")
    drawn = torch.get_rng_state()
    watch = alignment_explained.Watch("quickstart", str(tmp_path / "teacher.pt"), str(tmp_path / "found.json"))
    assert torch.equal(torch.get_rng_state(), drawn)
    student = small_resnet(width=8)
    data = types.SimpleNamespace(
        refresh_dataloader=lambda count, epoch: batches(20), val_dataloader=lambda: batches(10)
    )
    module, trainer = types.SimpleNamespace(network=lambda: student), types.SimpleNamespace(datamodule=data)
    for trainer.current_epoch in range(4):
        watch.on_train_epoch_start(trainer, module)
    trainer.current_epoch = 4
    watch.on_train_end(trainer, module)
    found = read_json(tmp_path / "found.json")
    assert list(found) == ["0", "2", "4"]
    assert found["0"] == pytest.approx(found["4"], abs=0.5)
    assert all(len(each) == 3 for each in found.values())


def test_a_table_has_means_over_seeds() -> None:
    runs = {"0": {"0": [0.1, 0.2], "40": [0.3, 0.5]}, "1": {"0": [0.2, 0.2], "40": [0.5, 0.7]}}
    lines = alignment_explained.markdown({"quickstart": {"alone": runs}}).splitlines()
    assert "| alone | 15 / 20 | 40 / 60 |" in lines
    assert "Seeds: 0, 1." in lines
