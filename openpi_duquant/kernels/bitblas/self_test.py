"""Every operator is compared with integers before a layer may use it."""

import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.bitblas import operators
from openpi_duquant.kernels.bitblas.launch import accumulate

_TOKENS = (1, 3, operators.BUCKETS[0] - 1), (operators.BUCKETS[0] + 1, 127), (operators.BUCKETS[1] + 1,)
_REPEATS = 4
_ORACLE_ELEMENTS = 2**22  # of fp64 weights at a time: 32 MB


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
    for operator, tokens in zip(operators.operators(problem), _TOKENS):
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
