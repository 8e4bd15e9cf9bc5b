"""Permutations and block rotations of channels: x W^T stays what it was, outliers do not.

For y = x W^T with permutation p and block rotation R,

    x' = rotate(x[:, p], R)        W' = rotate(W[:, p], dual(R))        x' W'^T = x W^T

`dual(R)` is the inverse transpose of R. For an orthogonal R that is R itself; taking it of the values that are stored
(bf16, orthogonal only up to rounding) keeps the product exact. How p and R are chosen: see `fitting`.
"""

from collections.abc import Iterator
import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

_LARGEST_HADAMARD = 256  # multiplied by as a matrix

Rotation = Tensor | int | None
"""Matrices [K/B, B, B]; or the size B of a normalised Hadamard block; or no rotation."""


def as_operands(rotation: Rotation) -> tuple[Tensor | None, int]:
    """What an operator takes a rotation as: its matrices, or None, and the size of a Hadamard's block, or 0."""
    return (None, rotation) if isinstance(rotation, int) else (rotation, 0)


def full_precision(x: Tensor) -> contextlib.AbstractContextManager:
    """Keeps the host's autocast and reduced-precision matmuls (TF32; openpi allows them) out of the arithmetic."""
    if x.is_meta:
        return contextlib.nullcontext()
    if torch.compiler.is_compiling():
        return torch.autocast(x.device.type, enabled=False)
    return _eager_full_precision(x.device.type)


@contextlib.contextmanager
def _eager_full_precision(device_type: str) -> Iterator[None]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Multiplies every block of the last dimension by its matrix: x_b -> x_b R_b.

    Args:
        x: [..., K], floating point.
        rotation: See `Rotation`. Matrices are used in the dtype of x.

    Returns:
        [..., K], the dtype of x.
    """
    if rotation is None:
        return x
    with full_precision(x):
        if isinstance(rotation, int):
            return _hadamard(x, rotation)
        blocks, block, _ = rotation.shape
        by_block = x.reshape(-1, blocks, block).transpose(0, 1)
        return torch.bmm(by_block, rotation.to(x.dtype)).transpose(0, 1).reshape(x.shape)


def _hadamard(x: Tensor, block: int) -> Tensor:
    """The normalised Walsh-Hadamard transform of every block; H of a large block is the Kronecker product of two."""
    if block <= _LARGEST_HADAMARD:
        return (x.reshape(-1, block) @ hadamard_matrix(block, x)).reshape(x.shape)
    outer = block // _LARGEST_HADAMARD
    inner = _hadamard(x, _LARGEST_HADAMARD).reshape(-1, outer, _LARGEST_HADAMARD)
    return _hadamard(inner.mT.contiguous(), outer).mT.reshape(x.shape)


def hadamard_matrix(block: int, like: Tensor) -> Tensor:
    """Sylvester's matrix [block, block], normalised, of the dtype and on the device of `like`."""
    matrix = torch.full((1, 1), block**-0.5, dtype=like.dtype, device=like.device)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), dim=1), torch.cat((matrix, -matrix), dim=1)))
    return matrix


def rotate_rows(weight: Tensor, rotation: Rotation) -> Tensor:
    """Rotates the output channels [N] of a weight [N, K] or a bias [N]."""
    return rotate(weight.T.contiguous(), rotation).T.contiguous() if weight.ndim == 2 else rotate(weight, rotation)


def inverse(rotation: Rotation) -> Rotation:
    """The rotation that undoes this one (of the values as stored, in fp64); a Hadamard undoes itself."""
    return torch.linalg.inv(rotation.double()) if isinstance(rotation, Tensor) else rotation


def dual(rotation: Rotation) -> Rotation:
    """The rotation for the other side of the product: the inverse transpose (fp64)."""
    return inverse(rotation).mT.contiguous() if isinstance(rotation, Tensor) else rotation


class Transform(NamedTuple):
    """x -> rotate(rotate(x, pre_rotation)[..., permutation], rotation); a part that is None is left out.

    `pre_rotation` is there for the published DuQuant (rotate, permute, rotate) only.
    """

    pre_rotation: Rotation = None
    permutation: Tensor | None = None
    rotation: Rotation = None

    def apply(self, x: Tensor) -> Tensor:
        """Transforms the last dimension of x [..., K], floating point."""
        x = rotate(x, self.pre_rotation)
        if self.permutation is not None:
            x = x.index_select(-1, self.permutation)
        return rotate(x, self.rotation)

    def of_moment(self, moment: Tensor) -> Tensor:
        """E[y y^T] [K, K] of y = apply(x), from E[x x^T] [K, K] of the inputs: T^T H T for x -> x T."""
        return self.apply(self.apply(moment).T)

    def dual(self) -> "Transform":
        """The transform for the other side of the product: x W^T = apply(x) dual().apply(W)^T."""
        return Transform(dual(self.pre_rotation), self.permutation, dual(self.rotation))

    def inverse(self) -> "Transform":
        """The transform that undoes this one."""
        back = None if self.permutation is None else self.permutation.argsort()
        return Transform(inverse(self.rotation), back, inverse(self.pre_rotation))
