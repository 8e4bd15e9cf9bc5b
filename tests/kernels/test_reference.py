"""The CPU backends against integers of 64 bits and fp64 transforms."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from openpi_duquant import kernels
from openpi_duquant import packing
from openpi_duquant import transforms
from openpi_duquant.kernels import reference

BACKENDS = ("reference", "fake")
RANGES = {4: (-8, 8), 8: (-128, 128)}
SHAPES = [(1, 30, 7), (3, 96, 33), (127, 4304, 5), (127, 96, 1), (3, 30, 24), (1, 4304, 24)]
MATMULS = [
    (shape, bits, groups, bias, rotation)
    for shape, bits, groups, bias, rotation in itertools.product(
        SHAPES, (4, 8), (1, 2), (True, False), ("none", "hadamard", "matrices")
    )
    if rotation == "none" or shape[2] % 8 == 0
]


def hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return matrix / len(matrix) ** 0.5


def codes(low: int, high: int, *shape: int) -> Tensor:
    """Every code of low..high - 1 alike often, both ends among them."""
    drawn = torch.randint(low, high, shape).to(torch.int8)
    drawn.view(-1)[:2] = torch.tensor([low, high - 1])
    return drawn


def as_int64(integers: Tensor) -> np.ndarray:
    return integers.numpy().astype(np.int64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "bits", "groups", "bias", "rotation"), MATMULS)
def test_matmul_is_the_integer_product_scaled_restored_and_shifted(
    backend: str, shape: tuple[int, int, int], bits: int, groups: int, *, bias: bool, rotation: str
) -> None:
    torch.manual_seed(0)
    m, k, n = shape
    a, weight = codes(-127, 128, m, k), codes(*RANGES[bits], n, k)
    act_scale, weight_scale = torch.rand(m, 1) + 0.01, torch.rand(n, groups) + 0.01
    shift = torch.randn(n) * 100 if bias else None
    matrices = torch.randn(n // 4, 4, 4)
    output_rotation = {"none": None, "hadamard": 8, "matrices": matrices}[rotation]
    blocks = {"none": [np.eye(n)], "hadamard": [hadamard(8)] * (n // 8), "matrices": list(matrices.double().numpy())}

    width = k // groups
    exact, magnitude = np.zeros((m, n)), np.zeros((m, n))
    for group in range(groups):
        span = slice(group * width, (group + 1) * width)
        left, right = as_int64(a[:, span]), as_int64(weight[:, span]).T
        scale = act_scale.double().numpy() * weight_scale[:, group].double().numpy()
        exact += (left @ right) * scale
        magnitude += (abs(left) @ abs(right)) * scale
    start = 0
    for block in blocks[rotation]:
        span = slice(start, start := start + len(block))
        exact[:, span], magnitude[:, span] = exact[:, span] @ block, magnitude[:, span] @ abs(block)
    if shift is not None:
        exact, magnitude = exact + shift.double().numpy(), magnitude + abs(shift.double().numpy())

    packed = packing.pack(weight, bits)
    y = kernels.BACKENDS[backend].matmul(a, act_scale, packed, weight_scale, shift, output_rotation, torch.float32)
    assert y.dtype == torch.float32
    assert y.shape == (m, n)
    assert (abs(y.double().numpy() - exact) <= 1e-6 * magnitude).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_is_rounded_once_to_its_type(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    a, weight = codes(-127, 128, 5, 64), codes(-8, 8, 6, 64)
    scale, shift = torch.rand(6, 1) / 100, torch.randn(6)
    exact = as_int64(a) @ as_int64(weight).T * scale.double().numpy().T + shift.double().numpy()
    y = kernels.BACKENDS[backend].matmul(a, torch.ones(5, 1), packing.pack(weight, 4), scale, shift, None, dtype)
    assert y.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    assert (abs(y.double().numpy() - exact) <= half_ulp * abs(exact) + 2e-5).all()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_an_activation_scale_only_weights_are_integers(
    dtype: torch.dtype, backend: str, bits: int, groups: int
) -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(3, 96).to(dtype), codes(*RANGES[bits], 7, 96)
    weight_scale, shift = torch.rand(7, groups) + 0.01, torch.randn(7).to(dtype)
    scales = np.repeat(weight_scale.double().numpy(), 96 // groups, axis=1)
    values = as_int64(weight) * scales
    exact = x.double().numpy() @ values.T + shift.double().numpy()
    y = kernels.BACKENDS[backend].matmul(x, None, packing.pack(weight, bits), weight_scale, shift, None, torch.float32)
    assert (abs(y.double().numpy() - exact) <= 1e-6 * (abs(x.double().numpy()) @ abs(values.T) + 10)).all()


@pytest.mark.parametrize("k", [1, 1032, 1033, 1034, 4304, 16384])
@pytest.mark.parametrize(("left", "right"), [(127, -128), (-127, -128), (127, 127), (127, -8), (-127, 7)])
def test_accumulators_are_exact_at_the_extremes(k: int, left: int, right: int) -> None:
    a, weight = torch.full((2, k), left, dtype=torch.int8), torch.full((3, k), right, dtype=torch.int8)
    a[:, 0], weight[:, 0] = 1, 1  # makes the sum odd where the rest is even: no float of 24 bits holds it
    accumulators = reference.integer_matmul(a, weight)
    assert accumulators.dtype == torch.int32
    assert accumulators.tolist() == [[(k - 1) * left * right + 1] * 3] * 2


@pytest.mark.parametrize("k", [255, 1031, 4304, 16384])
def test_accumulators_of_random_codes_are_exact(k: int) -> None:
    torch.manual_seed(3)
    a, weight = codes(-127, 128, 2, 5, k), codes(-128, 128, 2, 4, k)
    expected = as_int64(a) @ as_int64(weight).transpose(0, 2, 1)
    assert reference.integer_matmul(a, weight).tolist() == expected.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_of_extremes_as_wide_as_pi05_is_exact(backend: str, sign: int) -> None:
    a = torch.full((3, 16384), 127 * sign, dtype=torch.int8)
    packed = torch.full((5, 8192), 0x88, dtype=torch.uint8)  # -8, -8
    y = kernels.BACKENDS[backend].matmul(a, torch.ones(3, 1), packed, torch.ones(5, 1), None, None, torch.float32)
    assert y.tolist() == [[-8.0 * 127 * sign * 16384] * 5] * 3


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_rows(backend: str, groups: int) -> None:
    packed = torch.zeros(5, 8, dtype=torch.uint8)
    a, act_scale = torch.zeros(0, 16, dtype=torch.int8), torch.ones(0, 1)
    y = kernels.BACKENDS[backend].matmul(a, act_scale, packed, torch.ones(5, groups), None, None, torch.float32)
    assert y.shape == (0, 5)


@pytest.mark.parametrize("rotation", [None, 4, torch.empty(3, 4, 4, device="meta")], ids=["none", "hadamard", "matrix"])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_tensors_give_shape_and_dtype(
    backend: str, groups: int, bits: int, activation_bits: int, rotation: Tensor | int | None
) -> None:
    with torch.device("meta"):
        packed = torch.empty(12, 16, dtype=torch.uint8) if bits == 4 else torch.empty(12, 32, dtype=torch.int8)
        a, act_scale = torch.empty(3, 32, dtype=torch.int8), torch.empty(3, 1)
        if activation_bits == 16:
            a, act_scale = torch.empty(3, 32), None
        y = kernels.BACKENDS[backend].matmul(
            a, act_scale, packed, torch.empty(12, groups), torch.empty(12), rotation, torch.half
        )
    assert (y.shape, y.dtype, y.device.type) == ((3, 12), torch.half, "meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotation", ["none", "hadamard", "matrices"])
def test_an_activation_is_transformed_in_fp32_before_it_is_rounded(rotation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, matrices, order = torch.randn(50, 16).to(dtype), torch.randn(4, 4, 4).bfloat16(), torch.randperm(16)
    given = {"none": None, "hadamard": 8, "matrices": matrices}[rotation]
    blocks = {"none": [torch.eye(16)], "hadamard": [hadamard(8)] * 2, "matrices": list(matrices)}[rotation]
    wide = torch.block_diag(*[torch.as_tensor(block, dtype=torch.float64) for block in blocks])
    exact = torch.stack([x[:, channel].double() for channel in order.tolist()], dim=1) @ wide
    steps, scale = reference.transform_and_quantize(x, transforms.Transform(None, order, given))
    assert (steps.dtype, scale.dtype) == (torch.int8, torch.float32)
    torch.testing.assert_close(scale.double(), exact.abs().amax(1, keepdim=True) / 127, rtol=1e-6, atol=0)
    assert ((steps * scale.double() - exact).abs() <= 0.5001 * scale).all()
