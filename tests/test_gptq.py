"""GPTQ against its definition, solved step by step in fp64, and against rounding to nearest."""

import pytest
import torch
from torch import Tensor

from openpi_duquant import gptq
from openpi_duquant import quant
from openpi_duquant.config import DuQuantError


def correlated(samples: int, width: int, decay: float) -> Tensor:
    """Inputs [samples, width] whose variances along random directions fall with a power of their rank."""
    directions = torch.linalg.qr(torch.randn(width, width)).Q
    return torch.randn(samples, width) * torch.arange(1, width + 1) ** (-decay / 2) @ directions


def moment_of(x: Tensor) -> Tensor:
    return x.double().T @ x.double() / len(x)


def defined(weight: Tensor, scale: Tensor, bits: int, moment: Tensor, order: list[int]) -> Tensor:
    """Codes by the definition: whatever is not rounded yet is always the least-squares optimum, given what is."""
    weight, scale = weight.double(), scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    quantized, codes = weight.clone(), torch.zeros_like(weight)
    for done, k in enumerate(order):
        fixed, free = order[:done], order[done:]
        optimum = weight.clone()
        if fixed:
            error = (weight - quantized)[:, fixed]
            pull = torch.linalg.solve(moment[free][:, free], moment[free][:, fixed])
            optimum[:, free] += error @ pull.T
        codes[:, k] = (optimum[:, k] / scale[:, k]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        quantized[:, k] = codes[:, k] * scale[:, k]
    return codes


def errors(weight: Tensor, moment: Tensor, bits: int = 4) -> tuple[float, float]:
    """Squared output error of GPTQ and of rounding to nearest, on the same scales."""
    scale = quant.weight_scale(weight, bits)
    chained = gptq.gptq(weight, scale, bits, gptq.error_feedback(gptq.dampened(moment, 0.01)))
    results = []
    for codes in (chained, quant.quantize_weight(weight, scale, bits)):
        error = weight.double() - quant.dequantize_weight(codes, scale).double()
        results.append(torch.trace(error @ moment @ error.T).item())
    return results[0], results[1]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bits", [4, 8])
def test_of_uncorrelated_channels_every_code_is_the_nearest(bits: int, groups: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(33, 320)
    scale = quant.weight_scale(weight, bits, 320 // groups)
    feedback = gptq.error_feedback(torch.diag(torch.rand(320) + 0.1))
    assert torch.equal(gptq.gptq(weight, scale, bits, feedback), quant.quantize_weight(weight, scale, bits))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("width", "bits"), [(6, 4), (48, 4), (48, 8), (300, 4)])
def test_codes_are_those_of_the_definition(width: int, bits: int, groups: int) -> None:
    torch.manual_seed(1)
    weight, x = torch.randn(7, width), correlated(4 * width, width, 1.0) * (torch.rand(width) + 0.1)
    moment = moment_of(x)
    scale = quant.weight_scale(weight, bits, width // groups)
    order = sorted(range(width), key=lambda k: -moment[k, k].item())
    expected = defined(weight, scale, bits, moment, order)
    actual = gptq.gptq(weight, scale, bits, gptq.error_feedback(moment))
    assert actual.dtype == torch.int8
    # fp32 against fp64: a tie may fall to the other side, and what follows it with it
    rows = (actual.double() == expected).all(1)
    assert rows.float().mean() > 0.7
    assert ((actual.double() - expected).abs() <= 2).all()
    assert not torch.equal(actual, quant.quantize_weight(weight, scale, bits))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("decay", "bound"), [(0.0, 1.0), (1.0, 0.6), (2.0, 0.15)])
def test_the_error_of_outputs_is_below_that_of_the_nearest(decay: float, bound: float, seed: int) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(96, 192), correlated(2000, 192, decay)
    chained, nearest = errors(weight, moment_of(x))
    assert chained < bound * nearest


@pytest.mark.parametrize("width", [6, 300])
def test_the_error_to_expect_of_what_rounding_left_is_the_one_that_gptq_left(width: int) -> None:
    torch.manual_seed(7)
    weight, moment = torch.randn(7, width), moment_of(correlated(4 * width, width, 1.0))
    scale, feedback = quant.weight_scale(weight, 4), gptq.error_feedback(moment)
    error = weight - quant.dequantize_weight(gptq.gptq(weight, scale, 4, feedback), scale)
    factors = torch.linalg.cholesky(moment[feedback.order][:, feedback.order])
    left = error.double()[:, feedback.order] @ (factors / factors.diagonal())
    actual = gptq.error_to_expect(left[:, feedback.order.argsort()].float(), feedback)
    torch.testing.assert_close(actual, error, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
def test_the_error_to_expect_of_rounding_to_nearest_is_about_that_of_gptq(decay: float) -> None:
    torch.manual_seed(8)
    weight, x = torch.randn(200, 192), correlated(4000, 192, decay)
    scale, held_out = quant.weight_scale(weight, 4), moment_of(x[::2])
    for dampening in (0.01, 1.0):
        feedback = gptq.error_feedback(gptq.dampened(moment_of(x[1::2]), dampening))
        codes, nearest = gptq.gptq(weight, scale, 4, feedback), quant.quantize_weight(weight, scale, 4)
        actual, rounding = (weight - quant.dequantize_weight(of, scale) for of in (codes, nearest))
        expected = gptq.error_to_expect(rounding, feedback)
        actual, expected = (gptq.output_error(of, held_out).sum().item() for of in (actual, expected))
        assert actual == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("width", "bits"), [(6, 4), (48, 8), (300, 4)])
def test_descending_sets_every_code_to_the_best_given_the_others(width: int, bits: int, groups: int) -> None:
    torch.manual_seed(5)
    weight, moment = torch.randn(7, width), moment_of(correlated(4 * width, width, 1.0))
    scale = quant.weight_scale(weight, bits, width // groups)
    feedback = gptq.error_feedback(moment)
    codes = gptq.gptq(weight, scale, bits, feedback).double()
    wide = scale.double().repeat_interleave(width // groups, 1)
    low, high = quant.code_range(bits)
    for k in feedback.order.flip(0):
        pull = (weight.double() - codes * wide) @ moment[k] / moment[k, k]
        codes[:, k] = (codes[:, k] + pull / wide[:, k]).round().clamp(low, high)
    actual = gptq.gptq(weight, scale, bits, feedback, descend=True).double()
    assert (actual == codes).all(1).float().mean() > 0.7  # fp32 against fp64, as above
    assert ((actual - codes).abs() <= 2).all()


@pytest.mark.parametrize("seed", range(5))
def test_descending_and_fitted_scales_lessen_the_error(seed: int) -> None:
    torch.manual_seed(seed)
    weight, moment = torch.randn(96, 192), moment_of(correlated(2000, 192, 1.5)).float()
    scale, feedback = quant.weight_scale(weight, 4), gptq.error_feedback(moment)

    def row_errors(codes: Tensor, scale: Tensor) -> Tensor:
        return gptq.output_error(weight - quant.dequantize_weight(codes, scale), moment)

    plain = row_errors(gptq.gptq(weight, scale, 4, feedback), scale)
    descended = row_errors(gptq.gptq(weight, scale, 4, feedback, descend=True), scale)
    fitted = row_errors(*gptq.fitted_gptq(weight, scale, 4, feedback))
    assert (descended <= plain * (1 + 1e-4)).all()
    assert (fitted <= descended * (1 + 1e-4)).all()
    assert descended.sum() < 0.985 * plain.sum()
    assert fitted.sum() < 0.96 * descended.sum()


@pytest.mark.parametrize("groups", [1, 4])
def test_every_row_takes_the_scale_that_suits_it_best(groups: int) -> None:
    torch.manual_seed(6)
    weight, moment = torch.randn(50, 64), moment_of(correlated(500, 64, 1.0)).float()
    scale, feedback = quant.weight_scale(weight, 4, 64 // groups), gptq.error_feedback(moment)
    trials = [(gptq.gptq(weight, scale * ratio, 4, feedback, descend=True), scale * ratio) for ratio in (0.95, 1, 1.05)]
    errors = [gptq.output_error(weight - quant.dequantize_weight(*trial), moment) for trial in trials]
    best = torch.stack(errors).argmin(0)
    assert len(best.unique()) == 3
    codes, scales = gptq.fitted_gptq(weight, scale, 4, feedback)
    for row, trial in enumerate(best):
        assert torch.equal(scales[row], trials[trial][1][row])
        assert torch.equal(codes[row], trials[trial][0][row])


@pytest.mark.parametrize("dead", [range(5, 9), range(64)], ids=["some", "all"])
def test_channels_never_seen_are_rounded_to_nearest(dead: range) -> None:
    torch.manual_seed(2)
    weight, x = torch.randn(20, 64), correlated(500, 64, 1.0)
    x[:, list(dead)] = 0
    scale = quant.weight_scale(weight, 4)
    codes = gptq.gptq(weight, scale, 4, gptq.error_feedback(gptq.dampened(moment_of(x), 0.01)))
    assert torch.equal(codes[:, list(dead)], quant.quantize_weight(weight, scale, 4)[:, list(dead)])


def test_fewer_inputs_than_channels_are_enough() -> None:
    torch.manual_seed(3)
    chained, nearest = errors(torch.randn(20, 128), moment_of(correlated(10, 128, 1.0)))
    assert chained < 0.1 * nearest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_moment_that_is_not_finite_is_refused(value: float) -> None:
    moment = torch.eye(8)
    moment[3, 2] = value
    with pytest.raises(DuQuantError, match="NaN or Inf"):
        gptq.dampened(moment, 0.01)


def test_a_singular_moment_without_dampening_is_refused() -> None:
    with pytest.raises(DuQuantError, match="singular"):
        gptq.error_feedback(torch.ones(8, 8))


def test_dampening_adds_to_every_channel_its_own_share() -> None:
    moment = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    expected = torch.tensor([[6.0, 1.0], [1.0, 3.0]]).double()
    torch.testing.assert_close(gptq.dampened(moment, 0.5), expected, rtol=1e-5, atol=0)


def test_output_error_is_that_of_the_outputs() -> None:
    torch.manual_seed(4)
    x, error = torch.randn(50, 12), torch.randn(5, 12)
    expected = (x.double() @ error.double().T).square().mean(0)
    torch.testing.assert_close(gptq.output_error(error, moment_of(x)), expected)
