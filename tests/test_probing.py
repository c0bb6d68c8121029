"""Looking at a network leaves it, its modes and the random numbers as they were."""

import gc
import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from matchdistill.capture import Capture
from matchdistill.probing import OwnHook, copy_of_model, evaluating, scratch, unchanged
from matchdistill.taps import Tap
from matchdistill.trace import traced


class Adapter(nn.Linear):
    """Merges an update into its weight in evaluation mode, and counts the calls of `train`."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.update, self.merged, self.calls = torch.randn(3, 3) / 7, False, 0

    def train(self, mode: bool = True) -> nn.Module:
        self.calls += 1
        if mode == self.merged:
            self.weight.data += self.update if not mode else -self.update
            self.merged = not mode
        return super().train(mode)


class Stateful(nn.Module):
    """Changes in every way that a module can as it is run."""

    def __init__(self, lock: bool) -> None:
        super().__init__()
        self.convolution, self.norm, self.dropout = nn.LazyConv2d(4, 3), nn.BatchNorm2d(4), nn.Dropout()
        self.scale, self.potential = nn.Parameter(torch.ones(())), 0.0
        self.counts = {"calls": [0], "array": np.zeros(2)}
        self.drawn = random.Random(0)
        if lock:
            self.lock = threading.Lock()

    def get_extra_state(self) -> int:
        return int(self.counts["calls"][0])

    def set_extra_state(self, state: int) -> None:
        self.counts["calls"][0] = state

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.counts["calls"][0] += 1
        self.counts["array"] += 1
        self.drawn.random()
        np.random.rand()
        random.random()
        self.last = images
        self.scale.data *= 2
        self.potential = self.potential / 2 + self.dropout(self.norm(self.convolution(images)))
        return self.potential


def described(model: Stateful) -> list[object]:
    """All that may change, as plain values."""
    state = [
        (name, "lazy" if nn.parameter.is_lazy(value) else value.tolist() if isinstance(value, torch.Tensor) else value)
        for name, value in model.state_dict().items()
    ]
    potential = model.potential
    return [
        state,
        potential.tolist() if isinstance(potential, torch.Tensor) else potential,
        [(type(module).__name__, module.training, len(module._forward_pre_hooks)) for module in model.modules()],
        sorted(vars(model)),
        model.counts["calls"][:],
        model.counts["array"].tolist(),
        model.drawn.getstate(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    ]


@pytest.mark.parametrize("lock", [False, True], ids=["copied", "put back"])
@pytest.mark.parametrize("run_before", [False, True])
def test_a_look_leaves_everything_as_it_was(lock: bool, run_before: bool) -> None:
    model = Stateful(lock)
    model.norm.eval()
    if run_before:
        model(torch.randn(2, 3, 8, 8))  # leaves a value in the graph, which deepcopy alone refuses
    before, tensors = described(model), [id(value) for value in model.state_dict(keep_vars=True).values()]
    with scratch(model) as probe:
        assert (probe is model) == lock
        assert not probe.get_submodule("norm").training
        probe.train()(torch.zeros(2, 3, 8, 8))
        assert described(model) != before or not lock
    assert described(model) == before
    assert [id(value) for value in model.state_dict(keep_vars=True).values()] == tensors
    model(torch.randn(2, 3, 8, 8))  # and works


def test_a_look_runs_compiled_code_as_it_was_written() -> None:
    compiled = 0

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        nonlocal compiled
        compiled += 1
        return graph.forward

    model = torch.compile(nn.Linear(3, 2), backend=backend)
    with scratch(model) as probe:
        assert probe(torch.ones(1, 3)).shape == (1, 2)
    assert compiled == 0
    model(torch.ones(1, 3))
    assert compiled == 1


def test_a_copy_does_without_our_hooks_but_keeps_others() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    Capture(model, [Tap("0")])
    model[0].register_forward_hook(lambda module, args, output: output + 1)
    copied = copy_of_model(model)
    hooks = [
        hook
        for module in copied.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
    assert len(hooks) == 1
    assert not isinstance(hooks[0], OwnHook)
    assert copied(torch.ones(1, 3)).equal(model(torch.ones(1, 3)))


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_copy_does_without_what_other_networks_hooked_on_a_shared_module(side: str) -> None:
    shared = nn.ReLU()
    Capture(nn.Sequential(nn.Linear(3, 3), shared), [Tap("1", side)])  # the network is gone, its hooks stay
    gc.collect()
    model = nn.Sequential(nn.Linear(3, 2), shared)
    copied = copy_of_model(model)
    assert not copied[1]._forward_pre_hooks
    assert not copied[1]._forward_hooks
    assert len(shared._forward_pre_hooks) + len(shared._forward_hooks) == 1
    assert [operation.name for operation in traced(model, (torch.ones(1, 3),), values=False).operations] == [
        "linear",
        "relu",
    ]


def test_what_cannot_be_copied_is_said_in_a_sentence() -> None:
    model = nn.Linear(3, 3)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="Linear cannot be copied"):
        copy_of_model(model)


def test_unchanged_puts_the_model_itself_back() -> None:
    model = Stateful(lock=False)
    model(torch.randn(2, 3, 8, 8))
    before = described(model)
    with unchanged(model):
        model(torch.zeros(2, 3, 8, 8))
        assert described(model) != before
    assert described(model) == before


def test_modes_are_restored_by_the_modules_own_train() -> None:
    model = nn.Sequential(Adapter(), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)))
    model[1].eval()
    model[2][1].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert model[0].merged
        assert not any(module.training for module in model.modules())
    assert not model[0].merged
    assert [module.training for module in model.modules()] == modes
    assert model[0].calls == 2


def test_what_is_in_evaluation_mode_already_is_left_alone() -> None:
    model = nn.Sequential(Adapter(), nn.Sequential(Adapter(), Adapter()), Adapter())
    model[1].eval()
    merged, calls = model[1][0].weight.clone(), model[1][0].calls
    with evaluating(model), evaluating(model[1]):
        assert all(module.merged for module in model.modules() if isinstance(module, Adapter))
    assert model[1][0].weight.equal(merged)
    assert model[1][0].calls == calls + 1  # by the `eval` of the whole, which changes nothing there
    assert [model[0].merged, model[1][0].merged, model[1][1].merged, model[2].merged] == [False, True, True, False]
    assert "train" not in vars(model[1])


def test_a_parts_own_train_that_was_set_by_hand_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    model[0].eval()
    own = model[0].train = lambda mode=True: model[0]  # frozen for good, as some do it
    with evaluating(model):
        pass
    assert model[0].train is own
    assert [module.training for module in model.modules()] == [True, False, True]


def test_the_graphs_of_a_feature_extractor_are_swapped_back() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    model = create_feature_extractor(nn.Sequential(nn.Linear(3, 64), nn.Dropout()), ["1"]).train()
    with evaluating(model):
        assert model(torch.ones(1, 3))["1"].ne(0).all()
    assert model(torch.ones(1, 3))["1"].eq(0).any()


def test_what_copies_do_not_get_is_not_looked_at() -> None:
    class Trained(nn.Linear):
        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "trainer": None}

    model = Trained(3, 3)
    trainer = [0]
    model.trainer = [trainer, threading.Lock()]  # type: ignore[assignment]
    with scratch(model) as probe:
        assert probe.trainer is None
    with unchanged(model):
        trainer[0] += 1
        model.trainer = None
    assert trainer == [1]
    assert model.trainer[0] is trainer
