"""Programmatic dependent launch: a kernel starts while the one before it in the stream still runs (sm_90 and later).

What lies between two kernels of a few microseconds - the end of one, the launch of the next, its first addresses - then
overlaps. A kernel that is launched so keeps three rules, in every program and before it may return:

1. it lets its dependents start at once (`gdc_launch_dependents`); they wait, so this is never too early;
2. it waits (`gdc_wait`) before it reads any tensor: the wait ends when the kernel before is complete and its writes are
   visible. Only hints, such as a prefetch into L2, where memory is coherent, may come before;
3. it writes nothing before it has waited.

Because every such kernel waits, a complete kernel means that all before it are complete, too: a kernel may overwrite
what the last but one read, and memory that an allocator hands out again in stream order is safe. A kernel that is
launched without this (torch's, cuBLAS', BitBLAS') starts when the one before is complete, as always.
"""

import functools

import torch
from torch import Tensor
import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents
    from triton.language.extra.cuda import gdc_wait

    KNOWN = True
except ImportError:  # an older Triton
    KNOWN = False

    @triton.jit
    def gdc_launch_dependents():
        """Never called."""

    @triton.jit
    def gdc_wait():
        """Never called."""


def options(tensor: Tensor) -> dict[str, bool]:
    """What a kernel on that tensor's device is launched with: the constant PDL, and Triton's own option where it is."""
    return {"PDL": True, "launch_pdl": True} if tensor.is_cuda and _supported(tensor.get_device()) else {"PDL": False}


@functools.cache
def _supported(device: int) -> bool:
    return KNOWN and torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def begin(PDL: tl.constexpr):
    """What a kernel begins with that has nothing to do before it may read."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
