"""One row of bench-policy, in a process of its own: memory, compiled code and failures are its alone.

`main` takes from the command line: row, setting as JSON, calls, seconds, file for the result.
"""

import base64
from collections.abc import Callable
import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpi_duquant.commands.policy_rows import ROWS
from openpi_duquant.commands.policy_rows import Calls
from openpi_duquant.commands.policy_rows import Setting
from openpi_duquant.config import DuQuantError
from openpi_duquant.libero.statistics import call_times
from openpi_duquant.report import write_json

WARM_CALLS, WARM_SECONDS = 4, 5.0
LEAST_CALLS = 3


@torch.no_grad()
def measure(calls: Calls, device: torch.device, count: int, seconds: float) -> dict[str, Any]:
    """Times of calls, memory of the GPU, and the actions.

    Args:
        calls: The policy.
        device: Where it runs.
        count: Calls to time, of each kind.
        seconds: Stop sooner, after this time and at least three calls.

    Returns:
        `first_call_s`; `wall` and `model`, as `call_times`; bytes of the GPU after loading (`weight_bytes`), at most
        (`peak_bytes`), and taken from it by all processes (`device_bytes`), None on a CPU; `actions`, as `encode`.
    """
    memory: dict[str, int | None] = dict.fromkeys(("weight_bytes", "peak_bytes", "device_bytes"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        memory["weight_bytes"] = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    actions, first = _timed(calls.whole, device)
    row = {"first_call_s": first, "actions": encode(actions)}
    slow = False
    for name, call in (("wall", calls.whole), ("model", calls.model)):
        if not slow:
            _repeat(call, device, WARM_CALLS, WARM_SECONDS, least=1)
        times = _repeat(call, device, count, seconds, least=LEAST_CALLS)
        row[name], slow = call_times(times), min(times) > WARM_SECONDS
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory |= {"peak_bytes": torch.cuda.max_memory_allocated(device), "device_bytes": total - free}
    return row | memory


def _repeat(call: Callable[[], Tensor], device: torch.device, count: int, seconds: float, *, least: int) -> list[float]:
    times: list[float] = []
    while len(times) < count and (sum(times) < seconds or len(times) < least):
        times.append(_timed(call, device)[1])
    return times


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - start


def encode(actions: Tensor) -> str:
    """Actions as base64 of fp32."""
    return base64.b64encode(actions.float().cpu().numpy().tobytes()).decode()


def decode(text: str) -> Tensor:
    """What `encode` was given, flat."""
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), np.float32).copy())


def main() -> None:
    """Measures the row that the command line names."""
    name, text, count, seconds, target = sys.argv[1:]
    setting = Setting(**json.loads(text))
    start = time.perf_counter()
    try:
        calls = ROWS[name].make(setting)
        loaded = {"load_s": time.perf_counter() - start}
        row = measure(calls, torch.device(setting.device), int(count), float(seconds))
    except DuQuantError as error:
        sys.exit(" ".join(str(error).split()))
    write_json(pathlib.Path(target), loaded | row)


if __name__ == "__main__":
    main()
