"""What `auto` takes where several backends can run: the fastest on this GPU, measured once and kept on disk.

A layer is measured at every M that it will see; what counts is the sum of these times, each as often as a call has it
(`Problem.tokens`). A file per layer, beside the cache of BitBLAS kernels, keeps the times for as long as GPU, driver,
torch, Triton and the kernels themselves stay what they were.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
import logging
import math
import pathlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openpi_duquant.environment import cache_folder
from openpi_duquant.kernels import driver
from openpi_duquant.kernels import self_test
from openpi_duquant.kernels.backend import Backend
from openpi_duquant.kernels.backend import Problem
from openpi_duquant.kernels.files import write_whole
from openpi_duquant.kernels.timing import L2_BYTES
from openpi_duquant.kernels.timing import microseconds
from openpi_duquant.profiling import not_profiled
from openpi_duquant.progress import progress_bar
from openpi_duquant.report import markdown_table

logger = logging.getLogger(__name__)

Times = dict[int, float]
"""Microseconds by number of tokens."""

_LAUNCHES = (20, 256)  # fewest and most that are timed together
_SOURCES = (".py", ".cu", ".cuh", ".json")


class Choice(NamedTuple):
    """What was found out about one problem.

    Attributes:
        times: Of the backends that could be measured.
        failures: Why the others could not.
    """

    times: dict[str, Times]
    failures: dict[str, str]

    def cost(self, name: str, problem: Problem) -> float:
        """Microseconds that a backend takes in a call of the policy."""
        return sum(calls * self.times[name][m] for m, calls in problem.tokens)

    def fastest(self, problem: Problem) -> str | None:
        """The backend that takes the least; None if none could be measured."""
        return min(self.times, key=lambda name: self.cost(name, problem), default=None)


_decided: dict[tuple[Any, ...], Choice] = {}
"""By backends, problem and device; of this process."""


def decide(backends: Mapping[str, Backend], problems: Iterable[Problem], device: torch.device) -> dict[Problem, Choice]:
    """Times of these backends for these problems: this process's, else those on disk, else measured now.

    What is new in this process is logged as one table.

    Args:
        backends: Two or more that can run all these problems, by name, loaded.
        problems: The layers.
        device: A CUDA device.
    """
    keys = {problem: (tuple(backends), problem, str(device)) for problem in problems}
    new = [problem for problem, key in keys.items() if key not in _decided]
    if new:
        where = environment(device)
        paths = {problem: _path(where, problem) for problem in new}
        found = {problem: _read(*paths[problem], backends, problem) for problem in new}
        missing = [problem for problem in new if found[problem] is None]
        if missing:
            with progress_bar("Measuring backends", len(missing)) as advance:
                for problem in missing:
                    found[problem] = _measured(backends, problem, device)
                    _keep(*paths[problem], found[problem])
                    advance(1)
        _decided.update({keys[problem]: found[problem] for problem in new})
        _log({problem: found[problem] for problem in new}, backends, where["gpu"], len(missing))
    return {problem: _decided[key] for problem, key in keys.items()}


def environment(device: torch.device) -> dict[str, str]:
    """What the times depend on beside the layer."""
    import triton  # noqa: PLC0415  it is there where several backends run

    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": "CUDA {}.{}".format(*driver.version()),
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "kernels": _digest(pathlib.Path(__file__).parent),
    }


@functools.cache
def _digest(folder: pathlib.Path) -> str:
    """Of the kernels in a folder, their tiles and the patches of BitBLAS."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _path(where: Mapping[str, str], problem: Problem) -> tuple[pathlib.Path, dict[str, Any]]:
    """The file of a problem's times, and what it must say that they are times of."""
    layer = {name: str(value) for name, value in dataclasses.asdict(problem).items()}
    measured = {**where, "layer": layer}
    digest = hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:16]
    name = f"{problem} {digest}.json".replace(" ", "-")
    return cache_folder() / "auto" / name, measured


def _read(path: pathlib.Path, measured: Mapping[str, Any], backends: Iterable[str], problem: Problem) -> Choice | None:
    """What `_keep` wrote; None if there is no such file, or it is damaged or of something else."""
    try:
        kept = json.loads(path.read_text())
        times = {name: {m: float(kept["microseconds"][name][str(m)]) for m, _ in problem.tokens} for name in backends}
        same = kept["measured"] == measured
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sound = all(math.isfinite(us) and us > 0 for part in times.values() for us in part.values())
    return Choice(times, {}) if same and sound else None


def _keep(path: pathlib.Path, measured: Mapping[str, Any], found: Choice) -> None:
    """Keeps times on disk, if all could be measured: what failed is tried again by the next process."""
    if found.failures:
        return
    content = json.dumps({"measured": measured, "microseconds": found.times}, indent=1)
    try:
        write_whole(path, content.encode())
    except OSError as error:
        logger.warning("backend auto: cannot keep what was measured, the next start measures again: %s", error)


def _measured(backends: Mapping[str, Backend], problem: Problem, device: torch.device) -> Choice:
    found = Choice({}, {})
    for name, backend in backends.items():
        try:
            found.times[name] = measure(backend, problem, device)
        except Exception as error:  # noqa: BLE001 - whatever it is, the backend is no candidate then
            found.failures[name] = self_test.in_one_line(error)
            logger.warning("backend auto: %s is left out for %s: %s", name, problem, found.failures[name])
    return found


@not_profiled()
def measure(backend: Backend, problem: Problem, device: torch.device) -> Times:
    """Microseconds of a backend's matmul at every M of `problem.tokens`, on a GPU.

    Launches are timed inside a CUDA graph, with weights that come from memory rather than from the cache.
    """
    packed = backend.repack(problem, self_test.random_weight(problem, device))
    with torch.cuda.device_of(packed):
        copies = min(_LAUNCHES[1], -(-L2_BYTES // packed.nbytes))
        weights = [packed, *(packed.clone() for _ in range(copies - 1))]
        scale = torch.ones(problem.out_features, problem.scale_groups, device=device)
        restore = self_test.random_restore(problem)
        restore = restore.to(device) if isinstance(restore, Tensor) else restore
        random = torch.Generator(device).manual_seed(0)
        times = {}
        for m, _ in problem.tokens:
            size = m, problem.in_features
            codes = torch.randint(-127, 128, size, generator=random, dtype=torch.int8, device=device)
            act_scale, row_sum = torch.ones(m, 1, device=device), codes.sum(1, keepdim=True, dtype=torch.int32)
            operands = scale, None, restore, problem.dtype, row_sum
            launch = functools.partial(_launch, backend, (codes, act_scale), weights, operands)
            times[m] = microseconds(launch, max(copies, _LAUNCHES[0]))
    return times


def _launch(
    backend: Backend, a: tuple[Tensor, Tensor], weights: Sequence[Tensor], operands: tuple[Any, ...], index: int
) -> Tensor:
    return backend.matmul(*a, weights[index % len(weights)], *operands)


def _log(found: Mapping[Problem, Choice], backends: Iterable[str], gpu: str, measured: int) -> None:
    """The table of what was chosen: per backend, microseconds at each M; and what a call takes of them."""
    rows = []
    for problem, choice in found.items():
        calls = ", ".join(f"{m} x{calls}" for m, calls in problem.tokens)
        times = [
            ", ".join(f"{choice.times[name][m]:.3g}" for m, _ in problem.tokens) if name in choice.times else "failed"
            for name in backends
        ]
        rows.append((problem, calls, *times, choice.fastest(problem) or "none of them"))
    table = markdown_table(("layer", "tokens x calls", *(f"{name}, us" for name in backends), "chosen"), rows)
    source = f"{measured} of {len(found)} measured now, the rest before"
    logger.info("backend auto on %s, %s:\n%s", gpu, source, table)
