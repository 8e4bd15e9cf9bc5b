"""The greedy rotation, and whole transforms; zigzag and singular vectors are tested with `transforms`."""

import itertools
import math

import pytest
import torch

from openpi_duquant import fitting


@pytest.mark.parametrize("block", [2, 16, 64])
def test_greedy_rotations_are_orthogonal(block: int) -> None:
    rotation = fitting.greedy_rotation(torch.randn(40, 128), block)
    assert rotation.shape == (128 // block, block, block)
    identity = torch.eye(block, dtype=torch.float64).expand_as(rotation)
    torch.testing.assert_close(rotation @ rotation.mT, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channel", [0, 5, 15])
def test_one_greedy_step_spreads_a_lone_outlier_evenly(channel: int) -> None:
    samples = torch.zeros(3, 16)
    samples[1, channel] = 8.0
    rotation = fitting.greedy_rotation(samples, 16, steps=1)
    spread = samples[1].double() @ rotation[0]
    torch.testing.assert_close(spread.abs(), torch.full((16,), 8.0 / math.sqrt(16), dtype=torch.float64))


def test_every_block_has_its_own_greedy_rotation() -> None:
    samples = torch.randn(64, 32)
    samples[:, 3] *= 30
    samples[:, 20] *= 30
    rotation = fitting.greedy_rotation(samples, 16)
    assert not torch.allclose(rotation[0], rotation[1])
    for block, part in enumerate(samples.double().split(16, dim=1)):
        assert (part @ rotation[block]).abs().max() < 0.5 * part.abs().max()


def test_more_greedy_steps_are_never_worse() -> None:
    samples = torch.randn(100, 32) * torch.rand(32).exp()
    samples[:, 7] *= 20
    peaks = []
    for steps in (0, 1, 4, 64):
        rotation = fitting.greedy_rotation(samples, 32, steps=steps)[0]
        peaks.append((samples.double() @ rotation).abs().max().item())
    assert peaks[0] == samples.abs().max()
    assert all(later <= earlier + 1e-5 for earlier, later in itertools.pairwise(peaks))
    assert peaks[-1] < 0.5 * peaks[0]


def test_greedy_rotation_looks_at_the_rows_with_the_largest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.randn(500, 16) * 0.1
    samples[490:, 4] = 10.0
    monkeypatch.setattr(fitting, "GREEDY_SAMPLES", 10)
    rotation = fitting.greedy_rotation(samples, 16)[0]
    assert (samples.double() @ rotation).abs().max() < 5.0


@pytest.mark.parametrize("rotation", ["hadamard", "svd", "duquant", "none"])
@pytest.mark.parametrize("permute", [False, True])
def test_a_transform_and_its_dual_leave_the_product_alone(rotation: str, *, permute: bool) -> None:
    x, weight = torch.randn(7, 96), torch.randn(33, 96)
    weight[:, 11] *= 20
    transform = fitting.fit_transform(weight, rotation, 32, permute=permute, smoothing=0.15)
    product = transform.apply(x) @ transform.dual().apply(weight).T
    torch.testing.assert_close(product, x @ weight.T, rtol=1e-5, atol=1e-4)
    assert (transform.permutation is not None) == permute
    assert (transform.pre_rotation is not None) == (permute and rotation == "duquant")
    assert (transform.rotation is not None) == (rotation != "none")


@pytest.mark.parametrize("rotation", ["hadamard", "duquant"])
def test_rotations_that_spread_shrink_the_largest_value(rotation: str) -> None:
    weight = torch.randn(200, 128)
    weight[:, [3, 70]] *= 30
    transform = fitting.fit_transform(weight, rotation, 64, permute=True, smoothing=0.0)
    assert transform.dual().apply(weight).abs().max() < 0.5 * weight.abs().max()


@pytest.mark.parametrize("kind", ["svd", "duquant"])
def test_matrices_are_stored_in_bfloat16(kind: str) -> None:
    transform = fitting.fit_transform(torch.randn(20, 32), kind, 16, permute=True, smoothing=0.15)
    assert isinstance(transform.rotation, torch.Tensor)
    assert transform.rotation.dtype == torch.bfloat16
