"""Time on the GPU: inside a CUDA graph, where what the host takes to launch does not count, or with it."""

from collections.abc import Callable
import statistics
import time

import torch

L2_BYTES = 192 * 2**20
"""Operands that are read in turn from so much memory come from memory, not from the cache, on any GPU of today."""


def microseconds(launch: Callable[[int], object], launches: int, replays: int = 5) -> float:
    """Median time of one launch.

    Args:
        launch: Enqueues the work; called with 0, 1, ..., so that it can take other operands every time.
        launches: How many make one graph.
        replays: How often that is timed.
    """
    for index in range(min(3, launches)):
        launch(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            launch(index)
    graph.replay()
    times = [_milliseconds(graph.replay) for _ in range(replays)]
    return statistics.median(times) * 1e3 / launches


def wall_microseconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median time from the call to the end of what it enqueues: what the host takes to launch it counts."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e6


def _milliseconds(work: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)
