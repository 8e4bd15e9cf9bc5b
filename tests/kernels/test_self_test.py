"""A kernel that computes wrongly, or not at all, is found out; without a GPU in Triton's interpreter."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses

import interpreted
import pytest
import torch
from torch import Tensor

from openpi_duquant import kernels
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import Backend
from openpi_duquant.kernels import Problem
from openpi_duquant.kernels import reference
from openpi_duquant.kernels import self_test
from openpi_duquant.kernels import triton_matmul
from openpi_duquant.kernels.reference import NO_EPILOGUE
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.profiling import Profile
from openpi_duquant.transforms import Transform

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
KINDS = [(4, "none", 0), (4, "hadamard", 32), (4, "matrix", 16), (8, "none", 0)]
INPUTS = [("none", 0), ("hadamard", 64), ("matrix", 16)]
Quantized = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(autouse=True)
def nothing_tested_yet() -> Iterator[None]:
    self_test._matmul_fault.cache_clear()
    self_test._transform_fault.cache_clear()
    with contextlib.nullcontext() if GPU else interpreted.operators():
        yield
    self_test._matmul_fault.cache_clear()
    self_test._transform_fault.cache_clear()


def problem(bits: int = 4, rotation: str = "none", block: int = 0) -> Problem:
    return Problem(2048, 1024, bits, 8, 1, rotation, block, torch.float32)


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's, of gates far below zero
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_matmul_passes(kind: tuple[int, str, int]) -> None:
    assert self_test.matmul_fault("triton", triton_matmul.BACKEND, problem(*kind), DEVICE) is None


def changed(change: Callable[[Tensor], Tensor]) -> Backend:
    """The reference with another result."""
    return Backend(lambda *given: change(reference.matmul(*given)))


def one_off(y: Tensor) -> Tensor:
    y[-1, -1] += 1
    return y


def test_one_wrong_sum_is_found_and_counted() -> None:
    fault = self_test.matmul_fault("mine", changed(one_off), problem(), DEVICE)
    assert fault.startswith("mine's matmul computed 1 of 576 sums wrongly for 3 tokens on ")
    assert fault.endswith("please report this line and what openpi-duquant doctor shows as an issue of openpi-duquant")


def ignoring(place: int, value: object) -> Backend:
    """The reference, which takes one operand for another value."""

    def matmul(*given: object) -> Tensor:
        return reference.matmul(*given[:place], value, *given[place + 1 :])

    return Backend(matmul)


@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        (ignoring(1, torch.full((1, 1), 5e-4, device=DEVICE)), (4, "none", 0)),
        (ignoring(3, torch.ones(96, 1, device=DEVICE)), (4, "hadamard", 32)),
        (ignoring(5, None), (4, "hadamard", 32)),
        (ignoring(5, 16), (4, "matrix", 16)),
    ],
    ids=["act_scale", "weight_scale", "hadamard", "matrices"],
)
def test_scales_and_output_restore_are_tested(backend: Backend, kind: tuple[int, str, int]) -> None:
    with_unit_scales = dataclasses.replace(backend, matmul=_right_where_scales_are_one(backend))
    assert "errs by" in self_test.matmul_fault("mine", with_unit_scales, problem(*kind), DEVICE)


@pytest.mark.parametrize("field", Epilogue._fields)
@pytest.mark.parametrize("kind", KINDS)
def test_epilogues_are_tested(kind: tuple[int, str, int], field: str) -> None:
    def matmul(*given: object, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
        y = reference.matmul(*given)
        if field == "geglu" and epilogue.geglu:
            return epilogue.apply(y.roll(y.shape[1] // 2, dims=1))  # gelu(up) * gate
        return epilogue._replace(**{field: None}).apply(y)

    what = {"rotary": "rotary embedding", "geglu": "GeGLU"}.get(field, "residual")
    fault = self_test.matmul_fault("mine", Backend(matmul, fuses_epilogue=True), problem(*kind), DEVICE)
    assert f"with {what} errs by" in fault


def _right_where_scales_are_one(backend: Backend) -> Callable[..., Tensor]:
    def matmul(*given: object) -> Tensor:
        return (reference.matmul if (given[1] == 1).all() else backend.matmul)(*given)

    return matmul


def test_a_kernel_that_does_not_compile_is_quoted() -> None:
    def refuse(*_: object) -> Tensor:
        raise RuntimeError("out of resource: shared memory\nRequired: 300000")

    fault = self_test.matmul_fault("mine", Backend(refuse), problem(), DEVICE)
    assert fault.startswith("mine's matmul fails (RuntimeError: out of resource: shared memory: Required: 300000) on ")


def test_a_kind_is_tested_once() -> None:
    calls = []
    backend = Backend(lambda *given: calls.append(1) or reference.matmul(*given))
    with Profile().active() as profile:
        for k in (1024, 2048):
            given = dataclasses.replace(problem(), in_features=k)
            assert self_test.matmul_fault("mine", backend, given, DEVICE) is None
            assert self_test.transform_fault(given, DEVICE) is None
    once = len(calls)
    assert not profile.sums
    self_test.matmul_fault("mine", backend, problem(8), DEVICE)
    assert len(calls) == 2 * once


@pytest.mark.parametrize("wrong", [self_test._TOKENS[1], 3])
def test_a_faulty_triton_stops_where_it_is_named_and_auto_goes_on(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def matmul(a: Tensor, *rest: object) -> Tensor:
        y = reference.matmul(a, *rest)
        return y + 1 if len(a) == wrong else y

    faulty = Backend(matmul, load=triton_matmul.load, fused=True)
    monkeypatch.setattr(triton_matmul, "BACKEND", faulty)
    monkeypatch.setitem(kernels.BACKENDS, "triton", faulty)
    monkeypatch.setattr(kernels, "AUTO", ("triton", "reference"))  # bitblas runs where its kernels are cached
    with pytest.raises(DuQuantError, match=rf"triton's matmul computed \d+ of \d+ sums wrongly for {wrong} tokens"):
        kernels.resolve("triton", problem(), DEVICE)
    assert kernels.resolve("auto", problem(), DEVICE) == "reference"


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's, of gates far below zero
@pytest.mark.parametrize(("kind", "block"), INPUTS)
def test_a_right_transform_passes(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "fused_transform", interpreted.fused_transform)
    given = dataclasses.replace(problem(), input_rotation=kind, input_block=block)
    assert self_test.transform_fault(given, DEVICE) is None


def wrong_transforms() -> dict[str, Callable[[Tensor, Transform, Prologue], Quantized]]:
    """The definition, each with one fault, by what the self-test says of it."""

    def define(x: Tensor, given: Transform, prologue: Prologue) -> list[Tensor]:
        return list(reference.fused_transform(x, given, prologue))

    def scaled(x: Tensor, given: Transform, prologue: Prologue) -> Quantized:
        codes, act_scale, row_sum = define(x, given, prologue)
        return codes, act_scale * 1.1, row_sum

    def summed(x: Tensor, given: Transform, prologue: Prologue) -> Quantized:
        codes, act_scale, row_sum = define(x, given, prologue)
        return codes, act_scale, row_sum + 1

    def jumping(x: Tensor, given: Transform, prologue: Prologue) -> Quantized:
        codes, act_scale, _ = define(x, given, prologue)
        codes[0, 0] -= 2 if codes[0, 0] > 0 else -2
        return codes, act_scale, codes.sum(1, keepdim=True, dtype=torch.int32)

    def refuse(*_: object) -> Quantized:
        raise RuntimeError("no such instruction")

    return {
        "codes otherwise": lambda x, given, prologue: define(x, given._replace(permutation=None), prologue),
        "of 576 codes otherwise for 3": lambda x, given, prologue: define(x, given, prologue._replace(shift=None)),
        "codes otherwise for 390": lambda x, given, prologue: define(
            x, given, prologue._replace(shift=prologue.shift if len(x) < 64 else None)
        ),
        "rounded 1 of 576 codes otherwise": jumping,
        "other scales": scaled,
        "its codes wrongly": summed,
        "fails (RuntimeError: no such instruction)": refuse,
    }


@pytest.mark.parametrize("wrong", wrong_transforms())
def test_a_wrong_transform_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "fused_transform", wrong_transforms()[wrong])
    given = dataclasses.replace(problem(), input_rotation="hadamard", input_block=64)
    assert wrong in self_test.transform_fault(given, DEVICE)
    assert self_test.transform_fault(dataclasses.replace(given, activation_bits=16), DEVICE) is None


def test_a_wrong_transform_stands_against_backends_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "fused_transform", wrong_transforms()["other scales"])
    monkeypatch.setitem(kernels.BACKENDS, "triton", Backend(lambda *_: None, fused=True))
    with pytest.raises(DuQuantError, match=r"the fused transform \(none 0\) found other scales for 3 tokens"):
        kernels.resolve("triton", problem(), DEVICE)
    assert kernels.resolve("auto", problem(), DEVICE) == "reference"
