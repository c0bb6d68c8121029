"""The list of operations of a forward pass and its cuts, against a search of the graph.

Axes: N images, C channels, H and W positions, T tokens.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matchdistill.axes import INPUT
from matchdistill.trace import Trace, tensors_in
from networks import Function, Plain, conv_bn

IMAGES = torch.zeros(2, 3, 8, 8)


def trace(function: Any, *example: Any, **modules: nn.Module) -> Trace:
    return Trace(Function(function, **modules), example or (IMAGES,))


def names(traced: Trace) -> list[str]:
    return [operation.name for operation in traced.operations]


LAYERS = (("conv2d", "conv"), ("batch_norm", "bn"), ("relu", "relu"))


def test_operations_of_a_plain_network() -> None:
    traced = Trace(Plain(4), (IMAGES,))
    layers = [(name, f"{module}{stage}") for stage in range(3) for name, module in LAYERS]
    assert [(operation.name, operation.module) for operation in traced.operations] == [
        *layers,
        ("mean", ""),
        ("linear", "fc"),
    ]
    assert [operation.inputs for operation in traced.operations] == [(number - 1,) for number in range(11)]
    assert traced.operations[3].shape == (2, 8, 4, 4)
    assert traced.operations[1].outputs_of == ["bn0"]
    assert traced.operations[1].inputs_of == ["relu0"]
    assert traced.operations[10].outputs_of == ["fc", ""]


def test_what_hooks_of_the_network_do_to_its_input_is_its_own_work() -> None:
    network = Plain(4)
    network.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    traced, plain = Trace(network, (IMAGES,)), Trace(Plain(4), (IMAGES,))
    assert [(operation.name, operation.module) for operation in traced.operations] == [
        ("mul", ""),
        *((operation.name, operation.module) for operation in plain.operations),
    ]


def test_inputs_are_found_in_nested_arguments_without_repeats() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        a, b = x + 1, x + 2
        return torch.cat([a, b, a], dim=1) * torch.ones(())

    traced = trace(forward)
    assert [operation.inputs for operation in traced.operations] == [(INPUT,), (INPUT,), (0, 1), (2,)]


def test_constants_and_weights_make_no_operations() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        scale = torch.arange(3.0).exp()[:, None, None]
        return x * scale + self.layer.weight.sum()

    assert names(trace(forward, layer=nn.Linear(2, 2))) == ["mul", "add"]


def test_in_place_operations_pass_the_value_on() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        a = x * 2
        a += 1
        a.relu_()
        a[:, :1] = 0
        torch.mul(a, 3, out=a)
        F.relu(a, inplace=True)
        return a - 1

    traced = trace(forward)
    assert [name.removeprefix("i") for name in names(traced)] == ["mul", "add", "relu", "setitem", "mul", "relu", "sub"]
    assert [operation.inputs for operation in traced.operations] == [(number - 1,) for number in range(7)]


def test_values_made_together_have_no_shape() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=2)
        return a + b

    traced = trace(forward)
    assert traced.operations[0].shape is None
    assert traced.operations[1].inputs == (0,)


def test_modules_are_noted_at_their_last_call() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        first = self.conv(x)
        second = self.relu(self.relu(first).exp())
        return self.relu(first) + second

    traced = trace(forward, conv=conv_bn(3, 4), relu=nn.ReLU())
    by_name = {operation.number: operation.name for operation in traced.operations}
    assert [by_name[o.number] for o in traced.operations if "relu" in o.inputs_of] == ["batch_norm"]
    assert [o.number for o in traced.operations if "relu" in o.outputs_of] == [5]


def test_first_tensor_of_nested_outputs_counts() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        pair = self.two(x)
        return self.three({"kind": "image", "features": pair[0]})["out"][0] + pair[1]["b"]

    traced = trace(
        forward,
        two=Function(lambda self, x: (x.sin(), {"b": x.cos()})),
        three=Function(lambda self, batch: {"out": [batch["features"].exp()]}),
    )
    assert [(o.name, o.outputs_of, o.inputs_of) for o in traced.operations] == [
        ("sin", ["two"], ["three"]),
        ("cos", [], []),
        ("exp", ["three"], []),
        ("add", [""], []),
    ]


@pytest.mark.parametrize(
    ("function", "shape", "channel_dim"),
    [
        (lambda self, x: self.conv(x), (2, 4, 8, 8), 1),
        (lambda self, x: self.conv(x).permute(0, 2, 3, 1), (2, 8, 8, 4), 3),
        (lambda self, x: self.conv(x).movedim(1, -1).flatten(1, 2), (2, 64, 4), 2),
        (lambda self, x: self.conv(x).flatten(2), (2, 4, 64), 1),
        (lambda self, x: self.conv(x).flatten(2).transpose(1, 2), (2, 64, 4), 2),
        (lambda self, x: self.conv(x).flatten(2).mT, (2, 64, 4), 2),
        (lambda self, x: self.conv(x).view(2, 2, 2, 8, 8).transpose(1, 2).reshape(2, 4, 8, 8), (2, 4, 8, 8), 1),
        (lambda self, x: self.linear(x), (2, 3, 8, 4), 3),
        (lambda self, x: self.linear(x).permute(0, 3, 1, 2), (2, 4, 3, 8), 1),
        (lambda self, x: self.linear(x).roll(1, 2).reshape(2, 24, 4), (2, 24, 4), 2),
        (lambda self, x: self.conv(x).mean(3), (2, 4, 8), 1),
        (lambda self, x: torch.cat([self.conv(x), x], dim=1).relu(), (2, 7, 8, 8), 1),
    ],
)
def test_channel_axis_is_followed(function: Any, shape: tuple[int, ...], channel_dim: int | None) -> None:
    value = trace(function, conv=nn.Conv2d(3, 4, 1), linear=nn.Linear(8, 4)).operations[-1]
    assert (value.shape, value.channel_dim) == (shape, channel_dim)


def test_sizes_of_a_value() -> None:
    maps, tokens = (
        trace(function, conv=nn.Conv2d(3, 5, 1)).operations[-1]
        for function in (lambda self, x: self.conv(x[:, :, :, 1:]), lambda self, x: torch.rand(2, 7, 5) * x.mean())
    )
    assert (maps.spatial, maps.positions, maps.channels) == ((8, 7), 56, 5)
    assert (tokens.channel_dim, tokens.spatial, tokens.positions, tokens.channels) == (None, (7,), 7, 5)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def fused(x: Tensor, y: Tensor) -> Tensor:
    z = torch.sin(x)
    z.add_(y)
    return torch.exp(z)


def test_autograd_functions_are_seen_through() -> None:
    traced = trace(lambda self, x: Square.apply(x.sin()).exp())
    assert names(traced) == ["sin", "mul", "exp"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_functions_are_seen_through() -> None:
    scripted = torch.jit.script(fused)
    traced = trace(lambda self, x: scripted(x.cos(), x.tanh()).relu())
    assert names(traced) == ["cos", "tanh", "sin", "add", "exp", "relu"]
    assert [o.inputs for o in traced.operations] == [(INPUT,), (INPUT,), (0,), (2, 1), (3,), (4,)]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_modules_are_seen_through() -> None:
    scripted_module = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    traced = Trace(nn.Sequential(nn.Identity(), scripted_module, nn.Tanh()), (IMAGES,))
    assert names(traced) == ["convolution", "relu", "tanh"]
    assert traced.operations[1].inputs_of == ["2"]


@pytest.mark.parametrize("run_before", [False, True])
def test_compiled_parts_are_traced_eagerly(run_before: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(torch.compile(Plain(4), backend=backend), nn.Tanh())
    model[0].bn1.compile(backend=backend)
    if run_before:
        with torch.no_grad():
            model.eval()(IMAGES)
    before = len(graphs)
    assert names(Trace(model, (IMAGES,))) == [*(name for name, _ in 3 * LAYERS), "mean", "linear", "tanh"]
    assert len(graphs) == before == run_before


def test_code_that_no_mode_sees_is_one_operation_per_module() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return torch.relu(x)

    traced = trace(lambda self, x: self.hidden(x.sin()).exp(), hidden=Function(forward))
    assert names(traced) == ["sin", "Function", "exp"]


def test_leaves_no_trace_in_the_model() -> None:
    model = Plain(4).train()
    model.bn1.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    Trace(model, (torch.randn(2, 3, 8, 8),))
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_removed_when_the_pass_fails() -> None:
    model = Plain(4)
    with pytest.raises(RuntimeError):
        Trace(model, (torch.zeros(2, 7, 8, 8),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.training
    assert torch.ones(1, requires_grad=True).exp().requires_grad


def test_runs_in_evaluation_mode_without_a_graph_and_in_inference_mode_too() -> None:
    seen = []

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        seen.append((self.training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return x.exp().relu_()

    assert names(trace(forward)) == ["exp", "relu"]
    with torch.inference_mode():
        assert names(trace(forward, torch.zeros(2, 3))) == ["exp", "relu"]
    assert seen == [(False, False, False)] * 2


class Pair(NamedTuple):
    x: Any
    y: Any


def test_tensors_in_nested_containers() -> None:
    a, b, c = (torch.zeros(size) for size in range(3))
    assert [len(value) for value in tensors_in([a, {"k": (b, "text", None)}, Pair(c, 3)])] == [0, 1, 2]
    assert tensors_in("text") == []
