"""Every operator is compared with integers before a layer may use it."""

import torch
from torch import Tensor

from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.bitblas import operators
from openpi_duquant.kernels.bitblas.launch import accumulate
from openpi_duquant.kernels.self_test import random_weight
from openpi_duquant.kernels.self_test import wrong_sums

_TOKENS = (1, 3, operators.BUCKETS[0] - 1), (operators.BUCKETS[0] + 1, 127), (operators.BUCKETS[1] + 1,)
_REPEATS = 4


def self_test(problem: Problem, device: torch.device) -> str | None:
    """Compares accumulators with integer arithmetic: full range, odd numbers of tokens, repeatedly.

    Returns:
        What was wrong and how to report it, or None.
    """
    canonical = random_weight(problem, device)
    weight = operators.repack(problem, canonical)
    for operator, tokens in zip(operators.operators(problem), _TOKENS):
        fault = wrong_sums(operator.name, canonical, tokens, lambda codes: integers(codes, weight, problem), _REPEATS)
        if fault:
            return fault
    return None


def integers(codes: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """Accumulators [M, N] of codes [M, K] and a repacked weight, as int32."""
    if problem.activation_bits == 16:
        return accumulate(codes.half(), weight).to(torch.int32)
    sums = accumulate(codes, weight)
    return sums - 8 * codes.sum(1, keepdim=True, dtype=torch.int32) if problem.weight_bits == 4 else sums
