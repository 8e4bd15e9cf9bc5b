"""Decoder layers on the `triton` backend; without a GPU its kernels run in Triton's interpreter."""

from collections.abc import Callable, Iterator
import contextlib
import pathlib

import interpreted
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openpi_duquant.accuracy import relative_error
from openpi_duquant.engine import Policy
from openpi_duquant.engine import gemma
from openpi_duquant.engine import load_policy

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
PREFIX, HORIZON = 131 if GPU else 21, 3  # tokens; so many keys are shared out, in the interpreter any number

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's, of gates far below zero
]


@pytest.fixture(autouse=True)
def somewhere_to_run() -> Iterator[None]:
    with contextlib.nullcontext() if GPU else interpreted.triton_backend():
        yield


def run(policy: Policy, step: Callable[[], object] = lambda: None) -> list[Tensor]:
    """The language model's keys and values, and what the expert makes of them in a denoising step."""
    random = torch.Generator().manual_seed(0)
    sizes = policy.architecture.language, policy.architecture.expert
    prefix, x = (
        torch.randn(2, tokens, size.width, generator=random).to(DEVICE)
        for tokens, size in zip((PREFIX, HORIZON), sizes, strict=True)
    )
    modulations = torch.randn(2 * sizes[1].depth + 1, 3 * sizes[1].width, generator=random).to(DEVICE) / 4
    visible = torch.ones(2, PREFIX, dtype=torch.bool, device=DEVICE)
    visible[1, -4:] = False
    with torch.no_grad():
        of_prefix = gemma.rotary(visible.cumsum(1) - 1, sizes[0].head_dim, x.dtype)
        cached = policy.language_model(prefix, of_prefix, visible)
        step()
        positions = visible.sum(1, keepdim=True) + torch.arange(HORIZON, device=DEVICE)
        rotation = gemma.rotary(positions, sizes[1].head_dim, x.dtype)
        y = policy.expert(x, rotation, visible, cached, modulations, state_first=False)
    return [*cached, y]


class Calls(TorchDispatchMode):
    """Counts the project's operators, and names those that apply GeGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.geglu: set[str] = set()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: object, args: tuple[object, ...] = (), kwargs: object = None
    ) -> object:
        del types
        self.count += func.namespace == "openpi_duquant"
        arguments = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        if arguments.get("geglu"):
            self.geglu.add(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("preset", "operators", "geglu"),
    [
        ("default", 8, {"triton_matmul"}),
        ("simple", 8, {"triton_matmul", "prologue"}),  # the language model is not quantized
        ("optimized", 9, {"fused_transform", "prologue"}),
    ],
)
def test_layers_are_their_definition_in_few_operators(
    converted: Callable[[str], pathlib.Path], preset: str, operators: int, geglu: set[str]
) -> None:
    policies = {
        name: load_policy(converted(preset), backend=name, dtype=torch.float32, device=DEVICE)
        for name in ("triton", "reference")
    }
    calls = Calls()
    before = []
    with calls:
        actual = run(policies["triton"], step=lambda: before.append(calls.count))
    assert calls.count - before[0] == operators * policies["triton"].architecture.expert.depth
    assert calls.geglu == geglu
    expected = run(policies["reference"])
    for part, wanted in zip(actual, expected, strict=True):
        assert relative_error(part.cpu(), wanted.cpu()) < 1e-2
