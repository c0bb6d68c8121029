"""Running somebody's network to look at it, which leaves it as it was: its modes, its state, and the random numbers."""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class OwnHook:
    """Base of this package's hooks on networks, which copies of a network do without."""


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode; afterwards every module is in the mode it was in.

    Modes are set by the modules' own ``train`` and ``eval``, which may do more: merge an adapter, clear a cache.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        if any(module.training for module in model.modules()):
            model.eval()
    try:
        yield
    finally:
        for model in models:
            _set_modes(model, modes)
        for module, training in modes.items():
            if module.training != training:  # its own `train` does not lead there
                module.training = training


def _set_modes(module: nn.Module, modes: dict[nn.Module, bool]) -> None:
    """Put a module and all in it into their modes, by one call where these are all alike."""
    within = [each for each in module.modules() if each in modes]
    if all(each.training == modes[each] for each in within) or module not in modes:
        return
    if len({modes[each] for each in within}) == 1:
        module.train() if modes[module] else module.eval()
        return
    children = list(module.children())
    if module.training != modes[module]:
        with _held(children):
            module.train() if modes[module] else module.eval()
    for child in children:
        _set_modes(child, modes)


@contextlib.contextmanager
def _held(modules: Sequence[nn.Module]) -> Iterator[None]:
    """The modules deaf to `train` and `eval`, so that one that holds them can be put into another mode alone."""
    before = [vars(module).get("train") for module in modules]
    for module in modules:
        vars(module)["train"] = lambda mode=True, module=module: module
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del vars(module)["train"]
            else:
                vars(module)["train"] = own


@contextlib.contextmanager
def scratch(model: nn.Module) -> Iterator[nn.Module]:
    """A network to run for a look at it, in the modes that the model is in; the model comes out bit for bit as it went in.

    It is a copy, without the hooks of this package. Where there is none to be had, it is the model itself, whose state is
    put back afterwards. Compiled code runs as it was written. What is drawn at random in the block, is drawn again after it.
    """
    try:
        probe = copy_of_model(model)
    except ValueError:
        probe = model
    kept = unchanged(model) if probe is model else random_state()
    with torch.compiler.set_stance("force_eager"), kept:
        yield probe


@contextlib.contextmanager
def unchanged(*models: nn.Module) -> Iterator[None]:
    """All that the models hold is put back after the block: weights, buffers and attributes, down to what these hold.

    So is the state of the random number generators. In the block the models themselves may be run.
    """
    restores = [restore for model in models for held in _held_by(model) if (restore := _restoring(held)) is not None]
    with random_state():
        try:
            yield
        finally:
            for restore in restores:
                restore()


def copy_of_model(model: nn.Module) -> nn.Module:
    """A copy of a model without the hooks of this package.

    Tensors that it holds from an earlier pass (weight norm, a state) are copied without their graph.

    Raises:
        ValueError: something that it holds cannot be copied.
    """
    computed = (held for held in _held_by(model) if isinstance(held, Tensor) and not held.is_leaf)
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in computed}
    # A module that several networks share has hooks for all of them: what these hold is no part of the model.
    memo |= {id(hook): hook for module in model.modules() for hooks in _hooks(module) for hook in _own(hooks).values()}
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:  # what a model holds may fail in every way
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}): it holds something that "
            "copy.deepcopy does not take, such as a lock or an open file"
        ) from error
    remove_own_hooks(copied)
    return copied


def remove_own_hooks(model: nn.Module) -> None:
    """Take all hooks of this package off a model, and what torch notes of them: another process counts hooks anew."""
    for module in model.modules():
        notes = (
            module._forward_hooks_with_kwargs,
            module._forward_hooks_always_called,
            module._forward_pre_hooks_with_kwargs,
        )
        for hooks in _hooks(module):
            for number in _own(hooks):
                for held in (hooks, *notes):
                    held.pop(number, None)


def _hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    return module._forward_hooks, module._forward_pre_hooks


def _own(hooks: dict[int, Any]) -> dict[int, OwnHook]:
    return {number: hook for number, hook in hooks.items() if isinstance(hook, OwnHook)}


@contextlib.contextmanager
def random_state() -> Iterator[None]:
    """What torch, NumPy and Python draw in the block, they draw again after it."""
    numpy = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy is not None else None
    tensors = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_rng_state(tensors[0])
        if tensors[1]:
            torch.cuda.set_rng_state_all(tensors[1])
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(arrays)


_FOREIGN = (OwnHook, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def _held_by(model: nn.Module) -> list[Any]:
    """The model and all that it holds, directly or not: modules, tensors, containers and other objects, each once."""
    found: dict[int, Any] = {}
    queue: list[Any] = [model]
    while queue:
        held = queue.pop()
        if id(held) in found or held is None or isinstance(held, (str, bytes, int, float, complex, *_FOREIGN)):
            continue
        found[id(held)] = held
        if isinstance(held, dict):
            queue += held.values()
        elif isinstance(held, (list, tuple, set, frozenset, deque)):
            queue += held
        elif isinstance(held, nn.Module):
            found[id(vars(held))] = vars(held)
            queue += _state_of(held).values()
        elif not isinstance(held, Tensor) and hasattr(held, "__dict__"):
            queue.append(vars(held))
    return list(found.values())


def _state_of(module: nn.Module) -> dict[str, Any]:
    """What a module holds, without what its copies do not get, such as the trainer of a LightningModule."""
    try:
        state = module.__getstate__() if hasattr(module, "__getstate__") else None  # type: ignore[no-untyped-call]
    except Exception:  # scripted modules have none
        state = None
    return state if isinstance(state, dict) else vars(module)


def _restoring(held: Any) -> Callable[[], Any] | None:
    """What puts an object back into its present state; of what it holds only which objects these are."""
    if isinstance(held, Tensor):
        return _restoring_tensor(held)
    if isinstance(held, (dict, list, deque, set)):
        return _restoring_container(held)
    if isinstance(held, nn.Module):
        return _restoring_module(held)
    if isinstance(held, torch.Generator):
        state = held.get_state()
        return lambda: held.set_state(state)
    if isinstance(held, random.Random):
        drawn = held.getstate()
        return lambda: held.setstate(drawn)
    if (numpy := sys.modules.get("numpy")) is not None:
        if isinstance(held, numpy.ndarray):
            array = held.copy()
            return lambda: numpy.copyto(held, array)
        if isinstance(held, numpy.random.Generator):
            bits = copy.deepcopy(held.bit_generator.state)
            return lambda: setattr(held.bit_generator, "state", bits)
        if isinstance(held, numpy.random.RandomState):
            legacy = held.get_state()
            return lambda: held.set_state(legacy)
    return None


def _restoring_container(held: dict[Any, Any] | list[Any] | deque[Any] | set[Any]) -> Callable[[], None]:
    content: Any = dict(held) if isinstance(held, dict) else list(held)

    def restore() -> None:
        held.clear()
        (held.extend if isinstance(held, (list, deque)) else held.update)(content)

    return restore


def _restoring_module(held: nn.Module) -> Callable[[], None]:
    """Puts back its class, which a lazy module changes, and its extra state; its dictionaries are held as others are."""
    own, extra = type(held), None
    if own.get_extra_state is not nn.Module.get_extra_state and own.set_extra_state is not nn.Module.set_extra_state:
        extra = copy.deepcopy(held.get_extra_state())

    def restore() -> None:
        held.__class__ = own
        if extra is not None:
            held.set_extra_state(extra)

    return restore


def _restoring_tensor(held: Tensor) -> Callable[[], Any]:
    if nn.parameter.is_lazy(held):
        own: Any = type(held)

        def forget() -> None:
            if type(held) is not own:  # it has got its size
                held.data, held.__class__ = torch.empty(0, device=held.device, dtype=held.dtype), own

        return forget
    value, trains = held.detach().clone(), held.requires_grad

    def restore() -> None:
        with torch.inference_mode(held.is_inference()), torch.no_grad():
            if held.layout != torch.strided or held.shape != value.shape or held.is_quantized:
                held.data = value
            elif not torch.equal(held.detach(), value):
                held.data.copy_(value)
        if held.requires_grad != trains and held.is_leaf:
            held.requires_grad_(trains)

    return restore
