"""What hooks take during a forward pass: values before activations, whatever happens to them later.

Axes: N images, C channels, H and W positions.
"""

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from matchdistill import Tap
from matchdistill.capture import Capture
from matchdistill.probing import copy_of_model
from networks import PLAIN_TAPS, Function, Plain, conv_bn

TAPS = [Tap.parse(student) for _, student in PLAIN_TAPS]


pytestmark = pytest.mark.usefixtures("one_thread")


def images(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))


def plain(**options: Any) -> Plain:
    torch.manual_seed(0)
    return Plain(4, **options)


class Residual(nn.Module):
    """Two residual blocks with every kind of in-place operation, or none."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inplace = inplace
        self.stem, self.first, self.second, self.third = (conv_bn(channels, 6) for channels in (3, 6, 6, 6))
        self.relu = nn.ReLU(inplace)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not self.inplace:
            a = self.relu(self.stem(x))
            b = self.relu(self.first(a) + a)
            c = F.leaky_relu(self.second(b), 0.1) + b
            return torch.relu(self.out(self.third(c) + c))
        a = self.relu(self.stem(x))
        b = self.first(a)
        b += a
        b = self.relu(b)
        c = F.leaky_relu_(self.second(b), 0.1) + b
        d = self.third(c)
        d += c
        return torch.relu_(self.out(d))


RESIDUAL_TAPS = [
    Tap("stem"),
    Tap("first"),
    Tap("relu", "input"),
    Tap("second"),
    Tap("third", "input"),
    Tap("third.1"),
    Tap("out"),
]


@pytest.mark.parametrize("training", [False, True])
def test_values_and_gradients_are_those_of_the_network_without_in_place_operations(training: bool) -> None:
    networks = [Residual(inplace).train(training) for inplace in (True, False)]
    captures = [Capture(network, RESIDUAL_TAPS) for network in networks]
    for step in range(3):
        losses = []
        for network, capture in zip(networks, captures, strict=True):
            network.zero_grad()
            with capture() as captured:
                output = network(images(step))
            losses.append(output.sum() + sum((value * (n + 1)).tanh().sum() for n, value in captured.values.items()))
            losses[-1].backward()
            assert sorted(captured.values) == list(range(len(RESIDUAL_TAPS)))
            if network is networks[0]:
                values = captured.values
            else:
                for number, value in captured.values.items():
                    torch.testing.assert_close(values[number], value, rtol=0, atol=0)
        torch.testing.assert_close(*losses)
        for first, second in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
            torch.testing.assert_close(first.grad, second.grad)


@pytest.mark.parametrize("training", [False, True])
def test_sums_that_the_network_makes_and_rectifies_in_place(training: bool) -> None:
    network = Residual(inplace=True).train(training)
    capture = Capture(network, [Tap("out"), Tap.parse("third + third:input"), Tap("stem")])
    for step in range(3):
        with capture() as captured:
            network(images(step))
        assert sorted(captured.values) == [0, 1, 2]
        assert (captured.values[1] < 0).any()
        assert captured.values[1].equal(captured.values[0])
        gradients = [
            torch.autograd.grad(captured.values[number].tanh().sum(), [*network.parameters()], retain_graph=True)
            for number in (0, 1)
        ]
        assert gradients[0][0].abs().sum() > 0
        for first, second in zip(*gradients, strict=True):
            torch.testing.assert_close(first, second)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("side", ["input", "output"])
def test_values_around_an_in_place_activation(side: str, training: bool) -> None:
    network = plain().train(training)
    capture = Capture(network, [Tap("relu1" if side == "input" else "bn1", side)])
    for step in range(3):
        with capture() as captured:
            network(images(step))
        before = network.bn1(network.conv1(F.relu(network.bn0(network.conv0(images(step))))))
        assert (before < 0).any()
        torch.testing.assert_close(captured.values[0], before)


def test_an_unchanged_value_is_the_tensor_of_the_network() -> None:
    network = plain(inplace=False)
    seen = []
    network.bn1.register_forward_hook(lambda module, args, output: seen.append(output))
    capture = Capture(network, TAPS)
    for _ in range(2):
        with capture() as captured:
            network(images())
    assert captured.values[1].data_ptr() == seen[-1].data_ptr()
    assert captured.arguments is not None


def test_arguments_are_those_of_the_call() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Plain(4)

        def forward(self, batch: dict[str, Any], *, scale: float) -> Tensor:
            return self.net(batch["image"]) * scale

    network = Network()
    capture = Capture(network, [Tap("net.relu1", "input")])
    for _ in range(2):
        with capture() as captured:
            network({"image": images(1), "name": "a"}, scale=2.0)
        assert captured.arguments is not None
        (batch,), keywords = captured.arguments
        assert batch["name"] == "a"
        assert torch.equal(batch["image"], images(1))
        assert keywords == {"scale": 2.0}


def test_arguments_that_the_network_changes_in_place_are_those_before() -> None:
    network = nn.Sequential(nn.LeakyReLU(0.5, inplace=True), nn.Conv2d(3, 4, 1))
    capture = Capture(network, [Tap("1")])
    for step in range(3):
        with capture() as captured:
            network(images(step))
        assert captured.arguments is not None
        assert torch.equal(captured.arguments[0][0], images(step))


def test_later_changes_of_a_value_are_learnt() -> None:
    """What the code around a part of a model does to its output after the block."""
    network = plain().train()
    capture = Capture(network, [Tap("fc")])
    for step in range(3):
        with capture() as captured:
            output = network(images(step))
        expected = output.detach().clone()
        with torch.no_grad():
            output.relu_()
        assert torch.equal(captured.values[0], expected)
        capture.check(captured)


class Sometimes(nn.Module):
    """In place from the third pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.passes = nn.BatchNorm2d(3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return F.relu(self.norm(x), inplace=self.passes > 2)


def test_an_in_place_operation_that_comes_and_goes_is_an_error_once() -> None:
    network = Sometimes()
    capture = Capture(network, [Tap("norm")])

    def run() -> Tensor:
        with capture() as captured:
            network(images())
        return captured.values[0]

    for _ in range(2):
        assert (run() < 0).any()
    with pytest.raises(ValueError, match="the value at norm:output was changed in place in this pass but not"):
        run()
    assert (run() < 0).any()


def test_last_call_of_a_module_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.relu(x) - 1)

    network = Twice()
    with Capture(network, [Tap("relu", "input")])() as captured:
        network(images())
    assert torch.equal(captured.values[0], images().relu() - 1)


class Repeated(nn.Module):
    """One in-place activation, as many times as it is told; it notes the memory of what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.calls = nn.ReLU(inplace=True), 3

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.calls):
            x = self.relu(x - 0.5)
        return x


def copies_in(capture: Capture, network: nn.Module) -> int:
    """How many copies a pass makes; the value is as it should be."""
    with CopiesCounted() as counted, capture() as captured:
        network(images())
    expected = images()
    for _ in range(network.calls):
        value = expected - 0.5
        expected = value.relu()
    assert torch.equal(captured.values[0], value)
    return counted.copies


class CopiesCounted(TorchDispatchMode):
    copies = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.copies += function is torch.ops.aten.clone.default
        return function(*args, **(kwargs or {}))


def test_only_the_last_call_is_copied_once_their_number_is_known() -> None:
    network = Repeated().eval()
    capture = Capture(network, [Tap("relu", "input")])
    assert copies_in(capture, network) == 4  # the input too
    assert [copies_in(capture, network) for _ in range(3)] == [1, 1, 1]


def test_every_call_is_copied_where_their_number_varies_or_may() -> None:
    network = Repeated().eval()
    capture = Capture(network, [Tap("relu", "input")])
    copies_in(capture, network)
    for network.calls in (5, 2, 4):
        assert copies_in(capture, network) == (3 if network.calls == 5 else network.calls)
    network = Repeated().train()
    capture = Capture(network, [Tap("relu", "input")])
    copies_in(capture, network)
    for network.calls in (3, 2, 4):
        assert copies_in(capture, network) == network.calls


def test_fewer_calls_than_in_all_passes_before_are_an_error_once() -> None:
    network = Repeated().eval()
    capture = Capture(network, [Tap("relu", "input")])
    for _ in range(2):
        copies_in(capture, network)
    network.calls = 2
    with pytest.raises(ValueError, match="calls or in-place operations come and go"):
        copies_in(capture, network)
    copies_in(capture, network)


def test_first_tensor_of_nested_values_counts() -> None:
    class Nested(nn.Module):
        def forward(self, batch: Any, extra: Any = None) -> Any:
            return {"a": ("text", batch[1] * 2), "b": batch[1]}

    network = nn.Sequential(Nested())
    with Capture(network, [Tap("0"), Tap("0", "input"), Tap("")])() as captured:
        network(["text", images()])
    assert torch.equal(captured.values[0], images() * 2)
    assert torch.equal(captured.values[1], images())
    assert captured.values[2] is not None


def test_idle_outside_of_the_block_and_after_removal() -> None:
    network = plain().eval()
    expected, keys, modules = network(images()), list(network.state_dict()), list(network.named_modules())
    capture = Capture(network, TAPS)
    assert torch.equal(network(images()), expected)
    assert capture.current() is None
    with capture() as captured:
        assert torch.equal(network(images()), expected)
    first = captured.values[0].clone()
    network(images(1))
    assert torch.equal(captured.values[0], first)
    assert list(network.state_dict()) == keys
    assert list(network.named_modules()) == modules
    capture.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with pytest.raises(ValueError, match="did not reach relu0:input, relu1:input, relu2:input"), capture():
        network(images())


def test_a_copy_without_captures() -> None:
    network, calls = plain(), []
    network.relu1.register_forward_pre_hook(lambda module, args: calls.append(1))
    capture = Capture(network, TAPS)
    copied = copy_of_model(network)
    hooks = [
        hook for module in copied.modules() for hook in (module._forward_hooks | module._forward_pre_hooks).values()
    ]
    assert len(hooks) == 1
    assert torch.equal(copied(images()), network(images()))
    assert calls == [1, 1]
    with capture() as captured:
        network(images())
    assert len(captured.values) == 3


def test_hooks_of_the_user_stay() -> None:
    network, calls = plain(), []
    handle = network.relu1.register_forward_pre_hook(lambda module, args: calls.append(1))
    Capture(network, TAPS).remove()
    network(images())
    assert calls == [1]
    handle.remove()


def test_a_tap_that_is_not_reached() -> None:
    network = plain()
    with pytest.raises(ValueError, match="did not reach relu2:input: call the whole model"), Capture(network, TAPS)():
        network.relu0(network.relu1(images()))


def test_an_error_in_the_block_ends_the_capture() -> None:
    network = plain()
    capture = Capture(network, TAPS)
    with pytest.raises(RuntimeError), capture():
        network(torch.zeros(1, 7, 8, 8))
    assert capture.current() is None
    with capture() as captured:
        network(images())
    assert len(captured.values) == 3


def test_nested_captures_of_one_network_and_of_two() -> None:
    network, other = plain(), Plain(2)
    capture, another = Capture(network, TAPS), Capture(other, TAPS)
    for _ in range(2):
        with capture() as outer:
            network(images(0))
            with another() as stranger, capture() as inner:
                network(images(1))
                other(images(2))
            assert capture.current() is outer
        for captured, seed in ((outer, 0), (inner, 1), (stranger, 2)):
            assert captured.arguments is not None
            assert torch.equal(captured.arguments[0][0], images(seed))
        assert not torch.equal(outer.values[0], inner.values[0])
        assert stranger.values[0].shape[1] == 2


def test_two_captures_of_one_network_are_apart() -> None:
    network = plain()
    first, second = Capture(network, TAPS), Capture(network, [Tap("fc")])
    with first() as captured, second() as also:
        network(images())
    assert (len(captured.values), len(also.values)) == (3, 1)
    second.remove()
    with first() as captured:
        network(images())
    assert len(captured.values) == 3


def test_concurrent_passes_get_their_own_values() -> None:
    network = plain().eval()
    capture = Capture(network, TAPS)
    barrier = threading.Barrier(8, timeout=30)

    def run(seed: int) -> list[Tensor]:
        results = []
        for _ in range(5):
            barrier.wait()
            with capture() as captured:
                network(images(seed))
            results = [captured.values[number] for number in range(3)]
        return results

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(run, range(8)))
    for seed, values in enumerate(found):
        for value, expected in zip(values, run_alone(network, capture, seed), strict=True):
            torch.testing.assert_close(value, expected)


def run_alone(network: nn.Module, capture: Capture, seed: int) -> list[Tensor]:
    with capture() as captured:
        network(images(seed))
    return [captured.values[number] for number in range(3)]


def test_a_thread_without_a_block_writes_nothing() -> None:
    network = plain().eval()
    capture = Capture(network, TAPS)
    with capture() as captured:
        network(images())
        first = captured.values[0]
        thread = threading.Thread(target=network, args=(images(1),))
        thread.start()
        thread.join()
        assert captured.values[0] is first


@pytest.mark.parametrize("keep", [False, True])
def test_activation_checkpoints_give_the_same_gradients(keep: bool) -> None:
    """The pass is repeated during backward, outside of the block."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    def gradients(network: nn.Module, net: Plain) -> list[Tensor]:
        capture = Capture(
            network, [Tap(f"net.{tap.module}" if network is not net else tap.module, "input") for tap in TAPS]
        )
        for _ in range(2 if keep else 1):
            network.zero_grad()
            with capture() as captured:
                output = network(images().requires_grad_())
            (output.square().sum() + sum(value.sigmoid().sum() for value in captured.values.values())).backward()
        return [parameter.grad for parameter in net.parameters()]

    checkpointed, direct = Checkpointed(), plain()
    for first, second in zip(gradients(checkpointed, checkpointed.net), gradients(direct, direct), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_are_independent(copied: Callable[[Any], Any]) -> None:
    network = plain()
    capture = Capture(network, TAPS)
    twin, twin_capture = copied((network, capture))
    alone = copied(network)
    with capture() as captured:
        twin(images())
        network(images(1))
        alone(images())
    assert captured.arguments is not None
    assert torch.equal(captured.arguments[0][0], images(1))
    with twin_capture() as captured:
        network(images())
        twin(images(1))
    assert torch.equal(captured.arguments[0][0], images(1))
    twin_capture.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in twin.modules())
    with capture() as captured:
        network(images())
    assert len(captured.values) == 3


def test_values_of_inference_mode() -> None:
    network = plain()
    capture = Capture(network, TAPS)
    for _ in range(2):
        with torch.inference_mode(), capture() as captured:
            network(images())
        assert (captured.values[1] < 0).any()


@pytest.mark.parametrize("wrap", ["module", "compile"])
def test_compiled_networks(wrap: str) -> None:
    expected, network = plain().eval(), plain().eval()
    reference = run_alone(expected, Capture(expected, TAPS), 0)
    if wrap == "module":
        network.compile(backend="aot_eager")
    else:
        network = torch.compile(network, backend="aot_eager")
    capture = Capture(network, TAPS)
    network(images(1))
    for seed in (1, 0):
        with capture() as captured:
            network(images(seed))
    for number, value in enumerate(reference):
        torch.testing.assert_close(captured.values[number], value)


def test_unknown_module() -> None:
    with pytest.raises(ValueError, match="no module 'relu9'; did you mean 'relu"):
        Capture(plain(), [Tap("relu9")])


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("path", ["", "1"])
def test_scripted_modules_are_refused(path: str) -> None:
    network: nn.Module = nn.Sequential(nn.ReLU(), torch.jit.script(nn.ReLU()))
    if not path:
        network = torch.jit.script(network)
    with pytest.raises(ValueError, match=f"module '{path}' is a scripted one"):
        Capture(network, [Tap(path)])


def test_gradients_add_up_in_one_order_in_the_first_pass_and_later() -> None:
    """A tapped value with several uses, of sizes at which the order of the sum shows."""
    torch.manual_seed(0)
    network = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Tanh()) for _ in range(3)))
    uses = Function(
        lambda self, x: (y := self.first(x)) * 1e-3 + self.second(y) * 1e3 + y.sin(),
        first=network[0],
        second=network[1],
    )
    capture = Capture(uses, [Tap("first")])
    gradients = []
    for _ in range(3):
        uses.zero_grad()
        with capture() as captured:
            output = uses(images())
        (output.sum() + (captured.values[0] * 7.7).square().sum()).backward()
        gradients.append([parameter.grad.clone() for parameter in uses.parameters()])
    for later in gradients[1:]:
        assert all(map(torch.equal, gradients[0], later))


def test_a_compiled_network_that_has_run_is_reached() -> None:
    for wrap in ("module", "method"):
        torch.compiler.reset()
        network = plain()
        if wrap == "method":
            network.compile(backend="eager")
        model = torch.compile(network, backend="eager") if wrap == "module" else network
        with torch.no_grad():
            model.eval()(images())
            with Capture(model, TAPS)() as captured:
                model(images())
        assert sorted(captured.values) == list(range(len(TAPS)))


def test_other_networks_with_a_tapped_module_do_not_count() -> None:
    shared = nn.ReLU()
    networks = [nn.Sequential(nn.Linear(3, 4), shared), nn.Sequential(nn.Linear(3, 4), shared)]
    capture, x = Capture(networks[0], [Tap("1", "input")]), torch.randn(2, 3)
    with capture() as captured:
        networks[1](x)
        networks[0](x)
        networks[1](x)
    assert captured.values[0].equal(networks[0][0](x))
    with capture() as captured:
        networks[0](x)
        with Capture(networks[1], [Tap("1", "input")])(alone=True) as other:
            networks[1](x)
        networks[0](2 * x)
    assert captured.values[0].equal(networks[0][0](2 * x))
    assert other.values[0].equal(networks[1][0](x))


def test_values_in_a_block_that_goes_on() -> None:
    network = Residual(inplace=False)
    capture = Capture(network, [Tap.parse("third + third:input"), Tap("out")])
    with capture() as captured:
        network(images())
        capture.finish(captured)
        assert captured.values[0].equal(captured.values[1])
        network(images(1))
        capture.finish(captured)
        assert captured.values[0].equal(captured.values[1])
    assert captured.values[0].equal(captured.values[1])


def test_a_pass_without_a_tensor_at_a_tap() -> None:
    network = Function(lambda self, x: self.inner(x), inner=Function(lambda self, x: "text"))
    with (
        pytest.raises(ValueError, match=r"did not reach inner:output: .*modules that give tensors"),
        Capture(network, [Tap("inner")])(),
    ):
        network(images())


def test_a_shared_module_is_copied_after_the_other_network_is_gone():
    """One activation for all networks of a process keeps the hooks of a distiller whose networks are gone."""
    act = nn.ReLU()
    network = nn.Sequential(nn.Linear(2, 2), act)
    Capture(network, [Tap("1", "input")])
    del network
    gc.collect()
    other = nn.Sequential(nn.Linear(2, 2), act)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        assert torch.equal(copied(torch.ones(1, 2)), other(torch.ones(1, 2)))
