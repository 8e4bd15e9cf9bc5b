"""All layers of the expert in one launch, against their definition; without a GPU in Triton's interpreter."""

from collections.abc import Callable, Iterator
import contextlib
import copy
import dataclasses
import functools
import pathlib
import pickle

from denoising_step import step
import interpreted
import pytest
import torch
from torch import Tensor

from openpi_duquant import PRESETS
from openpi_duquant import convert
from openpi_duquant import profiling
from openpi_duquant import synthetic
from openpi_duquant.accuracy import relative_error
from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import TransformerSize
from openpi_duquant.engine import Policy
from openpi_duquant.engine import load_policy
from openpi_duquant.kernels import persistent

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # the interpreter's, of gates far below zero
]


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """A list of what the launch was given; without a GPU somewhere to run."""
    from openpi_duquant.kernels import persistent_triton  # noqa: PLC0415

    given: list[Tensor] = []
    launch = persistent_triton.launch
    if not GPU:
        launch = functools.partial(launch, interpreted=True)
    monkeypatch.setattr(persistent_triton, "launch", lambda y, *rest, **how: given.append(y) or launch(y, *rest, **how))
    with contextlib.nullcontext() if GPU else interpreted.triton_backend():
        yield given


@pytest.fixture(scope="module")
def converted(tiny: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pathlib.Path]:
    """A tiny policy of powers of two, converted with a preset."""
    folder = tmp_path_factory.mktemp("persistent")
    language, expert = TransformerSize(128, 2, 320, 4, 32), TransformerSize(64, 2, 256, 4, 32)

    def make(preset: str = "default", *, pi05: bool = True) -> pathlib.Path:
        here = folder / f"{preset}-{pi05}"
        architecture = dataclasses.replace(tiny, language=language, expert=expert, pi05=pi05)
        if not here.exists():
            synthetic.make_checkpoint(here / "original", architecture, seed=5)
            convert(here / "original", here / "converted", PRESETS[preset])
        return here / "converted"

    return make


def load(checkpoint: pathlib.Path, backend: str) -> Policy:
    return load_policy(checkpoint, backend=backend, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize(
    ("shape", "prefix", "state_first", "masked"),
    [((1, 1), 21, False, False), ((2, 3), 21, False, True), ((1, 5), 40, True, True), ((3, 7), 16, False, True)],
)
@pytest.mark.parametrize("pi05", [True, False])
def test_a_step_is_its_definition_in_one_launch(
    converted: Callable[..., pathlib.Path],
    launches: list[Tensor],
    shape: tuple[int, int],
    prefix: int,
    *,
    pi05: bool,
    state_first: bool,
    masked: bool,
) -> None:
    how = {"shape": shape, "prefix": prefix, "state_first": state_first, "masked": masked}
    actual = step(load(converted(pi05=pi05), "triton"), **how)
    assert len(launches) == 2  # the first is compared with layers one by one
    expected = step(load(converted(pi05=pi05), "reference"), **how)
    assert len(launches) == 2
    assert relative_error(actual.cpu(), expected.cpu()) < 1e-2


@pytest.mark.parametrize("what", ["rotated input of o", "more tokens than a tile", "a profile"])
def test_what_one_launch_cannot_do_takes_many(
    converted: Callable[..., pathlib.Path], launches: list[Tensor], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = converted("optimized" if what == "rotated input of o" else "default")
    if what == "more tokens than a tile":
        monkeypatch.setattr(persistent, "MOST_TOKENS", 5)
    how = {"shape": (2, 3), "prefix": 21, "state_first": False, "masked": True}
    with profiling.Profile().active() if what == "a profile" else contextlib.nullcontext():
        actual = step(load(checkpoint, "triton"), **how)
    assert not launches
    assert relative_error(actual.cpu(), step(load(checkpoint, "reference"), **how).cpu()) < 1e-2


@pytest.mark.parametrize("fault", ["wrong", "NaN", "raises"])
def test_a_launch_that_does_not_give_what_layers_give_is_left_out(
    converted: Callable[..., pathlib.Path],
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from openpi_duquant.kernels import persistent_triton  # noqa: PLC0415

    calls = []

    def faulty(x: Tensor, *_: object, **how: object) -> Tensor:
        calls.append(how)
        if fault == "raises":
            raise RuntimeError("no room")
        return x * (1.2 if fault == "wrong" else float("nan"))

    monkeypatch.setattr(persistent_triton, "launch", faulty)
    how = {"shape": (1, 2), "prefix": 21, "state_first": False, "masked": False}
    policy, expected = load(converted(), "triton"), step(load(converted(), "reference"), **how)
    for _ in range(2):
        assert relative_error(step(policy, **how).cpu(), expected.cpu()) < 1e-2
    assert len(calls) == 1
    assert {"wrong": "off by", "NaN": "off by nan", "raises": "no room"}[fault] in caplog.text


def test_layers_lie_in_one_tensor_and_copies_in_their_own(
    converted: Callable[..., pathlib.Path], launches: list[Tensor]
) -> None:
    how = {"shape": (1, 2), "prefix": 21, "state_first": False, "masked": False}
    policy = load(converted(), "triton")
    before = policy.state_dict()
    expected = step(policy, **how)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, before[name])
    down = [layer.mlp.down_proj.weight_packed for layer in policy.expert.layers]
    assert down[0].untyped_storage().data_ptr() == down[1].untyped_storage().data_ptr()
    for again in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        own = [layer.mlp.down_proj.weight_packed for layer in again.expert.layers]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in own)
        assert torch.equal(step(again, **how), expected)
    assert len(launches) == 6
