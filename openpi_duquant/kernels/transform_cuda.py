"""`transform.fused_transform` on Hopper, in CUDA: for rows in bf16 that are rotated by a Hadamard or not at all.

The kernel is in transform.cu; NVRTC, which comes with torch, compiles it for the widths that a policy has.
"""

import ctypes
import functools
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor

from openpi_duquant.kernels import driver
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.backend import architecture
from openpi_duquant.kernels.backend import processors_of
from openpi_duquant.transforms import Transform

_SOURCE = pathlib.Path(__file__).with_name("transform.cu")
_REGISTERS = 2**16  # of an SM
_MOST_BLOCKS = 8  # of an SM
_WIDE = 8192  # channels; up to here a thread has 16 of them
_FACTORS = {torch.float32: "float", torch.bfloat16: "bf16"}


class Kind(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        width: K, channels of a row.
        block: Of the Hadamard, 0 for none.
        geglu: As of `Prologue`.
        norm: As of `Prologue`.
        scale: Whether there is one.
        shift: Whether there is one.
        permuted: Whether there is a permutation.
        factor: The type of scale and shift.
    """

    width: int
    block: int
    geglu: bool
    norm: bool
    scale: bool
    shift: bool
    permuted: bool
    factor: torch.dtype

    @property
    def each(self) -> int:
        """Channels of a thread."""
        return 32 if self.width > _WIDE else 16

    @property
    def threads(self) -> int:
        """Of a block, which has a row at a time."""
        return self.width // self.each

    @property
    def blocks(self) -> int:
        """Of an SM, by the registers that its threads need."""
        needed = 80 if self.norm or self.permuted else 64
        return max(1, min(_REGISTERS // (needed * self.threads), _MOST_BLOCKS))

    @property
    def shared_memory(self) -> int:
        """Bytes that a block needs: struct Memory of transform.cu."""
        row, permuted = self.width * (4 if self.geglu else 2), 2 * self.width if self.permuted else 16
        return row + permuted + 8 + 3 * 4 * self.threads // 32


class _Arguments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "scale", "shift", "permutation", "codes", "act_scale", "row_sum")),
        ("stride", ctypes.c_int64),
        ("rows", ctypes.c_int),
    ]


def kind_for(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    hadamard: int,
    *,
    geglu: bool,
    norm: bool,
) -> Kind | None:
    """What kernel transforms these rows here, None if none does; arguments as the operator's. Rows must be in bf16, not
    rotated by matrices, of a multiple of 512 channels (of 1,024 beyond 8,192, and then not normalized or permuted), and
    on Hopper."""
    factor = next((each.dtype for each in (scale, shift) if each is not None), torch.float32)
    there = (each is not None for each in (scale, shift, permutation))
    kind = Kind(x.shape[1] // (1 + geglu), hadamard, geglu, norm, *there, factor)
    takes = (
        x.dtype == torch.bfloat16
        and matrices is None
        and len(x) > 0
        and kind.width % (32 * kind.each) == 0
        and (kind.width <= _WIDE or not (norm or kind.permuted))
        and all(each is None or each.dtype == factor for each in (scale, shift))
        and factor in _FACTORS
        and all(each is None or each.data_ptr() % 16 == 0 for each in (x, scale, shift, permutation))
        and x.stride(0) * x.element_size() % 16 == 0
        and architecture(x.device) == "sm_90"
        and _kernel(x.device, kind) is not None
    )
    return kind if takes else None


def launch(
    kind: Kind,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    permutation: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fills codes [M, K] int8, act_scale [M, 1] fp32 and row_sum [M, 1] int32; other arguments as `kind_for`."""
    blocks = min(len(x), kind.blocks * processors_of(x.device))
    _run(_kernel(x.device, kind), kind, blocks, x, scale, shift, permutation, outputs)


def _run(
    function: driver.Function,
    kind: Kind,
    blocks: int,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    permutation: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor],
) -> None:
    tensors = (None if each is None else each.data_ptr() for each in (x, scale, shift, permutation, *outputs))
    arguments = _Arguments(*tensors, x.stride(0) * x.element_size(), len(x))
    function((blocks, 1, 1), kind.threads, [arguments])


@functools.cache
def _kernel(device: torch.device, kind: Kind) -> driver.Function | None:
    """The kernel, once it has made of small data what it should; None, and a warning, where it does not."""
    constants = {
        "K": kind.width,
        "EACH": kind.each,
        "BLOCKS": kind.blocks,
        "BLOCK": kind.block,
        "GAIN": f"{(kind.block or 1) ** -0.5}f",
        "FACTOR": _FACTORS[kind.factor],
        "EPS": f"{reference.NORM_EPS}f",
    } | {name.upper(): int(getattr(kind, name)) for name in ("geglu", "norm", "scale", "shift", "permuted")}
    source = driver.Source(_SOURCE.name, _SOURCE.read_text(), "transform")

    def fault(function: driver.Function) -> str | None:
        return _fault(function, kind, device)

    return driver.load_tested(source, constants, kind.shared_memory, device, fault, "inputs are transformed")


def _fault(function: driver.Function, kind: Kind, device: torch.device) -> str | None:
    """What the kernel makes otherwise than its definition, of random rows, more of them than blocks; or None."""
    from openpi_duquant.kernels import self_test  # noqa: PLC0415  it tests fused_transform, which imports this
    from openpi_duquant.kernels import transform  # noqa: PLC0415

    random = torch.Generator(device).manual_seed(0)
    x = torch.randn(5, kind.width * (1 + kind.geglu), generator=random, device=device).bfloat16()
    scale, shift = (
        torch.randn(kind.width, generator=random, device=device).to(kind.factor) if there else None
        for there in (kind.scale, kind.shift)
    )
    permutation = torch.randperm(kind.width, generator=random, device=device) if kind.permuted else None
    made = transform.empty(x, len(x), kind.width)
    _run(function, kind, 2, x, scale, shift, permutation, made)
    prologue = reference.Prologue(kind.geglu, kind.norm, scale, shift)
    expected = reference.fused_transform(x, Transform(None, permutation, kind.block or None), prologue)
    wrong = self_test.wrong_codes(made, expected)
    return wrong and f"{kind}: it {wrong}"
