"""From a layer to kernels on a device that have been seen to be right."""

from collections.abc import Iterable
import importlib.util

import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.bitblas import build
from openpi_duquant.kernels.bitblas import cache
from openpi_duquant.kernels.bitblas import driver
from openpi_duquant.kernels.bitblas import operators
from openpi_duquant.kernels.bitblas.matmul import KERNELS
from openpi_duquant.kernels.bitblas.matmul import accumulate
from openpi_duquant.kernels.epilogue import LARGEST_BLOCK

_DTYPES = {
    "w4a8": (torch.int8, torch.uint8),
    "w8a8": (torch.int8, torch.int8),
    "w4a16": (torch.float16, torch.uint8),
}
_REPEATS = 4
_ORACLE_ELEMENTS = 2**22  # of fp64 weights at a time: 32 MB

_refused: dict[tuple[int, ...], str] = {}


def can_run(problem: Problem, device: torch.device) -> tuple[bool, list[str]]:
    """See `Backend.can_run`."""
    reasons = _unsupported(problem)
    if device.type != "cuda":
        reasons.append(f"it needs a CUDA device, not {device.type}")
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append(f"it needs sm_80 or later, {torch.cuda.get_device_name(device)} is {architecture(device)}")
    elif not reasons and not _is_loaded(problem, device):
        reasons += _missing(problem, device)
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed, which its epilogue needs (pip install triton)")
    return not reasons, reasons


def _unsupported(problem: Problem) -> list[str]:
    """Reasons that lie in the layer itself."""
    reasons = []
    if operators.kind_of(problem) not in _DTYPES:
        reasons.append(f"it has no W{problem.weight_bits}A{problem.activation_bits}")
    if problem.activation_bits == 16 and problem.dtype == torch.float32:
        reasons.append("weights only, it multiplies in float16, and the host computes in float32")
    if problem.scale_groups > 1:
        reasons.append("it has one weight scale a row, the layer has a group_size")
    if problem.out_features % operators.N_MULTIPLE:
        reasons.append(f"out_features {problem.out_features} is no multiple of {operators.N_MULTIPLE}")
    if problem.output_block > LARGEST_BLOCK:
        reasons.append(f"it restores output blocks of at most {LARGEST_BLOCK}, the layer's are {problem.output_block}")
    return reasons


def _missing(problem: Problem, device: torch.device) -> list[str]:
    """Reasons why an operator that is not in the cache cannot be built here."""
    for operator in operators.operators(problem):
        if cache.find(operator.name, architecture(device), driver.version()) is None:
            return [f"{reason}; openpi-duquant build-kernels on a machine that has it" for reason in build.obstacles()]
    return []


def architecture(device: torch.device) -> str:
    """The name of a device's architecture: "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def _key(problem: Problem, device: torch.device) -> tuple[int, torch.dtype, torch.dtype, int, int]:
    index = torch.cuda.current_device() if device.index is None else device.index
    n, k = problem.out_features, operators.padded(problem.in_features)
    return index, *_DTYPES[operators.kind_of(problem)], n, k


def _is_loaded(problem: Problem, device: torch.device) -> bool:
    return _key(problem, device) in KERNELS


def load(problems: Iterable[Problem], device: torch.device) -> None:
    """Loads the operators of these problems onto a device and tests them; builds those that the cache does not have.

    Raises:
        DuQuantError: If one cannot be built or loaded, or computes wrongly; the others are loaded all the same.
    """
    wanted = {_key(problem, device): problem for problem in problems if not _is_loaded(problem, device)}
    if not wanted:
        return
    needed = [operator for problem in wanted.values() for operator in operators.operators(problem)]
    where = architecture(device), driver.version()
    missing = [operator for operator in needed if cache.find(operator.name, *where) is None]
    if missing:
        build.build(missing, where[0])
    for key, problem in wanted.items():
        if key not in _refused:
            KERNELS[key] = tuple(_load(operator, where, key[0]) for operator in operators.operators(problem))
            fault = self_test(problem, torch.device("cuda", key[0]))
            if fault:
                _refused[key] = fault
                del KERNELS[key]
    for key in wanted:
        if key in _refused:
            raise DuQuantError(_refused[key])


def _load(operator: operators.Operator, where: tuple[str, tuple[int, int]], device: int) -> driver.Kernel:
    entry = cache.find(operator.name, *where)
    if entry is None:
        raise DuQuantError(f"the kernels built are for a newer CUDA than this driver's {where[1]}; update the driver")
    try:
        code, launch = entry.read()
        return driver.load(code, operator.name, launch, device)
    except (DuQuantError, OSError, ValueError, KeyError) as error:
        raise DuQuantError(f"{entry.path}: {error}; delete it and the .cubin beside it") from None


def self_test(problem: Problem, device: torch.device) -> str | None:
    """Compares accumulators with integer arithmetic: full range, odd numbers of tokens, repeatedly.

    Returns:
        What was wrong and how to report it, or None.
    """
    random = torch.Generator(device).manual_seed(0)
    n, k = problem.out_features, problem.in_features
    shape, dtype = ((n, k // 2), torch.uint8) if problem.weight_bits == 4 else ((n, k), torch.int8)
    canonical = torch.randint(0, 256, shape, generator=random, device=device, dtype=torch.uint8).view(dtype)
    weight = operators.repack(problem, canonical)
    for operator, tokens in zip(
        operators.operators(problem), ((1, 3, operators.SMALL - 1), (operators.SMALL + 1, 127))
    ):
        for m in tokens:
            codes = torch.randint(-127, 128, (m, k), generator=random, device=device, dtype=torch.int8)
            expected = _oracle(codes, canonical)
            for _ in range(_REPEATS):
                wrong = (integers(codes, weight, problem) != expected).sum().item()
                if wrong:
                    return (
                        f"{operator.name} computed {wrong} of {expected.numel()} sums wrongly for {m} tokens on "
                        f"{torch.cuda.get_device_name(device)}; please report this line and what openpi-duquant "
                        "doctor shows as an issue of openpi-duquant"
                    )
    return None


def integers(codes: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """Accumulators [M, N] of codes [M, K] and a repacked weight, as int32."""
    if problem.activation_bits == 16:
        return accumulate(codes.half(), weight).to(torch.int32)
    sums = accumulate(codes, weight)
    return sums - 8 * codes.sum(1, keepdim=True, dtype=torch.int32) if problem.weight_bits == 4 else sums


def _oracle(codes: Tensor, canonical: Tensor) -> Tensor:
    rows = max(1, _ORACLE_ELEMENTS // codes.shape[1])
    parts = [reference.integer_matmul(codes, packing.unpack(part)) for part in canonical.split(rows)]
    return torch.cat(parts, dim=1)
