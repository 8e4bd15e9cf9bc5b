"""Calls of one shape as one CUDA graph: at batch 1 a policy waits for launches, not for arithmetic."""

from collections import OrderedDict
from collections.abc import Callable
import dataclasses
import threading
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from openpi_duquant.engine.observation import Prefix

PROMPT_BUCKET = 16
"""Prompts are padded to a multiple of this: fewer graphs, at the price of masked tokens."""

LIMIT = 16
"""Graphs that are kept; the one used longest ago goes first."""


class Inputs(NamedTuple):
    """What a call computes from.

    Attributes:
        images: [B, C, 224, 224, 3] uint8, or [B, C, 3, 224, 224] fp32 in [-1, 1].
        image_mask: [B, C] bool.
        text: [B, L, W], embedded prompts.
        token_mask: [B, L] bool.
        state: [B, A] fp32, or None.
        noise: [B, S, A] fp32.
    """

    images: Tensor
    image_mask: Tensor
    text: Tensor
    token_mask: Tensor
    state: Tensor | None
    noise: Tensor

    def shapes(self) -> tuple[tuple[int, ...] | None, ...]:
        """Shape of each; what a graph is made for."""
        return tuple(None if x is None else tuple(x.shape) for x in self)

    def to(self, device: torch.device, *, copy: bool = False) -> "Inputs":
        """The same on that device, as `compute` reads it."""
        return Inputs(*(x if x is None else x.to(device, non_blocking=True, copy=copy) for x in self))


@dataclasses.dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    actions: Tensor


_CAPTURING = threading.Lock()
"""A process may capture one graph at a time."""


class Graphs:
    """Runs `compute` as CUDA graphs, one for each set of shapes; threads take turns.

    Args:
        compute: Of inputs and a schedule; looks at no value from the host.
        limit: Graphs that are kept. They share one pool of memory.
    """

    def __init__(self, compute: Callable[[Inputs, Tensor], Tensor], limit: int = LIMIT) -> None:
        self._compute = compute
        self._limit = limit
        self._captured: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()
        self._pool: tuple[int, int] | None = None
        self._finished: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of graphs held."""
        return len(self._captured)

    def __reduce__(self) -> tuple[object, ...]:
        """A copy has no graphs yet."""
        return Graphs, (self._compute, self._limit)

    def clear(self) -> None:
        """Forgets all graphs, because what they read has moved."""
        with self._lock:
            if self._captured:
                torch.cuda.synchronize()  # one of them may still run
            self._captured.clear()
            self._pool = self._stream = self._finished = None  # memory is pooled for as long as there are graphs

    def padded(self, prefix: Prefix) -> Prefix:
        """The prefix with its prompts padded to a multiple of `PROMPT_BUCKET`, masked there."""
        batch, length = prefix.tokens.shape
        shape = batch, length + -length % PROMPT_BUCKET
        tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
        tokens[:, :length], mask[:, :length] = prefix.tokens.numpy(), prefix.token_mask.numpy()
        return Prefix(prefix.images, prefix.image_mask, torch.from_numpy(tokens), torch.from_numpy(mask))

    def __call__(self, inputs: Inputs, schedule: Tensor) -> Tensor:
        """Actions, of memory of their own; the first call of a shape captures its graph.

        Inputs may be anywhere: they are copied to where the graph reads them. The schedule is on the policy's device.
        """
        key = *inputs.shapes(), schedule.data_ptr(), len(schedule)
        with self._lock, torch.cuda.device(schedule.device):
            if self._finished is not None:  # graphs share memory, and threads may have streams of their own
                self._finished.wait()
            if key not in self._captured:
                self._make_room()
                self._captured[key] = self._capture(inputs, schedule)
            self._captured.move_to_end(key)
            captured = self._captured[key]
            for static, given in zip(captured.inputs, inputs, strict=True):
                if static is not None:
                    static.copy_(given, non_blocking=True)
            captured.graph.replay()
            actions = captured.actions.clone()
            self._finished = torch.cuda.current_stream().record_event()
            return actions

    def _make_room(self) -> None:
        while len(self._captured) >= self._limit:
            torch.cuda.synchronize()  # the graph that goes may still run
            self._captured.popitem(last=False)
            self._pool = self._pool if self._captured else None

    def _capture(self, inputs: Inputs, schedule: Tensor) -> _Captured:
        static = inputs.to(schedule.device, copy=True)
        self._stream = self._stream or torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # once without a graph: kernels are compiled and libraries made ready
            self._compute(static, schedule)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with _CAPTURING, torch.cuda.graph(graph, **how):
            actions = self._compute(static, schedule)
        return _Captured(graph, static, actions)
