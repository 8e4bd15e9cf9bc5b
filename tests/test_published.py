"""Published methods, against their papers' definitions written out."""

import functools

import pytest
import structured
import torch
from torch import Tensor

from openpi_duquant import published
from openpi_duquant import quant
from openpi_duquant.accuracy import relative_error
from openpi_duquant.published import PUBLISHED

N, K, ROWS = 24, 256, 512


@pytest.fixture(scope="module")
def layer() -> tuple[Tensor, Tensor]:
    """A weight [N, K] and inputs [ROWS, K] with outlier channels and correlations."""
    torch.manual_seed(0)
    weight = structured.heavy_tailed(K, N).weight.detach()
    x = torch.cat(structured.structured_inputs(0, 11, 1.5)).reshape(-1, K)[:ROWS]
    return weight, x * (1 + 11 * (torch.arange(K) % 97 == 0))


@pytest.mark.parametrize("name", PUBLISHED)
def test_weight_and_inputs_are_transformed_alike_and_rounded_to_their_bits(
    name: str, layer: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = layer
    expected = x @ weight.T
    errors = {}
    for bits in (4, 8):
        monkeypatch.setattr(published, "BITS", bits)
        fitted = PUBLISHED[name](weight, x)
        assert max(len(row.unique()) for row in fitted.weight) <= min(2**bits, K)
        errors[bits] = relative_error(fitted.transform(x) @ fitted.weight.T, expected)
        codes, scale = quant.quantize_activation(fitted.transform(x))
        assert torch.equal(fitted(x), codes.float() * scale @ fitted.weight.T)
    assert errors[8] < 0.015
    assert 0.02 < errors[4] < 0.3


def test_textbook_gptq_is_algorithm_1(layer: tuple[Tensor, Tensor]) -> None:
    weight, x = layer
    fitted = published.textbook_gptq(weight, x)
    x = fitted.transform(x).double()
    left = torch.linalg.lstsq(x, layer[1].double() @ weight.double().T).solution.T  # the transformed weight
    scale = quant.weight_scale(left.float(), 4).double()
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(K)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    quantized = torch.zeros_like(left)
    for k in range(K):
        quantized[:, k : k + 1] = (left[:, k : k + 1] / scale).round().clamp(-8, 7) * scale
        left = left - (left - quantized)[:, k : k + 1] / factor[k, k] * factor[k]
    agree = (fitted.weight - quantized).abs() < 1e-4 * scale
    assert agree.double().mean() > 0.99  # the rest are ties, and what follows from them


def test_quarot_rotates_all_channels_at_once(layer: tuple[Tensor, Tensor]) -> None:
    weight, x = layer
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    matrix = functools.reduce(torch.kron, [pair] * 8)
    torch.testing.assert_close(published.quarot(weight, x).transform(x), x @ matrix)
    odd = published.quarot(weight[:, :192], x[:, :192]).transform(x[:, :192])
    torch.testing.assert_close(odd[:, :64], x[:, :64] @ functools.reduce(torch.kron, [pair] * 6))


def test_duquant_smooths_and_spreads_outliers(layer: tuple[Tensor, Tensor]) -> None:
    weight, x = layer
    fitted = published.released_duquant(weight, x)
    smooth = (x.abs().amax(0) / weight.abs().amax(0)).sqrt()
    torch.testing.assert_close(fitted.transform(x).norm(dim=1), (x / smooth).norm(dim=1))  # orthogonal afterwards
    largest = fitted.transform(x).abs().amax() / (x / smooth).abs().amax()
    assert largest < 0.75
