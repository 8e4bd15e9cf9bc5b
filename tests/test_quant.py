"""Rounding to integers against brute force in fp64."""

import pytest
import torch
from torch import Tensor

from openpi_duquant import quant

RANGES = {4: (-8, 7), 8: (-128, 127)}
RATIOS = [1 - 0.025 * step for step in range(25)]


def squared_errors(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Of every row, in fp64."""
    weight, scale = weight.double(), scale.double()
    return ((weight / scale).round().clamp(*RANGES[bits]) * scale - weight).square().sum(1, keepdim=True)


def heavy_tailed(rows: int, columns: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns) * torch.randn(rows, columns).mul(0.7).exp()


@pytest.mark.parametrize("bits", [4, 8])
def test_code_range_is_twos_complement(bits: int) -> None:
    assert quant.code_range(bits) == RANGES[bits]


@pytest.mark.parametrize("search", ["mse", "max"])
@pytest.mark.parametrize("group_size", [None, 8, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_positive_even_of_zero_rows(bits: int, group_size: int | None, search: str) -> None:
    weight = heavy_tailed(5, 24)
    weight[2] = 0
    weight[3, :8] = 0
    weight[4] *= 1e-30
    scale = quant.weight_scale(weight.bfloat16(), bits, group_size, search)
    assert scale.dtype == torch.float32
    assert scale.shape == (5, 24 // (group_size or 24))
    assert (scale > 0).all()
    assert not quant.quantize_weight(weight, scale, bits)[2].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_max_search_maps_the_largest_weight_to_the_largest_code(bits: int) -> None:
    weight = heavy_tailed(17, 40)
    scale = quant.weight_scale(weight, bits, search="max")
    codes = quant.quantize_weight(weight, scale, bits)
    torch.testing.assert_close(scale[:, 0], weight.abs().amax(1) / RANGES[bits][1], rtol=1e-6, atol=0)
    assert (codes.abs().amax(1) == RANGES[bits][1]).all()
    error = (quant.dequantize_weight(codes, scale) - weight).abs()
    assert (error <= scale / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize(("bits", "rows", "columns"), [(4, 300, 1024), (8, 40, 100), (4, 3, 7), (8, 1, 300_000)])
def test_mse_search_finds_the_best_of_all_ratios(bits: int, rows: int, columns: int) -> None:
    weight = heavy_tailed(rows, columns)
    scale = quant.weight_scale(weight, bits, search="mse")
    largest = weight.abs().amax(1, keepdim=True) / RANGES[bits][1]
    errors = torch.cat([squared_errors(weight, largest * ratio, bits) for ratio in RATIOS], dim=1)
    chosen = squared_errors(weight, scale, bits)
    assert (chosen <= errors.amin(1, keepdim=True) * (1 + 1e-4)).all()
    nearest = (scale / largest - torch.tensor(RATIOS)).abs().amin(1)
    assert (nearest < 1e-5).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_search_is_never_worse_than_max_and_often_better(bits: int) -> None:
    weight = heavy_tailed(50, 256)
    least, most = (squared_errors(weight, quant.weight_scale(weight, bits, None, s), bits) for s in ("mse", "max"))
    assert (least <= most * (1 + 1e-6)).all()
    assert bits == 8 or (least < 0.95 * most).float().mean() > 0.5


def test_mse_search_reaches_the_lowest_code() -> None:
    codes = torch.tensor([[-8, 7, 3, -5, 0, 1, -8, 6]])
    weight = codes * 0.3
    scale = quant.weight_scale(weight, 4)
    assert quant.quantize_weight(weight, scale, 4).tolist() == codes.tolist()
    assert scale.item() == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("search", ["mse", "max"])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_rows_of_their_own(bits: int, search: str) -> None:
    weight = heavy_tailed(9, 48)
    grouped = quant.weight_scale(weight, bits, 16, search)
    as_rows = quant.weight_scale(weight.reshape(27, 16), bits, None, search)
    assert torch.equal(grouped, as_rows.reshape(9, 3))
    codes = quant.quantize_weight(weight, grouped, bits)
    assert torch.equal(codes, quant.quantize_weight(weight.reshape(27, 16), as_rows, bits).reshape(9, 48))
    for row in range(9):
        for channel in range(48):
            value = codes[row, channel].item() * grouped[row, channel // 16].item()
            assert quant.dequantize_weight(codes, grouped)[row, channel].item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_comes_back_and_others_are_clamped(bits: int) -> None:
    low, high = RANGES[bits]
    codes = torch.arange(low, high + 1, dtype=torch.int8).view(1, -1)
    scale = torch.tensor([[0.25]])
    quantized = quant.quantize_weight(codes * 0.25, scale, bits)
    assert quantized.dtype == torch.int8
    assert torch.equal(quantized, codes)
    assert torch.equal(quant.dequantize_weight(codes, scale), codes * 0.25)
    beyond = torch.tensor([[low - 1.0, high + 1.0, low - 1e6, high + 1e6]]) * 0.25
    assert quant.quantize_weight(beyond, scale, bits).tolist() == [[low, high, low, high]]


def test_weights_round_ties_to_even() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert quant.quantize_weight(weight, torch.ones(1, 1), 4).tolist() == [[0, 2, 2, 0, -2, -2]]


def test_activations_round_ties_to_even() -> None:
    codes, scale = quant.quantize_activation(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]]))
    assert scale.tolist() == [[1.0]]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -126]]


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 3e38])
def test_activations_use_their_own_range_to_both_ends(magnitude: float) -> None:
    torch.manual_seed(1)
    x = torch.rand(64, 33) * 2 - 1
    x *= magnitude * torch.linspace(0.01, 1, 64).unsqueeze(1)
    codes, scale = quant.quantize_activation(x)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (64, 1))
    assert (codes.int().abs().amax(1) == 127).all()
    assert (codes.min().item(), codes.max().item()) == (-127, 127)
    assert ((codes.double() * scale.double() - x.double()).abs() <= scale.double() / 2 * (1 + 1e-5)).all()


def test_a_token_is_rounded_by_itself() -> None:
    torch.manual_seed(2)
    x = torch.randn(5, 20) * torch.tensor([[1.0], [1000], [0], [1e-3], [7]])
    codes, scale = quant.quantize_activation(x)
    for row in range(5):
        own_codes, own_scale = quant.quantize_activation(x[row : row + 1])
        assert torch.equal(own_codes[0], codes[row])
        assert torch.equal(own_scale[0], scale[row])
    assert scale[2].item() == 1
    assert not codes[2].any()


def test_a_token_too_small_to_divide_keeps_a_positive_scale() -> None:
    codes, scale = quant.quantize_activation(torch.tensor([[1e-44, 0.0, -3e-45]]))
    assert scale.item() > 0
    assert codes[0, 1].item() == 0


def test_fake_quantization_is_codes_times_scale() -> None:
    x = torch.tensor([[254.0, 3.0, -5.0, 1.1], [0.0, 0.0, 0.0, 0.0]])
    assert quant.fake_quantize_activation(x).tolist() == [[254.0, 4.0, -4.0, 2.0], [0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("width", [64, 1024, 8192])
def test_the_error_of_gaussian_rows_is_as_computed(width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2**22 // width, width)
    measured = ((quant.fake_quantize_activation(x) - x).norm() / x.norm()).item()
    assert quant.gaussian_int8_error(width) == pytest.approx(measured, rel=0.015)
