"""Permutations, rotations and their choice (`fitting`) against explicit matrices and plain loops."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

from openpi_duquant import fitting
from openpi_duquant import transforms


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix, normalised: entry (i, j) has the sign of popcount(i & j)."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) * size**-0.5


def block_by_block(x: Tensor, matrices: Tensor) -> Tensor:
    size = matrices.shape[-1]
    spans = [slice(start, start + size) for start in range(0, x.shape[-1], size)]
    return torch.cat([x[..., span].double() @ matrix.double() for span, matrix in zip(spans, matrices)], dim=-1)


def nearly_orthogonal(blocks: int, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(blocks, size, size, dtype=torch.float64)).Q.bfloat16()


def assert_orthogonal(matrices: Tensor) -> None:
    identity = torch.eye(matrices.shape[-1], dtype=torch.float64).expand_as(matrices)
    torch.testing.assert_close(matrices.mT @ matrices, identity, rtol=0, atol=1e-12)


def snake(energy: list[float], block: int) -> list[int]:
    order = sorted(range(len(energy)), key=lambda channel: -energy[channel])
    count = len(energy) // block
    dealt: list[list[int]] = [[] for _ in range(count)]
    for turn in range(block):
        towards = range(count) if turn % 2 == 0 else reversed(range(count))
        for target, channel in zip(towards, order[turn * count : (turn + 1) * count]):
            dealt[target].append(channel)
    return [channel for block_channels in dealt for channel in block_channels]


def test_zigzag_deals_the_published_snake() -> None:
    energy = torch.tensor([5.0, 11, 1, 8, 12, 3, 10, 2, 7, 4, 9, 6])
    permutation = fitting.zigzag_permutation(energy, 3)
    assert permutation.tolist() == [4, 0, 9, 1, 11, 5, 6, 8, 7, 10, 3, 2]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_zigzag_deals_every_channel_once_and_equals_by_index(block: int, blocks: int, data: st.DataObject) -> None:
    count = block * blocks
    energy = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    permutation = fitting.zigzag_permutation(torch.tensor(energy, dtype=torch.float64), block).tolist()
    assert sorted(permutation) == list(range(count))
    assert permutation == snake(energy, block)


def test_zigzag_brings_the_energies_of_blocks_together() -> None:
    torch.manual_seed(0)
    energy = torch.rand(512, dtype=torch.float64) + 0.1
    energy[100:132] *= 20  # outliers are neighbours
    before = energy.view(-1, 16).sum(1)
    after = energy[fitting.zigzag_permutation(energy, 16)].view(-1, 16).sum(1)
    assert after.std() < before.std() / 5
    assert after.max() - after.min() <= energy.max() < before.max() - before.min()


@pytest.mark.parametrize("smoothing", [0.0, 0.15, 0.9, 1.0])
def test_energy_is_the_mean_square_mixed_with_its_mean(smoothing: float) -> None:
    weight = torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, 0.0]])
    expected = [(1 - smoothing) * energy + smoothing * 5.0 for energy in (5.0, 10.0, 0.0)]
    energy = fitting.channel_energy(weight, smoothing)
    assert energy.tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("smoothing", [0.15, 0.5, 0.99])
def test_smoothing_below_one_changes_no_permutation(smoothing: float) -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 256) * torch.randn(256).exp()
    plain = fitting.zigzag_permutation(fitting.channel_energy(weight), 16)
    assert torch.equal(fitting.zigzag_permutation(fitting.channel_energy(weight, smoothing), 16), plain)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (5, 48), (2, 3, 48)])
@pytest.mark.parametrize("size", [1, 6, 16, 48])
def test_rotate_multiplies_every_block_by_its_matrix(shape: tuple[int, ...], size: int) -> None:
    torch.manual_seed(2)
    x, matrices = torch.randn(shape, dtype=torch.float64), torch.randn(48 // size, size, size, dtype=torch.float64)
    torch.testing.assert_close(transforms.rotate(x, matrices), block_by_block(x, matrices), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_a_number_means_hadamard_blocks(size: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(2, 3, 3 * size, dtype=torch.float64)
    expected = block_by_block(x, hadamard(size).expand(3, -1, -1))
    torch.testing.assert_close(transforms.rotate(x, size), expected, rtol=0, atol=1e-12)


def test_hadamard_takes_a_transposed_input() -> None:
    x = torch.arange(32.0, dtype=torch.float64).view(8, 4).T
    torch.testing.assert_close(transforms.rotate(x, 8), x @ hadamard(8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("rotation", [None, 4, torch.eye(4).expand(2, 4, 4)], ids=["none", "hadamard", "matrices"])
def test_rotate_keeps_shape_and_dtype(dtype: torch.dtype, rotation: transforms.Rotation) -> None:
    rotated = transforms.rotate(torch.ones(3, 8, dtype=dtype), rotation)
    assert (rotated.shape, rotated.dtype) == ((3, 8), dtype)


def test_a_transform_rotates_permutes_and_rotates() -> None:
    torch.manual_seed(8)
    x, first, last = torch.randn(4, 12).double(), torch.randn(3, 4, 4).double(), torch.randn(2, 6, 6).double()
    order = torch.randperm(12)
    shuffled = torch.stack([block_by_block(x, first)[:, channel] for channel in order.tolist()], dim=1)
    transformed = transforms.Transform(first, order, last).apply(x)
    torch.testing.assert_close(transformed, block_by_block(shuffled, last), rtol=0, atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("kind", ["none", "hadamard", "rounded", "skew"])
def test_the_dual_keeps_the_product(kind: str, *, permuted: bool, before: bool) -> None:
    torch.manual_seed(4)
    skew = torch.eye(16) + 0.1 * torch.randn(6, 16, 16)
    rotation = {"none": None, "hadamard": 32, "rounded": nearly_orthogonal(6, 16), "skew": skew}[kind]
    order = torch.randperm(96) if permuted else None
    transform = transforms.Transform(nearly_orthogonal(12, 8) if before else None, order, rotation)
    x, weight = torch.randn(9, 96), torch.randn(40, 96)
    transformed, exact = transform.apply(x), x.double() @ weight.double().T
    assert (transformed @ transform.dual().apply(weight).T - exact).norm() < 1e-5 * exact.norm()
    assert torch.equal(transformed, x) == (kind == "none" and not permuted and not before)


@pytest.mark.parametrize("rotation", [None, 8, nearly_orthogonal(3, 8)], ids=["none", "hadamard", "rounded"])
def test_the_inverse_undoes(rotation: transforms.Rotation) -> None:
    x = torch.randn(7, 24, dtype=torch.float64)
    back = transforms.rotate(transforms.rotate(x, rotation), transforms.inverse(rotation))
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)


def test_rotate_rows_rotates_the_outputs_of_a_layer() -> None:
    torch.manual_seed(5)
    weight, bias = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    matrices = torch.randn(3, 4, 4, dtype=torch.float64)
    for rotation, explicit in ((matrices, matrices), (4, hadamard(4).expand(3, -1, -1))):
        rows, shift = transforms.rotate_rows(weight, rotation), transforms.rotate_rows(bias, rotation)
        assert rows.is_contiguous()
        torch.testing.assert_close(rows.T, torch.stack([block_by_block(column, explicit) for column in weight.T]))
        torch.testing.assert_close(shift, block_by_block(bias, explicit))


def test_singular_rotation_is_the_right_singular_vectors() -> None:
    rng = np.random.default_rng(6)
    weight = (rng.normal(size=(40, 24)) * np.geomspace(1, 30, 24)).astype(np.float32)
    rotation = fitting.singular_rotation(torch.from_numpy(weight), 8)
    assert_orthogonal(rotation)
    for index, vectors in enumerate(rotation.numpy()):
        block = weight[:, 8 * index : 8 * index + 8].astype(np.float64)
        _, values, rows = np.linalg.svd(block)
        np.testing.assert_allclose(np.abs(rows @ vectors), np.eye(8), rtol=0, atol=1e-8)
        np.testing.assert_allclose(np.linalg.norm(block @ vectors, axis=0), values, rtol=1e-10)
        assert (vectors[np.abs(vectors).argmax(0), np.arange(8)] > 0).all()


@pytest.mark.parametrize("weight", [torch.ones(3, 32), torch.zeros(5, 32)], ids=["few rows", "zeros"])
def test_singular_rotation_of_low_rank_is_orthogonal(weight: Tensor) -> None:
    assert_orthogonal(fitting.singular_rotation(weight, 16))


def test_a_wide_layer_is_rotated_as_its_parts_are() -> None:
    torch.manual_seed(7)
    weight = torch.randn(4096, 35 * 64)  # more than one chunk of 64 MB
    rotation = fitting.singular_rotation(weight, 64)
    for index in (0, 31, 32, 34):
        alone = fitting.singular_rotation(weight[:, 64 * index : 64 * index + 64], 64)
        torch.testing.assert_close(rotation[index], alone[0], rtol=0, atol=1e-9)


def test_greedy_rotations_are_orthogonal_and_lower_every_peak() -> None:
    torch.manual_seed(9)
    samples = torch.randn(300, 64)
    samples[:5, 37] = 100
    rotation = fitting.greedy_rotation(samples, 16)
    assert_orthogonal(rotation)
    before, after = (x.view(300, 4, 16).abs().amax((0, 2)) for x in (samples, block_by_block(samples, rotation)))
    assert (after < before).all()
    assert after[2] < before[2] / 3
    transform = fitting.fit_transform(samples, "duquant", 16, permute=True, smoothing=0.0)
    assert torch.equal(transform.pre_rotation, rotation.bfloat16())
    turned = block_by_block(samples, transform.pre_rotation)
    assert transform.permutation.tolist() == snake(turned.square().mean(0).tolist(), 16)
    assert transform.apply(samples).abs().max() < turned.abs().max()
