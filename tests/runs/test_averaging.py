import pytest
import torch
from safetensors.torch import load_file
from test_train_options import column, metrics_of
from torch import nn

from matchdistill.models import load_weights, small_resnet
from matchdistill.runs.averaging import TRAINED
from matchdistill.runs.store import load_student
from matchdistill.runs.train import fit
from matchdistill.tasks.classification.module import ClassificationModule

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")


class Indexed(nn.Module):
    """With a whole number that a float cannot hold, as index tables may have."""

    def __init__(self, num_classes):
        super().__init__()
        self.network = small_resnet(num_classes, width=2)
        self.register_buffer("table", torch.tensor([2**24 + 1]))

    def forward(self, images):
        return self.network(images)


INDEXED = ("--student.name=test_averaging:Indexed", "--student.options={}")


@pytest.mark.parametrize("method", ["none", "mgd-amp"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_average_of_the_weights(tiny, tmp_path, monkeypatch, method, accumulate):
    """Against a running average in double precision of what the plain run's weights were after each step."""
    common = (*INDEXED, f"--distillation.method={method}", f"--training.accumulate={accumulate}", "--training.epochs=3")
    fit(tiny(*common, "--training.ema=0.7"), tmp_path / "run", quiet=True)

    def record(self, outputs, batch, number, steps=[0]):  # noqa: B006
        if self.global_step > steps[0]:
            steps[0] = self.global_step
            states.append({name: value.double().clone() for name, value in self.network().state_dict().items()})

    states = []
    with monkeypatch.context() as patch:
        patch.setattr(ClassificationModule, "on_train_batch_end", record)
        fit(tiny(*common), tmp_path / "plain", quiet=True)
    assert len(states) == 3 * -(-3 // accumulate)
    expected = states[0]
    for state in states[1:]:
        expected = {name: 0.7 * value + 0.3 * state[name] for name, value in expected.items()}
    found, plain = (load_file(tmp_path / name / "student.safetensors") for name in ("run", "plain"))
    for name, value in found.items():
        if value.is_floating_point():
            torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, plain[name])

    saved = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("run", "plain")]
    assert saved[0][TRAINED].keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in saved[0][TRAINED].items())
    assert column(tmp_path / "run", "train/loss") == column(tmp_path / "plain", "train/loss")
    checkpointed = Indexed(10)
    load_weights(checkpointed, tmp_path / "run" / "last.ckpt")
    assert all(torch.equal(value, found[name]) for name, value in checkpointed.state_dict().items())

    images, labels = map(torch.cat, zip(*tiny().data.val_dataloader(), strict=True))
    with torch.no_grad():
        logits = load_student(tmp_path / "run", trust=True)[0](images)
    assert metrics_of(tmp_path / "run")["student"]["top1"] == pytest.approx(
        (logits.argmax(1) == labels).double().mean()
    )


@pytest.mark.parametrize("decay", [1.0, -0.1, 2])
def test_decays_that_average_nothing(tiny, decay):
    with pytest.raises(ValueError, match=rf"training.ema is {float(decay)}: expected a number from 0 to below 1"):
        tiny(f"--training.ema={decay}")
