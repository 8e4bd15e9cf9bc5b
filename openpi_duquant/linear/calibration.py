"""What a model feeds its layers: who shares an input, in which order they run, and the moments of what they read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch import nn
from torch.utils.hooks import RemovableHandle

from openpi_duquant.config import DuQuantError
from openpi_duquant.linear.rounding import InputMoment

Calibration = Iterable[Any] | Callable[[nn.Module], object]
"""Inputs of a model's forward, one call each (a tuple: positional, a mapping: keywords, anything else: the only one); a
tensor or a mapping alone is one call; or what runs the model it is given on all of them."""


def runner(calibration: Calibration) -> Callable[[nn.Module], object]:
    """What runs a model on all calibration inputs; inputs are kept, for they are needed once a group.

    Raises:
        DuQuantError: If there are none.
    """
    if callable(calibration):
        return calibration
    inputs = [calibration] if isinstance(calibration, Tensor | Mapping) else list(calibration)
    if not inputs:
        raise DuQuantError("calibration: holds no inputs")

    def run(model: nn.Module) -> None:
        for arguments in inputs:
            if isinstance(arguments, Mapping):
                model(**arguments)
            else:
                model(*(arguments if isinstance(arguments, tuple) else (arguments,)))

    return run


def executed_groups(
    model: nn.Module, linears: Mapping[str, nn.Module], groups: Mapping[str, str], run: Callable[[nn.Module], object]
) -> list[list[str]]:
    """Layers that read one and the same input, in the order in which they first run.

    Args:
        model: The model.
        linears: Layers by name.
        groups: Those that may share an input, by the label they have in common; those that turn out not to are parted.
        run: Runs the model.

    Returns:
        Names of the layers of every group; layers that never run are left out.
    """
    found: list[list[str]] = []
    group_of: dict[str, list[str]] = {}
    last: tuple[str, Tensor] | None = None

    def watch(name: str, x: Tensor) -> None:
        nonlocal last
        if name not in group_of:
            if last and groups[last[0]] == groups[name] and _same(x, last[1]):
                group_of[name] = group_of[last[0]]
            else:
                group_of[name] = []
                found.append(group_of[name])
            group_of[name].append(name)
        last = name, x

    with watched({linears[name]: functools.partial(watch, name) for name in groups}):
        _run(model, run)
    return found


def _same(x: Tensor, other: Tensor) -> bool:
    return x.data_ptr() == other.data_ptr() and (x.shape, x.dtype) == (other.shape, other.dtype)


def input_moment(
    model: nn.Module,
    name: str,
    linear: nn.Linear,
    run: Callable[[nn.Module], object],
    moment: InputMoment | None = None,
) -> InputMoment:
    """Moment of all inputs of one layer, in one run of the model; added to `moment`, if one is given.

    Raises:
        DuQuantError: If the layer never ran, or on inputs that are not finite; names the layer.
    """
    moment = moment or InputMoment(linear.in_features, linear.weight.device)
    with watched({linear: moment.add}):
        _run(model, run)
    if not moment.rows:
        raise DuQuantError(f"{name}: ran once, but not when calibration ran the model again; make its runs alike")
    if not moment.is_finite:
        raise DuQuantError(f"{name}: the calibration inputs hold NaN or Inf, or their squares overflow fp32")
    return moment


@contextlib.contextmanager
def watched(hooks: Mapping[nn.Module, Callable[[Tensor], None]]) -> Iterator[None]:
    """Calls every module's hook with the first argument of each of the module's calls, before it."""

    def attach(module: nn.Module, hook: Callable[[Tensor], None]) -> RemovableHandle:
        def before(_: nn.Module, positional: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
            hook(positional[0] if positional else named["input"])

        return module.register_forward_pre_hook(before, with_kwargs=True)

    handles = [attach(module, hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Runs the model as for inference, whatever mode it is in."""
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad():
            run(model.eval())
    finally:
        for module in training:
            module.training = True
