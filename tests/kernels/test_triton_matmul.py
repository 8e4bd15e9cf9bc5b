"""The Triton matmul against integers of 64 bits; without a GPU in Triton's interpreter."""

import math

import pytest
import torch
from torch import Tensor

from openpi_duquant import packing
from openpi_duquant.kernels import reference
from openpi_duquant.kernels import tiles
from openpi_duquant.kernels import transform
from openpi_duquant.kernels import triton_matmul
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.tiles import Tile

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
SHAPES = [(1, 64, 16), (3, 192, 40), (17, 200, 64), (33, 96, 136)]
SMALL = Tile(16, 32, 32, 2, 4, 2)
INT8_SMALL = Tile(16, 32, 64, 1, 4, 2)


def problem(bits: int) -> Problem:
    """A layer with weights of that many bits."""
    return Problem(64, 64, bits, 8, 1, "none", 0, torch.bfloat16)


def operands(m: int, k: int, n: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes over their full range, both ends among them, and scales."""
    low, high = (-8, 8) if bits == 4 else (-128, 128)
    a, w = torch.randint(-127, 128, (m, k)), torch.randint(low, high, (n, k))
    a[0, :2], w[0, :2], w[-1, -2:] = torch.tensor([-127, 127]), torch.tensor([low, high - 1]), low
    return a.to(DEVICE), w.to(DEVICE), torch.rand(m, 1, device=DEVICE) + 0.5, torch.rand(n, 1, device=DEVICE) + 0.5


def run(a: Tensor, w: Tensor, bits: int, scales: tuple[Tensor, Tensor], dtype: torch.dtype, **given: object) -> Tensor:
    """Launches the kernel into a poisoned output."""
    from openpi_duquant.kernels import matmul_triton  # noqa: PLC0415

    out = torch.full((len(a), len(w) // (2 if given.get("geglu") else 1)), torch.nan, dtype=dtype, device=DEVICE)
    weight = triton_matmul.repack(problem(bits), packing.pack(w.to(torch.int8), bits))
    options = dict.fromkeys(("bias", "matrices", "cos", "sin", "residual", "gate")) | {"hadamard": 0} | given
    tile = SMALL if bits == 4 else INT8_SMALL
    matmul_triton.launch(out, a.to(torch.int8), scales[0], weight, scales[1], tile=tile, interpreted=not GPU, **options)
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_repacking_keeps_every_code(bits: int) -> None:
    low = -(2 ** (bits - 1))
    packed = packing.pack(torch.randint(low, -low, (5, 24)).to(torch.int8), bits)
    repacked = triton_matmul.repack(problem(bits), packed)
    assert torch.equal(triton_matmul.canonical(problem(bits), repacked), packed)


def test_a_repacked_byte_holds_channels_half_a_row_apart() -> None:
    codes = torch.tensor([[-8, 1, 2, 3, 4, 5, 6, 7]], dtype=torch.int8)
    assert triton_matmul.repack(problem(4), packing.pack(codes, 4)).tolist() == [[0x48, 0x51, 0x62, 0x73]]


@pytest.mark.triton
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_sums_are_exact(m: int, k: int, n: int, bits: int) -> None:
    torch.manual_seed(0)
    a, w, _, _ = operands(m, k, n, bits)
    ones = torch.ones(m, 1, device=DEVICE), torch.ones(n, 1, device=DEVICE)
    expected = (a.double() @ w.double().T).long()  # below 2^24, so that fp32 holds every one of them
    assert expected.abs().max() < 2**24
    for _ in range(3):
        assert torch.equal(run(a, w, bits, ones, torch.float32).long(), expected)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "extra", ["none", "bias", "hadamard", "matrices", "matrices in another order", "residual", "gated"]
)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 32), (17, 200, 64)])
def test_the_epilogue_is_the_formula(m: int, k: int, n: int, extra: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    a, w, act_scale, weight_scale = operands(m, k, n, 4)
    scales = act_scale * 0.01, weight_scale * 0.01
    y = (a.double() @ w.double().T) * scales[0].double() * scales[1].double().T
    bias, gate = torch.randn(n, device=DEVICE), torch.randn(n, device=DEVICE)
    residual = torch.randn(m, n, device=DEVICE).to(dtype)
    matrices = torch.linalg.qr(torch.randn(n // 16, 16, 16))[0].bfloat16().contiguous().to(DEVICE)
    given: dict[str, object] = {}
    if extra == "bias":
        given, y = {"bias": bias}, y + bias
    if extra == "hadamard":
        signs = [[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
        block = torch.tensor(signs, dtype=torch.float64, device=DEVICE) / 32**0.5
        given, y = {"hadamard": 32}, torch.cat([part @ block for part in y.split(32, 1)], 1)
    if extra.startswith("matrices"):
        given = {"matrices": matrices if extra == "matrices" else matrices.mT.contiguous().mT}
        y = torch.cat([part @ matrix.double() for part, matrix in zip(y.split(16, 1), matrices, strict=True)], 1)
    if extra == "residual":
        given, y = {"residual": residual}, y + residual
    if extra == "gated":
        given, y = {"residual": residual, "gate": gate}, y * gate + residual
    actual = run(a, w, 4, scales, dtype, **given)
    error = (actual.double() - y).abs().max() / y.abs().max()
    assert error < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # the interpreter's, of gates far below zero
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_geglu_is_that_of_the_transform_after_it(
    m: int, k: int, n: int, bits: int, dtype: torch.dtype, *, biased: bool
) -> None:
    from openpi_duquant.kernels import transform_triton  # noqa: PLC0415

    torch.manual_seed(2)
    a, w, act_scale, weight_scale = operands(m, k, n, bits)
    bias = torch.randn(n, device=DEVICE) if biased else None
    given = a, w, bits, (act_scale / 100, weight_scale / (10 if bits == 4 else 100)), dtype
    y, gated = run(*given, bias=bias), run(*given, bias=bias, geglu=True)

    def rounded(x: Tensor, *, geglu: bool) -> tuple[Tensor, ...]:
        outputs = transform.empty(x, m, n // 2)
        nothing = None, None, None, None, 0
        transform_triton.launch(x, *nothing, outputs, geglu=geglu, norm=False, float32=True)
        return outputs

    for actual, wanted in zip(rounded(gated, geglu=False), rounded(y, geglu=True), strict=True):
        assert torch.equal(actual, wanted)
    gate, up = y.double().chunk(2, dim=1)
    expected = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up
    assert (gated.double() - expected).abs().max() < 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_matmul_with_geglu_leaves_the_rest_to_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    y, residual, gate, angles = torch.randn(3, 64), torch.randn(3, 32), torch.randn(32), torch.randn(2, 3, 16)
    launched = []

    def operator(*given: object) -> Tensor:
        launched.append(given[-2])
        return reference.gated(y) if given[-2] else y

    monkeypatch.setattr(torch.ops.openpi_duquant, "triton_matmul", operator)
    given = torch.zeros(3, 8), None, y, None, None
    for epilogue, rotation, fused in (
        (Epilogue(geglu=True), None, True),
        (Epilogue(geglu=True), 16, False),
        (Epilogue(geglu=True, residual=residual, gate=gate), None, False),
        (Epilogue(geglu=True, rotary=tuple(angles)), None, False),
    ):
        actual = triton_matmul.matmul(*given, rotation, torch.float32, epilogue=epilogue)
        assert torch.equal(actual, epilogue.apply(y))
        assert launched.pop() == fused


@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 968, 5000])
@pytest.mark.parametrize(("n", "k"), [(2560, 2048), (33, 70), (32768, 2048)])
def test_every_shape_has_a_tile(m: int, n: int, k: int) -> None:
    for architecture in ("sm_90", "sm_80"):
        tile = tiles.tile_for(architecture, m, n, k, bits=4)
        assert all(size & (size - 1) == 0 and size >= 16 for size in tile[:3])


def test_measured_tiles_are_used_up_to_their_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"sm_90": {"W4 64x128": {"32": [32, 64, 128, 1, 4, 3]}}}
    monkeypatch.setattr(tiles, "_measured", lambda: measured)
    assert tiles.tile_for("sm_90", 32, 64, 128, bits=4) == Tile(32, 64, 128, 1, 4, 3)
    assert tiles.tile_for("sm_90", 17, 64, 128, bits=4) == Tile(32, 64, 128, 1, 4, 3)
    for other in [("sm_90", 33, 64, 128, 4), ("sm_90", 16, 64, 128, 4), ("sm_80", 32, 64, 128, 4)]:
        assert tiles.tile_for(*other) == tiles.by_rule(other[1], 64, 64)
    assert tiles.tile_for("sm_90", 32, 64, 128, bits=8) == tiles.by_rule(32, 64, 128)
