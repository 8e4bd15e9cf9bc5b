"""Weights that stay in host memory: those that a call reads a few rows of, or that depend on the step count alone."""

from collections.abc import Callable

from torch import Tensor
from torch import nn


class HostResident(nn.Module):
    """A module whose tensors stay where they were loaded, whatever device its host is moved to."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HostResident":  # noqa: FBT001, FBT002
        del fn, recurse
        return self


class HostEmbedding(HostResident, nn.Embedding):
    """nn.Embedding in host memory: 1 GB for pi0.5, of which a call reads a row for every token."""


class HostLinear(HostResident, nn.Linear):
    """nn.Linear in host memory, for what is computed once for all calls."""
