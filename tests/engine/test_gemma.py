"""Gemma's parts against the formulas written out."""

import math

import pytest
import torch

from openpi_duquant.architecture import TransformerSize
from openpi_duquant.engine import gemma
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.kernels.rotary import rotary

SIZE = TransformerSize(width=16, depth=2, mlp_dim=24, num_heads=3, head_dim=8)


def test_rms_norm() -> None:
    norm = gemma.RMSNorm(16)
    norm.weight.data.normal_()
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    prologue, gate = norm.prologue()
    torch.testing.assert_close(prologue.apply(x.float()), expected.float())
    assert gate is None


def test_adaptive_rms_norm_scales_shifts_and_gates() -> None:
    norm = gemma.AdaptiveRMSNorm(16)
    x, modulation = torch.randn(5, 16), torch.randn(48)
    prologue, gate = norm.prologue(modulation)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + modulation[:16]) + modulation[16:32]
    torch.testing.assert_close(prologue.apply(x), expected)
    assert torch.equal(gate, modulation[32:])


def test_rotary_turns_pairs_by_position() -> None:
    positions = torch.tensor([[0, 1, 7, 500]])
    x = torch.randn(1, 1, 4, 8)
    qkv = torch.cat((x[:, 0], torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)), dim=-1)
    actual = rotary(qkv, *gemma.rotary(positions, 8, torch.float32))[..., :8].unsqueeze(1)
    for place, position in enumerate(positions[0].tolist()):
        for pair in range(4):
            angle = position * 10_000 ** (-2 * pair / 8)
            turned = complex(x[0, 0, place, pair], x[0, 0, place, pair + 4]) * complex(math.cos(angle), math.sin(angle))
            assert actual[0, 0, place, pair].item() == pytest.approx(turned.real, abs=1e-4)
            assert actual[0, 0, place, pair + 4].item() == pytest.approx(turned.imag, abs=1e-4)


def test_bfloat16_rotary_has_openpis_rounded_frequencies() -> None:
    cos, _ = gemma.rotary(torch.tensor([[100]]), 8, torch.bfloat16)
    rounded = torch.tensor(10_000 ** (-2 / 8)).bfloat16().item()
    assert cos[0, 0, 1].item() == pytest.approx(math.cos(100 * rounded), abs=4e-3)
    assert rounded != 10_000 ** (-2 / 8)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_shares_one_key_value_head(*, masked: bool, merged: bool) -> None:
    layer = gemma.Attention(SIZE).double().requires_grad_(requires_grad=False)
    x, gate = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    cached = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    unrotated = torch.ones(2, 5, 8).double(), torch.zeros(2, 5, 8).double()
    visible = torch.tensor([[True, False, True], [True, True, masked is False]])
    keys = torch.cat((cached[0], layer.k_proj(x)), dim=1)
    values = torch.cat((cached[1], layer.v_proj(x)), dim=1)
    mask = torch.cat((visible, torch.ones(2, 5, dtype=torch.bool)), dim=1) if masked else torch.ones(2, 8).bool()
    heads = []
    for head in range(3):
        query = layer.q_proj(x)[..., 8 * head : 8 * head + 8]
        scores = (query @ keys.mT / math.sqrt(8)).masked_fill(~mask[:, None], -math.inf)
        heads.append(scores.softmax(-1) @ values)
    expected = x + gate * layer.o_proj(torch.cat(heads, dim=-1))
    value = layer.v_proj(x)
    if merged:
        layer.optimize_()
        assert not hasattr(layer, "q_proj")
    actual, own = layer(x, Prologue(), gate, unrotated, visible if masked else None, cached)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(own[1], value)


@pytest.mark.parametrize("merged", [False, True])
def test_mlp_gates_with_tanh_gelu(*, merged: bool) -> None:
    mlp = gemma.MLP(SIZE).requires_grad_(requires_grad=False)
    x = torch.randn(4, 16)
    gate = mlp.gate_proj(x)
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    expected = x + mlp.down_proj(gelu * mlp.up_proj(x))
    if merged:
        mlp.optimize_()
    torch.testing.assert_close(mlp(x, Prologue(), None), expected)
