"""Packed codes against bytes written by hand and Python integers."""

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import torch

from openpi_duquant import packing


def test_even_channels_fill_low_nibbles() -> None:
    codes = torch.tensor([[0, 1, -1, -8, 7, 2], [-8, 7, -7, -2, 5, -4]], dtype=torch.int8)
    packed = packing.pack(codes, 4)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [[0x10, 0x8F, 0x27], [0x78, 0xE9, 0xC5]]


def test_every_byte_holds_its_two_codes() -> None:
    pairs = [[low, high] for low in range(-8, 8) for high in range(-8, 8)]
    codes = torch.tensor(pairs, dtype=torch.int8)
    packed = packing.pack(codes, 4)
    assert packed.flatten().tolist() == [(low & 15) | ((high & 15) << 4) for low, high in pairs]
    assert sorted(packed.flatten().tolist()) == list(range(256))
    unpacked = packing.unpack(packed)
    assert unpacked.dtype == torch.int8
    assert unpacked.tolist() == pairs


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 20), st.data())
def test_unpacking_inverts_packing(rows: int, half: int, data: st.DataObject) -> None:
    values = st.lists(st.integers(-8, 7), min_size=2 * half, max_size=2 * half)
    codes = data.draw(st.lists(values, min_size=rows, max_size=rows))
    packed = packing.pack(torch.tensor(codes, dtype=torch.int8), 4)
    assert packed.shape == (rows, half)
    assert packing.unpack(packed).tolist() == codes


def test_a_transposed_weight_packs_by_its_own_order() -> None:
    codes = torch.tensor([[1, -2], [3, -4], [5, -6], [7, -8]], dtype=torch.int8).T
    assert packing.pack(codes, 4).tolist() == [[0x31, 0x75], [0xCE, 0x8A]]


@pytest.mark.parametrize("columns", [4, 5])
def test_eight_bits_stay_as_they_are(columns: int) -> None:
    codes = torch.linspace(-128, 127, 3 * columns).round().to(torch.int8).view(3, columns)
    packed = packing.pack(codes, 8)
    assert packed.dtype == torch.int8
    assert torch.equal(packed, codes)
    assert torch.equal(packing.unpack(packed), codes)
