"""What a backend is, and what it is told of a layer before it sees a tensor."""

from collections.abc import Callable, Iterable
import dataclasses
import functools
from typing import Protocol

import torch
from torch import Tensor

from openpi_duquant import transforms
from openpi_duquant.config import DuQuantError

Workload = tuple[tuple[int, int], ...]
"""Numbers of tokens, and how often a layer sees each."""

USUAL_TOKENS: Workload = ((1, 10), (50, 10), (968, 1))
"""Of a layer of which no more is known: few tokens often, many at times."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One layer, as its matmul sees it.

    Attributes:
        out_features: N.
        in_features: K.
        weight_bits: 4 or 8.
        activation_bits: 8, or 16 (weights only).
        scale_groups: Weight scales of a row.
        output_rotation: "none", "hadamard" or "matrix".
        output_block: B of the output rotation, 0 for none.
        dtype: Type the host computes in.
        input_rotation: "none", "hadamard" or "matrix": what is done to its input.
        input_block: B of that rotation, 0 for none.
        tokens: Numbers of tokens M that the layer will see, and how often each: what `auto` chooses by.
    """

    out_features: int
    in_features: int
    weight_bits: int
    activation_bits: int
    scale_groups: int
    output_rotation: str
    output_block: int
    dtype: torch.dtype
    input_rotation: str = "none"
    input_block: int = 0
    tokens: Workload = USUAL_TOKENS

    def like(self, out_features: int, in_features: int) -> "Problem":
        """A problem of the same kind and of that size."""
        return dataclasses.replace(
            self, out_features=out_features, in_features=in_features, input_rotation="none", input_block=0, tokens=()
        )

    def __str__(self) -> str:
        return f"W{self.weight_bits}A{self.activation_bits} {self.out_features}x{self.in_features}"


class Matmul(Protocol):
    """The one signature of every backend."""

    def __call__(
        self,
        a: Tensor,
        act_scale: Tensor | None,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        output_rotation: transforms.Rotation,
        dtype: torch.dtype,
        row_sum: Tensor | None = None,
    ) -> Tensor:
        """y = (a . weight) * act_scale * weight_scale, restored, plus bias.

        Args:
            a: [M, K] int8 codes; or floating point, when act_scale is None (weights only).
            act_scale: [M, 1] fp32, or None.
            weight: What the backend's `repack` made of the canonical weight.
            weight_scale: [N, G] fp32.
            bias: [N], or None.
            output_rotation: Rotation that restores the output, see `transforms.Rotation`.
            dtype: Type of the result.
            row_sum: [M, 1] int32, sums of the codes; a backend that wants them computes what it is not given.

        Returns:
            [M, N] dtype.
        """
        ...


def require_device(device: torch.device) -> None:
    """Raises DuQuantError if it is a CUDA device that is not here."""
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DuQuantError(f"device {device}: {count} CUDA devices are visible here; see openpi-duquant doctor")


def architecture(device: torch.device) -> str:
    """The name of a CUDA device's architecture: "sm_90"."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def processors_of(device: torch.device) -> int:
    """How many SMs a CUDA device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def reasons_against(device: torch.device) -> list[str]:
    """Why kernels for GPUs from sm_80 on cannot run on this device."""
    if device.type != "cuda":
        return [f"it needs a CUDA device, not {device.type}"]
    if torch.cuda.get_device_capability(device) < (8, 0):
        return [f"it needs sm_80 or later, {torch.cuda.get_device_name(device)} is {architecture(device)}"]
    return []


def _runs_anywhere(_problem: Problem, _device: torch.device) -> tuple[bool, list[str]]:
    return True, []


def _needs_nothing(_problems: Iterable[Problem], _device: torch.device) -> None:
    pass


def _as_it_is(_problem: Problem, weight: Tensor) -> Tensor:
    return weight


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to compute a layer; the defaults are those of one that runs anywhere, from the canonical weight.

    Attributes:
        matmul: Computes; allocates nothing but its result and temporaries of its own, never waits for the device.
        can_run: Whether it runs this problem on this device, and if not, every reason; cheap, and changes nothing.
        load: Makes ready what these problems need on this device: builds, loads and tests kernels; raises DuQuantError.
        repack: From the canonical weight (see `packing`) to the one that `matmul` takes.
        canonical: Inverse of `repack`.
        fused: Whether the kernels of `transform` make its int8 input; else their definition does.
        fuses_epilogue: Whether `matmul` also takes an `epilogue`, a `reference.Epilogue`; else that is applied to `y`.
    """

    matmul: Matmul
    can_run: Callable[[Problem, torch.device], tuple[bool, list[str]]] = _runs_anywhere
    load: Callable[[Iterable[Problem], torch.device], None] = _needs_nothing
    repack: Callable[[Problem, Tensor], Tensor] = _as_it_is
    canonical: Callable[[Problem, Tensor], Tensor] = _as_it_is
    fused: bool = False
    fuses_epilogue: bool = False
