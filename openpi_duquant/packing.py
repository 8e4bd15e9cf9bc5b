"""The canonical storage of weight codes, in files and in state_dict: what every backend repacks from.

int4: two signed two's-complement values a byte, even k in the low nibble, [N, K/2] uint8. int8: as it is, [N, K] int8.
"""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K] int8 -> [N, K/2] uint8 for 4 bits (K even), [N, K] int8 for 8."""
    if bits == 8:
        return codes
    low, high = codes.view(torch.uint8)[:, 0::2], codes.view(torch.uint8)[:, 1::2]
    return (low & 0xF) | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """The codes [N, K] int8 of what `pack` returned; the dtype tells the number of bits."""
    if packed.dtype == torch.int8:
        return packed
    low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).flatten(1)
