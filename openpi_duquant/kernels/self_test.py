"""A kernel is compared with its definition, on the GPU at hand, before a layer may use it."""

from collections.abc import Callable, Iterable
import functools
from typing import Any

import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant import transforms
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.backend import Backend
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.kernels.transform import fused_transform
from openpi_duquant.kernels.transform import why_not_fused
from openpi_duquant.profiling import not_profiled
from openpi_duquant.transforms import Transform

_REPORT = "please report this line and what openpi-duquant doctor shows as an issue of openpi-duquant"
_ORACLE_ELEMENTS = 2**22  # of fp64 weights at a time: 32 MB
_TOKENS = (3, 130)  # few and many, no multiple of a tile
_CHANNELS = 320  # no multiple of a tile either
_FEATURES = 3  # blocks of the output rotation, or of 64 channels


def wrong_sums(
    name: str, canonical: Tensor, tokens: Iterable[int], sums: Callable[[Tensor], Tensor], repeats: int = 1
) -> str | None:
    """Compares sums of random codes with integer arithmetic, over the full range, repeatedly.

    Args:
        name: What is tested.
        canonical: The weight [N, K], as in files.
        tokens: Numbers of tokens M.
        sums: From codes [M, K] int8 to sums [M, N], integers in any dtype that holds them.
        repeats: How often each is computed.

    Returns:
        What was wrong and how to report it, or None.
    """
    random = torch.Generator(canonical.device).manual_seed(0)
    k = packing.unpack(canonical[:1]).shape[1]
    for m in tokens:
        codes = torch.randint(-127, 128, (m, k), generator=random, device=canonical.device, dtype=torch.int8)
        expected = _oracle(codes, canonical)
        for _ in range(repeats):
            wrong = (sums(codes) != expected).sum().item()
            if wrong:
                return _report(f"{name} computed {wrong} of {expected.numel()} sums wrongly for {m} tokens", canonical)
    return None


def random_weight(problem: Problem, device: torch.device) -> Tensor:
    """A canonical weight of random codes."""
    random = torch.Generator(device).manual_seed(1)
    shape = problem.out_features, problem.in_features * problem.weight_bits // 8
    dtype = torch.uint8 if problem.weight_bits == 4 else torch.int8
    return torch.randint(0, 256, shape, generator=random, device=device, dtype=torch.uint8).view(dtype)


def random_restore(problem: Problem) -> transforms.Rotation:
    """A rotation of the kind that restores the problem's output, on the CPU."""
    random = torch.Generator().manual_seed(4)
    return _rotation(problem.output_rotation, problem.output_block, problem.out_features, random)


def _oracle(codes: Tensor, canonical: Tensor) -> Tensor:
    rows = max(1, _ORACLE_ELEMENTS // codes.shape[1])
    parts = [reference.integer_matmul(codes, packing.unpack(part)) for part in canonical.split(rows)]
    return torch.cat(parts, dim=1)


def _report(what: str, where: Tensor) -> str:
    return f"{what} on {torch.cuda.get_device_name(where.device) if where.is_cuda else where.device}; {_REPORT}"


def matmul_fault(name: str, backend: Backend, problem: Problem, device: torch.device) -> str | None:
    """Tests a W4A8 or W8A8 backend on small data of a problem's kind: its sums, then its scales and output restore.

    Returns:
        What was wrong and how to report it, or None; tested once a process.
    """
    features = _FEATURES * (problem.output_block or 64)
    return _matmul_fault(name, backend, problem.like(features, _CHANNELS), device)


@functools.cache
@not_profiled()
def _matmul_fault(name: str, backend: Backend, problem: Problem, device: torch.device) -> str | None:
    canonical = random_weight(problem, device)
    weight = backend.repack(problem, canonical)

    def sums(codes: Tensor) -> Tensor:
        ones = (torch.ones(size, 1, device=device) for size in (len(codes), problem.out_features))
        return backend.matmul(codes, next(ones), weight, next(ones), None, None, torch.float32)

    try:
        fault = wrong_sums(f"{name}'s matmul", canonical, _TOKENS, sums)
        return fault or _wrong_outputs(name, backend, problem, canonical)
    except Exception as error:  # noqa: BLE001 - a compiler has many ways to refuse
        return _report(f"{name}'s matmul fails ({in_one_line(error)})", canonical)


def _wrong_outputs(name: str, backend: Backend, problem: Problem, canonical: Tensor) -> str | None:
    """The result in the host's type, scaled, restored and through epilogues, against the definition's on the CPU."""
    random = torch.Generator().manual_seed(2)
    weight = backend.repack(problem, canonical)
    after = torch.rand(problem.out_features, 1, generator=random) + 0.5, None, random_restore(problem)
    for tokens in _TOKENS:
        codes = torch.randint(-127, 128, (tokens, problem.in_features), generator=random, dtype=torch.int8)
        given = codes, torch.rand(tokens, 1, generator=random) / 1000 + 1e-4
        plain = reference.matmul(*given, canonical.cpu(), *after, torch.float32)
        there = _moved((*given, weight, *after, problem.dtype), canonical.device)
        for what, epilogue in _epilogues(plain, problem.dtype, random).items():
            if what and not backend.fuses_epilogue:
                continue
            fused = {"epilogue": Epilogue(*_moved(epilogue, canonical.device))} if what else {}
            expected = epilogue.apply(plain)
            error = ((backend.matmul(*there, **fused).float().cpu() - expected).norm() / expected.norm()).item()
            if not error < max(4 * torch.finfo(problem.dtype).eps, 1e-5):
                return _report(f"{name}'s matmul {problem}{what} errs by {error:.2g} of its result", canonical)
    return None


def _epilogues(y: Tensor, dtype: torch.dtype, random: torch.Generator) -> dict[str, Epilogue]:
    """No epilogue, and those that layers have, for a result [M, N] of three heads; operands as large as y."""
    angle = torch.rand(len(y), y.shape[1] // (2 * _FEATURES), generator=random).repeat(1, 2) * 6
    residual, gate = torch.randn(y.shape, generator=random) * y.std(), torch.randn(y.shape[1], generator=random)
    return {
        "": Epilogue(),
        " with rotary embedding": Epilogue(rotary=(angle.cos().to(dtype), angle.sin().to(dtype))),
        " with residual": Epilogue(residual=residual.to(dtype), gate=gate),
        " with GeGLU": Epilogue(geglu=True),
    }


def transform_fault(problem: Problem, device: torch.device) -> str | None:
    """Tests the fused transform on small data of the kind that a layer's input has.

    Returns:
        What was wrong and how to report it, or None; tested once a process.
    """
    if problem.activation_bits != 8:
        return None
    return _transform_fault(problem.input_rotation, problem.input_block, problem.dtype, device)


@functools.cache
@not_profiled()
def _transform_fault(kind: str, block: int, dtype: torch.dtype, device: torch.device) -> str | None:
    random = torch.Generator().manual_seed(3)
    width = 3 * (block or 64)
    rotation = _rotation(kind, block, width, random)
    permutation = torch.randperm(width, generator=random)
    if why_not_fused(Transform(None, permutation, rotation), width):
        return None
    scale, shift = torch.randn(2, width, generator=random) / 4
    what = f"the fused transform ({kind} {block})"
    norm, permuted = Prologue(norm=True, scale=scale, shift=shift), Transform(None, permutation, rotation)
    try:
        for rows, prologue, given in (
            (_TOKENS[0], norm, permuted),
            (_TOKENS[0], Prologue(geglu=True), Transform(None, None, rotation)),
            (3 * _TOKENS[1], norm, permuted),
            (3 * _TOKENS[1], Prologue(), permuted),
        ):
            x = torch.randn(rows, width * (1 + prologue.geglu), generator=random).to(dtype)
            expected = reference.fused_transform(x, given, prologue)
            there = Transform(*_moved(given, device)), Prologue(*_moved(prologue, device))
            actual = fused_transform(x.to(device), *there)
            wrong = wrong_codes([part.cpu() for part in actual], expected)
            if wrong:
                return _report(f"{what} {wrong} for {rows} tokens", torch.empty(0, device=device))
    except Exception as error:  # noqa: BLE001 - a compiler has many ways to refuse
        return _report(f"{what} fails ({in_one_line(error)})", torch.empty(0, device=device))
    return None


def wrong_codes(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> str | None:
    """Codes may differ by rounding: by one step, on few elements."""
    (codes, act_scale, row_sum), (right, right_scale, _) = actual, expected
    difference = (codes.int() - right.int()).abs()
    if difference.max() > 1 or difference.count_nonzero() > 0.03 * difference.numel():
        return f"rounded {difference.count_nonzero()} of {difference.numel()} codes otherwise"
    if not torch.allclose(act_scale, right_scale, rtol=1e-2, atol=0):
        return "found other scales"
    if not torch.equal(row_sum, codes.sum(1, keepdim=True, dtype=torch.int32)):
        return "summed its codes wrongly"
    return None


def _rotation(kind: str, block: int, width: int, random: torch.Generator) -> transforms.Rotation:
    if kind == "matrix":
        return torch.linalg.qr(torch.randn(width // block, block, block, generator=random))[0].bfloat16().contiguous()
    return block if kind == "hadamard" else None


def _moved(given: Iterable[object], device: torch.device) -> list[Any]:
    """Its tensors, also those in tuples, on that device; all else as it is."""
    parts = (tuple(_moved(part, device)) if isinstance(part, tuple) else part for part in given)
    return [part.to(device) if isinstance(part, Tensor) else part for part in parts]


def disagreement(compute: Callable[[], Tensor], expected: Tensor, limit: float) -> str | None:
    """What is wrong with a result: that it cannot be computed, or differs from what is expected by `limit` of its norm
    or more; None if nothing is."""
    try:
        error = (compute().double() - expected.double()).norm() / expected.double().norm()
    except Exception as problem:  # noqa: BLE001 - a compiler has many ways to refuse
        return f"fails ({in_one_line(problem)})"
    return None if error < limit else f"is off by {error:.3f}; {_REPORT}"


def in_one_line(error: Exception) -> str:
    """Its type, and the first and the last line of its message."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *dict.fromkeys((*lines[:1], *lines[-1:]))])
