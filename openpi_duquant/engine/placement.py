"""Host memory: weights that stay there, as a call reads a few rows of them or none, and what is copied from there."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch import nn

from openpi_duquant.config import DuQuantError


def staging(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """Host memory for what is to be copied to a device: page-locked if that is a GPU.

    torch lends such memory again only when the copies from it are over (`non_blocking` ones too), so whoever made it
    may let go of it at once. Fill it by NumPy: torch's operators share work out among threads, and waking them takes
    longer than copying a few 100 KB.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=device is not None and device.type == "cuda")


class HostResident(nn.Module):
    """A module whose tensors stay where they were loaded, whatever device its host is moved to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostResident":  # noqa: FBT001, FBT002
        del fn, recurse
        return self


class HostEmbedding(HostResident, nn.Embedding):
    """nn.Embedding in host memory: 1 GB for pi0.5, of which a call reads a row for every token."""

    def forward(self, tokens: Tensor, device: torch.device | None = None) -> Tensor:
        """Rows [B, L, W] of tokens [B, L] int64, both on the host, ready to be copied to that device.

        Raises:
            DuQuantError: On a token without a row.
        """
        ids = tokens.numpy()
        if ids.view(np.uint64).max(initial=0) >= len(self.weight):  # as unsigned, negative ones are large
            raise DuQuantError(f"token ids go from {ids.min()} to {ids.max()}: the policy knows {len(self.weight)}")
        rows = staging((*ids.shape, self.weight.shape[1]), self.weight.dtype, device)
        table, out = (x.detach().view(torch.uint8).numpy() for x in (self.weight, rows))  # NumPy knows no bfloat16
        np.take(table, ids, axis=0, out=out, mode="clip")  # the default mode would copy twice
        return rows


class HostLinear(HostResident, nn.Linear):
    """nn.Linear in host memory, for what is computed once for all calls."""
