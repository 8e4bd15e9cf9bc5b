"""From a layer to kernels on a device that have been seen to be right."""

from collections.abc import Iterable
import importlib.util
from typing import Any

import torch

from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import driver
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.backend import architecture
from openpi_duquant.kernels.backend import reasons_against
from openpi_duquant.kernels.bitblas import build
from openpi_duquant.kernels.bitblas import cache
from openpi_duquant.kernels.bitblas import operators
from openpi_duquant.kernels.bitblas.launch import KERNELS
from openpi_duquant.kernels.bitblas.launch import Kernel
from openpi_duquant.kernels.bitblas.self_test import self_test
from openpi_duquant.kernels.epilogue import LARGEST_BLOCK

_DTYPES = {
    "w4a8": (torch.int8, torch.uint8),
    "w8a8": (torch.int8, torch.int8),
    "w4a16": (torch.float16, torch.uint8),
}
_faults: dict[tuple[Any, ...], str] = {}
"""What was wrong with a problem's kernels, so that not every layer alike tries again."""


def can_run(problem: Problem, device: torch.device) -> tuple[bool, list[str]]:
    """See `Backend.can_run`."""
    reasons = unsupported(problem) + reasons_against(device)
    if not reasons and not _is_loaded(problem, device):
        reasons += _missing(problem, device)
    if importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed, which its epilogue needs (pip install triton)")
    return not reasons, reasons


def unsupported(problem: Problem) -> list[str]:
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
    fresh = [problem for key, problem in wanted.items() if key not in _faults]
    needed = [operator for problem in fresh for operator in operators.operators(problem)]
    where = architecture(device), driver.version()
    missing = [operator for operator in needed if cache.find(operator.name, *where) is None]
    failure = _build(missing, where[0]) if missing else None
    for key, problem in wanted.items():
        if key not in _faults and (fault := _start(key, problem, where, failure)):
            _faults[key] = fault
            KERNELS.pop(key, None)
    found = dict.fromkeys(_faults[key] for key in wanted if key in _faults)
    if found:
        raise DuQuantError("; ".join(found))


def _build(missing: list[operators.Operator], name: str) -> str | None:
    try:
        build.build(missing, name)
    except DuQuantError as error:
        return str(error)
    return None


def _start(
    key: tuple[Any, ...], problem: Problem, where: tuple[str, tuple[int, int]], failure: str | None
) -> str | None:
    """Loads and tests the operators of one problem; returns what is wrong with them."""
    try:
        found = [(operator, cache.find(operator.name, *where)) for operator in operators.operators(problem)]
        if not all(entry for _, entry in found):
            return failure or f"the kernels built are for a newer CUDA than this driver's {where[1]}; update the driver"
        KERNELS[key] = tuple(_load(operator, entry, key[0]) for operator, entry in found)
    except DuQuantError as error:
        return str(error)
    return self_test(problem, torch.device("cuda", key[0]))


def _load(operator: operators.Operator, entry: cache.Entry, device: int) -> Kernel:
    try:
        code, launch = entry.read()
        function = driver.load(code, operator.name, launch.pop("shared_memory"), device)
        return Kernel(function, **launch)
    except (DuQuantError, OSError, ValueError, KeyError, TypeError) as error:
        raise DuQuantError(f"{entry.path}: {error}; delete it and the .cubin beside it") from None
