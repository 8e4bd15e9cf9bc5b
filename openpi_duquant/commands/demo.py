"""openpi-duquant demo: convert a checkpoint with several presets and compare them with the original."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from typing import Any, Literal

import torch
from torch import Tensor

from openpi_duquant import synthetic
from openpi_duquant.accuracy import layer_errors
from openpi_duquant.accuracy import relative_error
from openpi_duquant.architecture import SMALL
from openpi_duquant.architecture import Architecture
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint.files import iter_bytes
from openpi_duquant.commands.comparison import markdown
from openpi_duquant.commands.comparison import plot
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import refuse_variables
from openpi_duquant.config import DuQuantConfig
from openpi_duquant.config import DuQuantError
from openpi_duquant.config import preset as preset_config
from openpi_duquant.conversion import convert
from openpi_duquant.conversion import open_source
from openpi_duquant.engine import Observation
from openpi_duquant.engine import Policy
from openpi_duquant.engine import load_policy
from openpi_duquant.fidelity.layers import folded_original
from openpi_duquant.progress import progress_bars
from openpi_duquant.report import stamp
from openpi_duquant.report import write_json

BACKENDS = ("fake", "reference")
LONG_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Trial:
    """One observation, the noise it starts from, and how policies are loaded and run on it."""

    observation: Observation
    noise: Tensor
    num_steps: int
    dtype: torch.dtype

    def run(self, policy: Policy) -> Tensor:
        """The actions [1, action_horizon, action_dim]."""
        return policy.sample_actions(self.observation, self.noise, num_steps=self.num_steps)

    def timed(self, policy: Policy) -> tuple[Tensor, float]:
        """The actions, and the least seconds of up to four calls; of one, where that takes long."""
        seconds: list[float] = []
        while len(seconds) < 4 and sum(seconds) < LONG_SECONDS:
            start = time.perf_counter()
            actions = self.run(policy)
            seconds.append(time.perf_counter() - start)
        return actions, min(seconds)


def demo(
    *,
    output: pathlib.Path = pathlib.Path("out/demo"),
    checkpoint: pathlib.Path | None = None,
    presets: tuple[str, ...] = ("default", "optimized", "simple"),
    num_steps: int = 10,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
) -> None:
    """Convert a pi0 or pi0.5 checkpoint with several presets and compare each with the original, on a CPU.

    All run on one LIBERO-like observation from the same noise. Writes comparison.md, .json and .png.

    Args:
        output: Folder for the comparison; files of an earlier one are replaced.
        checkpoint: A checkpoint of openpi; a small random one is made when not given.
        presets: Presets to compare.
        num_steps: Denoising steps.
        dtype: Type that policies compute in; auto is float32, and bfloat16 for a checkpoint that is given: at full
            size that takes about 12 GB of memory, float32 twice as much.
        seed: Of the random checkpoint, observation and noise.
    """
    refuse_variables("demo")
    configs = {name: preset_config(name) for name in presets}
    if not configs:
        raise DuQuantError("presets: name at least one")
    output.mkdir(parents=True, exist_ok=True)
    if dtype == "auto":
        dtype = "bfloat16" if checkpoint else "float32"
    asked = {"random_weights": checkpoint is None, "num_steps": num_steps, "dtype": dtype, "seed": seed}
    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=output) as scratch:
        source = checkpoint
        if source is None:
            source = pathlib.Path(scratch) / "pi05-small"
            synthetic.make_checkpoint(source, SMALL, seed=seed)
        measured = _measure(source, pathlib.Path(scratch), configs, num_steps, getattr(torch, dtype), seed)
    results = asked | measured | {"stamp": stamp()}
    page = markdown(results)
    write_json(output / "comparison.json", results)
    (output / "comparison.md").write_text(page)
    plot(results, output / "comparison.png")
    console.print(page)
    console.print(f"wrote {output / 'comparison.md'}, .json and .png")


def _measure(
    source: pathlib.Path,
    scratch: pathlib.Path,
    configs: Mapping[str, DuQuantConfig],
    num_steps: int,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, Any]:
    """Runs the original, converts it with every config into `scratch`, and compares."""
    with open_source(source) as reader:
        architecture, source_bytes = Architecture.infer(reader.shapes), sum(iter_bytes(reader.types))
    observation, noise = synthetic.libero_like_observation(architecture, seed=seed)
    trial = Trial(observation, noise, num_steps, dtype)
    rows = []
    with progress_bars() as bars:
        steps = bars.add_task("Comparing", total=1 + len(configs) * (len(BACKENDS) + 2))
        original = trial.timed(load_policy(source, dtype=dtype, optimize=False))
        bars.advance(steps)
        for name, config in configs.items():
            task = bars.add_task(f"Converting with {name}", total=source_bytes)
            manifest = convert(source, scratch / name, config, progress=functools.partial(bars.advance, task))
            bars.advance(steps)
            row = _compare(source, scratch / name, manifest, trial, original, functools.partial(bars.advance, steps))
            rows.append({"preset": name, **row, **manifest.counts})
    return {"architecture": dataclasses.asdict(architecture), "original_bytes": source_bytes, "presets": rows}


def _compare(
    source: pathlib.Path,
    converted: pathlib.Path,
    manifest: Manifest,
    trial: Trial,
    original: tuple[Tensor, float],
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Action error and time on every backend, and the error of every layer that is called."""
    expected, original_seconds = original
    backends = {}
    for backend in BACKENDS:
        policy = load_policy(converted, backend=backend, dtype=trial.dtype, optimize=False)
        actions, seconds = trial.timed(policy)
        backends[backend] = {
            "action_error": relative_error(actions, expected),
            "largest_action_difference": (actions - expected).abs().max().item(),
            "time_relative_to_original": seconds / original_seconds,
        }
        advance()
    errors = layer_errors(folded_original(source, manifest, trial.dtype), policy, trial.run)
    advance()
    return {
        "backends": backends,
        "layer_errors": errors,
        "median_layer_error": statistics.median(errors.values()),
        "worst_layer": max(errors, key=errors.__getitem__),
    }
