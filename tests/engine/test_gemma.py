"""Gemma's parts against the formulas written out."""

import math

import pytest
import torch

from openpi_duquant.architecture import TransformerSize
from openpi_duquant.engine import gemma

SIZE = TransformerSize(width=16, depth=2, mlp_dim=24, num_heads=3, head_dim=8)


def test_rms_norm() -> None:
    norm = gemma.RMSNorm(16)
    norm.weight.data.normal_()
    x = torch.randn(5, 16, dtype=torch.float64)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + norm.weight.double())
    torch.testing.assert_close(norm(x.float())[0], expected.float())


def test_adaptive_rms_norm_scales_shifts_and_gates() -> None:
    norm = gemma.AdaptiveRMSNorm(16)
    x, modulation = torch.randn(5, 16), torch.randn(48)
    scaled, gate = norm(x, modulation)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + modulation[:16]) + modulation[16:32]
    torch.testing.assert_close(scaled, expected)
    assert torch.equal(gate, modulation[32:])


def test_rotary_turns_pairs_by_position() -> None:
    positions = torch.tensor([[0, 1, 7, 500]])
    x = torch.randn(1, 1, 4, 8)
    actual = gemma._apply_rotary(x, *gemma.rotary(positions, 8, torch.float32))
    for place, position in enumerate(positions[0].tolist()):
        for pair in range(4):
            angle = position * 10_000 ** (-2 * pair / 8)
            turned = complex(x[0, 0, place, pair], x[0, 0, place, pair + 4]) * complex(math.cos(angle), math.sin(angle))
            assert actual[0, 0, place, pair].item() == pytest.approx(turned.real, abs=1e-4)
            assert actual[0, 0, place, pair + 4].item() == pytest.approx(turned.imag, abs=1e-4)


def test_bfloat16_rotary_has_openpis_rounded_frequencies() -> None:
    cos, _ = gemma.rotary(torch.tensor([[100]]), 8, torch.bfloat16)
    rounded = torch.tensor(10_000 ** (-2 / 8)).bfloat16().item()
    assert cos[0, 0, 0, 1].item() == pytest.approx(math.cos(100 * rounded), abs=4e-3)
    assert rounded != 10_000 ** (-2 / 8)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_shares_one_key_value_head(*, masked: bool) -> None:
    attention = gemma.Attention(SIZE).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    cached = torch.randn(2, 1, 3, 8, dtype=torch.float64), torch.randn(2, 1, 3, 8, dtype=torch.float64)
    cos, sin = torch.ones(2, 1, 5, 8), torch.zeros(2, 1, 5, 8)
    mask = torch.rand(2, 1, 5, 8) < 0.7 if masked else torch.ones(2, 1, 5, 8, dtype=torch.bool)
    mask[..., 0] = True
    actual, own = attention(x, cos.double(), sin.double(), mask if masked else None, cached)
    keys = torch.cat((cached[0][:, 0], attention.k_proj(x)), dim=1)
    values = torch.cat((cached[1][:, 0], attention.v_proj(x)), dim=1)
    heads = []
    for head in range(3):
        query = attention.q_proj(x)[..., 8 * head : 8 * head + 8]
        scores = (query @ keys.mT / math.sqrt(8)).masked_fill(~mask[:, 0], -math.inf)
        heads.append(scores.softmax(-1) @ values)
    torch.testing.assert_close(actual, attention.o_proj(torch.cat(heads, dim=-1)))
    torch.testing.assert_close(own[1][:, 0], attention.v_proj(x))


def test_mlp_gates_with_tanh_gelu() -> None:
    mlp = gemma.MLP(SIZE)
    x = torch.randn(4, 16)
    gate = mlp.gate_proj(x)
    gelu = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(mlp(x), mlp.down_proj(gelu * mlp.up_proj(x)))
