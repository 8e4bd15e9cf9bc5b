"""Where things are: devices; and host memory, for weights of which a call reads few rows or none, and for copies."""

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


def existing_device(name: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        DuQuantError: If torch knows none of that name, or there are fewer GPUs here.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DuQuantError(f"unknown device {name!r}: give cpu, cuda or cuda:<index>") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DuQuantError(f"device {name}: {count} CUDA devices are visible here; see openpi-duquant doctor")
    return device


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
