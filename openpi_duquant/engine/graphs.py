"""Computations of one shape as CUDA graphs: at batch 1 a policy waits for launches, not for arithmetic."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
import dataclasses
import threading

import numpy as np
import torch
from torch import Tensor

from openpi_duquant.engine.observation import Prefix

PROMPT_BUCKET = 16
"""Prompts are padded to a multiple of this: fewer graphs, at the price of masked tokens."""

LIMIT = 16
"""Graphs that are kept; the one used longest ago goes first."""


@dataclasses.dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: Sequence[Tensor | None]
    output: Tensor
    finished: torch.cuda.Event = dataclasses.field(default_factory=torch.cuda.Event)

    def fill(self, given: Sequence[Tensor | None], beside: torch.cuda.Stream) -> None:
        """Copies inputs to where the graph reads them; those from the host while the GPU still makes the others."""
        pairs = [(static, each) for static, each in zip(self.inputs, given, strict=True) if static is not None]
        from_host = [pair for pair in pairs if pair[1].is_cpu]
        if len(from_host) < len(pairs):
            beside.wait_event(self.finished)  # the call before may still read its own
            with torch.cuda.stream(beside):
                _copy(from_host)
            _copy([pair for pair in pairs if not pair[1].is_cpu])
            torch.cuda.current_stream().wait_stream(beside)
        else:
            _copy(pairs)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for to, given in pairs:
        to.copy_(given, non_blocking=True)


_CAPTURING = threading.Lock()
"""A process may capture one graph at a time."""


def on(inputs: Sequence[Tensor | None], device: torch.device, *, copy: bool = False) -> list[Tensor | None]:
    """The same on that device."""
    return [x if x is None else x.to(device, non_blocking=True, copy=copy) for x in inputs]


def padded(prefix: Prefix) -> Prefix:
    """The prefix with its prompts padded to a multiple of `PROMPT_BUCKET`, masked there."""
    batch, length = prefix.tokens.shape
    shape = batch, length + -length % PROMPT_BUCKET
    tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.bool_)
    tokens[:, :length], mask[:, :length] = prefix.tokens.numpy(), prefix.token_mask.numpy()
    return Prefix(prefix.images, prefix.image_mask, torch.from_numpy(tokens), torch.from_numpy(mask))


class Graphs:
    """Computes by CUDA graphs, one for each computation and set of shapes; threads take turns.

    Args:
        limit: Graphs that are kept. They share one pool of memory.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._captured: OrderedDict[tuple[object, ...], _Captured] = OrderedDict()
        self._pool: tuple[int, int] | None = None
        self._finished: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None
        self._copies: torch.cuda.Stream | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of graphs held."""
        return len(self._captured)

    def __reduce__(self) -> tuple[object, ...]:
        """A copy has no graphs yet."""
        return Graphs, (self._limit,)

    def clear(self) -> None:
        """Forgets all graphs, because what they read has moved."""
        with self._lock:
            if self._captured:
                torch.cuda.synchronize()  # one of them may still run
            self._captured.clear()
            # memory is pooled for as long as there are graphs
            self._pool = self._finished = self._stream = self._copies = None

    def __call__(
        self,
        compute: Callable[..., Tensor],
        inputs: Sequence[Tensor | None],
        constants: Sequence[Tensor] = (),
        *,
        device: torch.device,
    ) -> Tensor:
        """What compute(*inputs, *constants) gives, in memory of its own; the first call of a shape captures its graph.

        Args:
            compute: Named differently from any other; looks at no value from the host.
            inputs: Anywhere: they are copied to where the graph reads them.
            constants: On the device, and staying there.
            device: A GPU.
        """
        shapes = (None if x is None else x.shape for x in inputs)
        key = compute.__name__, *shapes, *((x.data_ptr(), len(x)) for x in constants)
        with self._lock, torch.cuda.device(device):
            if self._finished is not None:  # graphs share memory, and threads may have streams of their own
                self._finished.wait()
            if key not in self._captured:
                self._make_room()
                self._captured[key] = self._capture(compute, on(inputs, device, copy=True), constants)
            self._captured.move_to_end(key)
            captured = self._captured[key]
            captured.fill(inputs, self._copies)
            captured.graph.replay()
            output = captured.output.clone()
            self._finished = captured.finished
            self._finished.record()
            return output

    def _make_room(self) -> None:
        while len(self._captured) >= self._limit:
            torch.cuda.synchronize()  # the graph that goes may still run
            self._captured.popitem(last=False)
            self._pool = self._pool if self._captured else None

    def _capture(
        self, compute: Callable[..., Tensor], inputs: Sequence[Tensor | None], constants: Sequence[Tensor]
    ) -> _Captured:
        self._stream, self._copies = self._stream or torch.cuda.Stream(), self._copies or torch.cuda.Stream()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):  # once without a graph: kernels are compiled and libraries made ready
            compute(*inputs, *constants)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        how = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with _CAPTURING, torch.cuda.graph(graph, **how):
            output = compute(*inputs, *constants)
        return _Captured(graph, inputs, output)
