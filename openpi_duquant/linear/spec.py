"""What one quantized layer is: all that is needed to build it empty and to name its tensors."""

import dataclasses

import torch

from openpi_duquant.kernels import Problem
from openpi_duquant.kernels.backend import USUAL_TOKENS
from openpi_duquant.kernels.backend import Workload

SHARED_TENSORS = ("pre_rotation", "permutation", "rotation")
"""Tensors that the layers of one group have in common."""


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One quantized layer.

    Attributes:
        in_features: K.
        out_features: N.
        bias: Whether there is a bias.
        weight_bits: 4 or 8.
        activation_bits: 8, or 16 (weights only).
        group_size: Input channels to a weight scale; None for the whole row.
        pre_rotation: Whether input channels are rotated before they are permuted (DuQuant as published).
        permute: Whether input channels are permuted at run time.
        rotation: Run-time rotation of input channels: "none", "hadamard" or "matrix".
        rotation_block: B of that rotation, 0 for none.
        output_rotation: Run-time restore of rotated output rows: "none", "hadamard" or "matrix"; "folded" if the
            rows are rotated and the next layer undoes it.
        output_rotation_block: B of that, 0 for none.
        group: First layer of those that read the same input and share permutation and rotation.
    """

    in_features: int
    out_features: int
    bias: bool
    weight_bits: int
    activation_bits: int
    group_size: int | None
    pre_rotation: bool
    permute: bool
    rotation: str
    rotation_block: int
    output_rotation: str
    output_rotation_block: int
    group: str

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor of the layer but its bias, whose dtype is the source's."""
        n, k = self.out_features, self.in_features
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.uint8, (n, k // 2)) if self.weight_bits == 4 else (torch.int8, (n, k)),
            "weight_scale": (torch.float32, (n, k // (self.group_size or k))),
        }
        b = self.rotation_block
        if self.pre_rotation:
            tensors["pre_rotation"] = torch.bfloat16, (k // b, b, b)
        if self.permute:
            tensors["permutation"] = torch.int64, (k,)
        if self.rotation == "matrix":
            tensors["rotation"] = torch.bfloat16, (k // b, b, b)
        if self.output_rotation == "matrix":
            b = self.output_rotation_block
            tensors["output_rotation"] = torch.bfloat16, (n // b, b, b)
        return tensors

    def problem(self, dtype: torch.dtype, tokens: Workload = USUAL_TOKENS) -> Problem:
        """What a backend is told of the layer, in a host that computes in `dtype` on so many `tokens`."""
        restored = self.output_rotation in ("hadamard", "matrix")
        return Problem(
            out_features=self.out_features,
            in_features=self.in_features,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            scale_groups=self.in_features // (self.group_size or self.in_features),
            output_rotation=self.output_rotation if restored else "none",
            output_block=self.output_rotation_block if restored else 0,
            dtype=dtype,
            input_rotation=self.rotation,
            input_block=self.rotation_block,
            tokens=tokens,
        )
