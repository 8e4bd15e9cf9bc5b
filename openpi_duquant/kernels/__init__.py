"""Backends: one file or folder each, one signature, `reference` the definition of all; the registry chooses at load."""

from collections.abc import Iterable
import functools
import logging

import torch

from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import bitblas
from openpi_duquant.kernels import choice
from openpi_duquant.kernels import fake
from openpi_duquant.kernels import reference
from openpi_duquant.kernels import self_test
from openpi_duquant.kernels import triton_matmul
from openpi_duquant.kernels.backend import Backend
from openpi_duquant.kernels.backend import Problem

logger = logging.getLogger(__name__)

__all__ = ["AUTO", "BACKENDS", "Backend", "Problem", "check_name", "load", "require", "resolve"]

BACKENDS: dict[str, Backend] = {
    "triton": triton_matmul.BACKEND,
    "bitblas": bitblas.BACKEND,
    "reference": reference.BACKEND,
    "fake": fake.BACKEND,
}

AUTO = ("triton", "bitblas", "reference")
"""What `auto` chooses from: on a GPU the fastest by measurement, see `choice`; the last where no other runs. `fake`
simulates, and runs only when it is named."""


def check_name(name: str) -> None:
    """Raises DuQuantError unless `name` is "auto" or a backend; names those there are."""
    if name != "auto" and name not in BACKENDS:
        raise DuQuantError(f"unknown backend {name!r}: this version has auto, {', '.join(BACKENDS)}")


def require(name: str, problems: Iterable[Problem], device: torch.device) -> None:
    """Raises DuQuantError if a backend that is named cannot run one of these problems; nothing is built or loaded."""
    check_name(name)
    for problem in dict.fromkeys(problems) if name != "auto" else ():
        runs, reasons = BACKENDS[name].can_run(problem, device)
        if not runs:
            raise DuQuantError(f"backend {name} cannot run: {'; '.join(reasons)} ({problem} on {device})")


def load(name: str, problems: Iterable[Problem], device: torch.device) -> None:
    """Makes ready what these problems need, all at once, so that `resolve` of each is quick.

    What cannot be made ready is left for `resolve` to say.
    """
    problems = list(dict.fromkeys(problems))
    for candidate in AUTO if name == "auto" else (name,):
        runnable = [problem for problem in problems if BACKENDS[candidate].can_run(problem, device)[0]]
        try:
            BACKENDS[candidate].load(runnable, device)
        except DuQuantError as error:
            logger.debug("backend %s: %s", candidate, error)
            continue
        if device.type != "cuda":  # there the first that runs is taken
            problems = [problem for problem in problems if problem not in runnable]
    rivals: dict[tuple[str, ...], list[Problem]] = {}
    for problem in problems if name == "auto" else ():
        rivals.setdefault(tuple(_candidates(name, problem, device)[0]), []).append(problem)
    for names, members in rivals.items():
        if len(names) > 1:
            choice.decide({candidate: BACKENDS[candidate] for candidate in names}, members, device)


def resolve(name: str, problem: Problem, device: torch.device) -> str:
    """The backend that runs this problem on this device, loaded and tested; what `auto` chose and why is logged once.

    Args:
        name: A backend, or "auto", see `AUTO`.
        problem: The layer.
        device: Where its tensors are.

    Raises:
        DuQuantError: If the backend named cannot run (with every reason), or there is none of that name.
    """
    check_name(name)
    names, refused = _candidates(name, problem, device)
    if len(names) > 1:
        found = choice.decide({candidate: BACKENDS[candidate] for candidate in names}, [problem], device)[problem]
        if found.times:
            return found.fastest(problem)
        refused += [f"{candidate} fails: {reason}" for candidate, reason in found.failures.items()]
        names = AUTO[-1:]
    if not names:
        raise DuQuantError(f"backend {refused[0]} ({problem} on {device})")
    if name == "auto":
        _log_choice(problem.weight_bits, problem.activation_bits, device, names[0], tuple(refused))
    return names[0]


def _candidates(name: str, problem: Problem, device: torch.device) -> tuple[list[str], list[str]]:
    """Backends that run the problem, one unless `auto` has to measure; and what stands against others."""
    names: list[str] = []
    refused = []
    for candidate in AUTO if name == "auto" else (name,):
        if names and (device.type != "cuda" or candidate == AUTO[-1]):
            break
        reasons = _reasons_against(candidate, problem, device)
        if reasons:
            refused.append(f"{candidate} cannot run: {'; '.join(reasons)}")
        else:
            names.append(candidate)
    return names, refused


def _reasons_against(name: str, problem: Problem, device: torch.device) -> list[str]:
    backend = BACKENDS[name]
    runs, reasons = backend.can_run(problem, device)
    if not runs:
        return reasons
    try:
        backend.load([problem], device)
    except DuQuantError as error:
        return [str(error)]
    fault = self_test.transform_fault(problem, device) if backend.fused else None
    return [fault] if fault else []


@functools.cache
def _log_choice(
    weight_bits: int, activation_bits: int, device: torch.device, chosen: str, refused: tuple[str, ...]
) -> None:
    """Says what `auto` took, once for all layers alike."""
    against = f"; {'; '.join(refused)}" if refused else ""
    level = logging.WARNING if device.type == "cuda" and chosen == "reference" else logging.INFO  # slow there
    logger.log(level, "backend auto: W%dA%d on %s runs on %s%s", weight_bits, activation_bits, device, chosen, against)
