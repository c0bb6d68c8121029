"""A teacher that ONNX Runtime runs, held to PyTorch's values."""

import copy
import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from matchdistill import MatchingDistiller, Tap, engine
from matchdistill.engine import on_onnxruntime
from matchdistill.models import build_model, small_resnet
from matchdistill.prepare import prepared
from matchdistill.teacher import FrozenTeacher
from networks import PLAIN_TAPS, Plain, as_if_trained

pytestmark = pytest.mark.usefixtures("one_thread")
pytest.importorskip("onnxruntime")


def images(size: int = 8, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def given(teacher: FrozenTeacher, model: nn.Module, *args, **kwargs):
    """What a teacher gives for the arguments that a student was called with."""
    student = FrozenTeacher(copy.deepcopy(model))
    with student.capture() as captured:
        student.model(*args, **kwargs)
    values = teacher(captured)
    return values, captured.teacher_output


@pytest.mark.parametrize(
    ("name", "size", "taps"),
    [
        ("torchvision:resnet18", 64, ["layer1.1.relu:input", "layer2.1.bn2:output", "layer2.1.bn2:output"]),
        ("timm:mobilenetv3_small_050", 32, ["blocks.1.0.bn2:output", "blocks.3:output"]),
        ("timm:vit_tiny_patch16_224", 32, ["blocks.1:output", "norm:output"]),
    ],
)
def test_values_and_output_are_those_of_the_network(name, size, taps, monkeypatch):
    torch.manual_seed(0)
    options = {"img_size": size, "depth": 3} if "vit" in name else {}
    network = as_if_trained(build_model(name, num_classes=5, **options)).eval()
    paths = [tuple(tap.split(":")) for tap in taps]
    plain, fast = (
        FrozenTeacher(copy.deepcopy(network), [Tap(*path) for path in paths], prepare)
        for prepare in (None, on_onnxruntime)
    )
    used = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda session, tensors: used.append(session) or run(session, tensors))
    for count in (2, 1, 3):  # the first pass copies what PyTorch may change later
        example = images(size, count, count)
        expected, output = given(plain, network, example)
        found, made = given(fast, network, example)
        assert found.keys() == expected.keys()
        for number, value in expected.items():
            torch.testing.assert_close(found[number], value, rtol=1e-4, atol=1e-4 * value.abs().max().item())
        torch.testing.assert_close(made, output, rtol=1e-4, atol=1e-4)
    assert len(used) == 4  # once to be compared
    assert len(set(used)) == 1


class Structured(nn.Module):
    """Takes what is no tensor, and gives a dictionary; the values at its tap are changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.activation = nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True)

    def forward(self, images, scale=1.0, *, shift=None):
        features = self.activation(self.convolution(images * scale))
        return {"features": features, "none": None, "pooled": [features.mean((2, 3)) + (0 if shift is None else shift)]}


def test_arguments_and_output_of_every_kind():
    network = Structured().eval()
    fast = FrozenTeacher(copy.deepcopy(network), [Tap("convolution", "output")], on_onnxruntime)
    before = network.convolution(images())
    for arguments, named in (((images(),), {}), ((images(), 2.0), {}), ((images(),), {"shift": torch.ones(2, 4)})):
        values, output = given(fast, network, *arguments, **named)
        expected = network(*arguments, **named)
        assert output["none"] is None
        torch.testing.assert_close(output["features"], expected["features"])
        torch.testing.assert_close(output["pooled"], expected["pooled"])
        if len(arguments) == 1:
            torch.testing.assert_close(values[0], before)


def test_images_in_a_graph_under_autocast():
    """The values stay float32, and nothing goes back through the teacher."""
    network = Structured().eval()
    fast = FrozenTeacher(copy.deepcopy(network), [Tap("convolution", "output")], on_onnxruntime)
    expected = network.convolution(images())
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = given(fast, network, images().requires_grad_())
    assert values[0].dtype == torch.float32
    assert not values[0].requires_grad
    torch.testing.assert_close(values[0], expected)


def test_a_tensor_without_axes():
    network = Structured().eval()
    fast = FrozenTeacher(copy.deepcopy(network), [Tap("convolution", "output")], on_onnxruntime)
    for scale in (2.0, 3.0):
        values, _ = given(fast, network, images(), torch.tensor(scale))
        torch.testing.assert_close(values[0], network.convolution(scale * images()))


def test_a_sum_of_two_values():
    torch.manual_seed(0)
    network = build_model("timm:vit_tiny_patch16_224", num_classes=5, img_size=32, depth=2).eval()
    tap = Tap("blocks.1.mlp", "output", plus=Tap("blocks.1.norm2", "input"))
    plain, fast = (FrozenTeacher(copy.deepcopy(network), [tap], prepare) for prepare in (None, on_onnxruntime))
    expected, found = (given(teacher, network, images(32))[0] for teacher in (plain, fast))
    assert found.keys() == expected.keys() == {0}
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_distiller_trains_and_refreshes_as_with_pytorch():
    teacher, student = as_if_trained(Plain(8)), Plain(4)
    plain, fast = (
        MatchingDistiller(copy.deepcopy(teacher), copy.deepcopy(student), PLAIN_TAPS, prepare=prepare)
        for prepare in (None, on_onnxruntime)
    )
    for distiller in (plain, fast):
        distiller.refresh([images(), images(count=3, seed=1)])
    for one, other in zip(plain.positions, fast.positions, strict=True):
        assert torch.equal(one.index, other.index)
    losses = [distiller(images(seed=2))[1] for distiller in (plain, fast)]
    losses[1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in fast._teacher.model.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_copies_and_new_weights(copied):
    fast = MatchingDistiller(as_if_trained(Plain(8)), Plain(4), PLAIN_TAPS, prepare=on_onnxruntime)
    fast.refresh([images()])
    other = copied(fast)
    assert other(images())[1].item() == pytest.approx(fast(images())[1].item(), rel=1e-6)
    before = fast(images())[1].item()
    teacher = fast._teacher.model
    teacher.load_state_dict({name: 2 * value for name, value in teacher.state_dict().items()})
    plain = MatchingDistiller(copy.deepcopy(teacher), copy.deepcopy(fast.student), PLAIN_TAPS)
    plain.load_state_dict(fast.state_dict())
    assert fast(images())[1].item() == pytest.approx(plain(images())[1].item(), rel=1e-5)
    assert fast(images())[1].item() != pytest.approx(before, rel=1e-2)


def test_images_of_many_sizes_are_refused(monkeypatch):
    monkeypatch.setattr(engine, "MOST", 2)
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    fast = FrozenTeacher(network, [Tap("0", "output")], on_onnxruntime)
    sizes = range(8, 8 + engine.MOST)
    for size in (*sizes, *sizes):  # again: they have their programs
        given(fast, network, images(size))
    with pytest.raises(ValueError, match=r"more than 2 sizes, or .*, and ONNX Runtime needs a program for each: give"):
        given(fast, network, images(8 + engine.MOST))


def test_a_program_that_computes_something_else_is_refused(monkeypatch):
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda session, tensors: [1.01 * value for value in run(session, tensors)])
    network = as_if_trained(small_resnet(width=4))
    with pytest.raises(ValueError, match=r"the teacher's values differ by 0\.01 of .* if ONNX Runtime runs it: let"):
        given(FrozenTeacher(network, [Tap("layer1", "output")], on_onnxruntime), network, images(16))


class Drawn(nn.Module):
    """What it does depends on the values of the images."""

    def forward(self, images):
        return images if images.sum() > 0 else -images


def test_a_network_that_cannot_be_exported_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), Drawn())
    with pytest.raises(ValueError, match=r"^torch\.onnx cannot take the model \("):
        on_onnxruntime(FrozenTeacher(network).model)(images())


def test_what_is_needed(monkeypatch):
    with pytest.raises(ValueError, match=r"the teacher's weights are torch\.bfloat16, .* give them as float32, or let"):
        on_onnxruntime(nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="ONNX Runtime runs a teacher on the CPU, but this one is on meta: train on"):
        on_onnxruntime(nn.Linear(2, 2, device="meta"))
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"ONNX needs onnxruntime: pip install 'matchdistill\[onnx\]'"):
        on_onnxruntime(nn.Linear(2, 2))


@pytest.mark.parametrize("prepare", [on_onnxruntime, prepared])
def test_a_distiller_that_is_compiled_as_a_whole(prepare):
    """PyTorch runs the teacher then, whose activations change the values at the taps in place."""
    torch.compiler.reset()
    fast = MatchingDistiller(as_if_trained(Plain(8)), Plain(4), PLAIN_TAPS, prepare=prepare)
    fast.refresh([images()])
    expected = fast(images())[1].item()
    compiled = torch.compile(fast, backend="eager", fullgraph=True)
    assert compiled(images())[1].item() == pytest.approx(expected, rel=1e-5)


@dataclasses.dataclass
class Found:
    logits: Tensor


class Boxed(nn.Module):
    """Gives what nobody but itself can take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)

    def forward(self, images, scale=None):
        return Found(self.convolution(images if scale is None else images * scale))


@pytest.mark.parametrize("prepare", [on_onnxruntime, prepared])
def test_a_distiller_is_compiled_before_its_first_step(prepare):
    torch.compiler.reset()
    fast = MatchingDistiller(as_if_trained(Plain(8)), Plain(4), PLAIN_TAPS, prepare=prepare)
    plain = MatchingDistiller(copy.deepcopy(fast._teacher.model), copy.deepcopy(fast.student), PLAIN_TAPS)
    plain.refresh([images()])
    fast.load_state_dict(plain.state_dict())
    compiled = torch.compile(fast, backend="eager")
    assert compiled(images())[1].item() == pytest.approx(plain(images())[1].item(), rel=1e-5)


def test_what_is_no_tensor_in_lists_and_dictionaries_is_refused():
    network = Boxed().eval()
    with pytest.raises(
        ValueError, match=r"the teacher gives a Found, which ONNX Runtime does not know: expected tensors"
    ):
        given(FrozenTeacher(network, prepare=on_onnxruntime), network, images())
    with pytest.raises(ValueError, match="the teacher is given a ndarray, which ONNX Runtime does not know"):
        given(FrozenTeacher(network, prepare=on_onnxruntime), network, images(), np.float32([2.0]))


def test_the_network_itself_is_tapped():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    taps = [Tap("", "input"), Tap("1", "output"), Tap("", "output")]
    plain, fast = (FrozenTeacher(copy.deepcopy(network), taps, prepare) for prepare in (None, on_onnxruntime))
    for seed in (0, 1):
        expected, found = (given(teacher, network, images(seed=seed))[0] for teacher in (plain, fast))
        assert found.keys() == expected.keys() == {0, 1, 2}
        for number, value in expected.items():
            torch.testing.assert_close(found[number], value)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 1)

    def forward(self, images, place, scale):
        return self.convolution(images + place) * scale[:, None, None]


@pytest.mark.parametrize("count", [1, 2])
def test_arguments_that_are_not_of_the_batch(count):
    """One of a single row, and one that is as long as it is whatever the number of images."""
    network = Scaled().eval()
    fast = FrozenTeacher(copy.deepcopy(network), [Tap("convolution", "output")], on_onnxruntime)
    for number in (count, 3, 5):
        arguments = images(count=number, seed=number), torch.randn(1, 3, 8, 8), torch.randn(4)
        _, output = given(fast, network, *arguments)
        torch.testing.assert_close(output, network(*arguments))


def test_small_values_are_compared_too(monkeypatch):
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda session, tensors: [value.roll(1) for value in run(session, tensors)])
    network = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1e-6)
    with pytest.raises(ValueError, match="the teacher's values differ by"):
        given(FrozenTeacher(network, [Tap("0", "output")], on_onnxruntime), network, images())


def test_arguments_that_do_not_fit_are_said_of_the_teacher():
    student = nn.Sequential(nn.Conv2d(3, 4, 1))
    fast = FrozenTeacher(Scaled(), prepare=on_onnxruntime)
    with pytest.raises(
        ValueError, match=r"the teacher \(Scaled\) does not take what the student was called with: missing"
    ):
        given(fast, student, images())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_and_inference_mode(dtype):
    """As parts of a student are called, and as Lightning validates."""
    network = Structured().eval()
    fast = FrozenTeacher(copy.deepcopy(network), [Tap("convolution", "output")], on_onnxruntime)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        values, _ = given(fast, network, images().to(dtype))
    torch.testing.assert_close(values[0], network.convolution(images().to(dtype).float()))
    torch.testing.assert_close(given(fast, network, images(seed=1))[0][0], network.convolution(images(seed=1)))


def test_one_program_for_all_threads(monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    fast, made = FrozenTeacher(network, [Tap("0", "output")], on_onnxruntime), []
    program = engine._Programs._program
    monkeypatch.setattr(engine._Programs, "_program", lambda *given: made.append(1) or program(*given))
    given(fast, network, images(4))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda seed: given(fast, network, images(8, seed=seed))[0][0], range(4)))
    assert len(made) == 2
    for seed, value in enumerate(found):
        torch.testing.assert_close(value, network(images(8, seed=seed)))


def test_without_a_capture():
    network = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    expected = network(images())
    torch.testing.assert_close(on_onnxruntime(network)(images()), expected)
