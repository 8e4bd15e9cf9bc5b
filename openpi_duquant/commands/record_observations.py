"""openpi-duquant record-observations."""

import functools
import pathlib
import tempfile
from typing import Literal

import tyro

from openpi_duquant import synthetic
from openpi_duquant.architecture import Architecture
from openpi_duquant.commands.console import console
from openpi_duquant.commands.evaluate_libero import run_episodes
from openpi_duquant.config import DuQuantError
from openpi_duquant.conversion import open_source
from openpi_duquant.libero.evaluation import Arguments
from openpi_duquant.progress import progress_bar
from openpi_duquant.recording import Example
from openpi_duquant.recording import require_new
from openpi_duquant.recording import save_recording


def record_observations(
    source: tyro.conf.Positional[Literal["libero", "synthetic"]],
    output: tyro.conf.Positional[pathlib.Path],
    *,
    checkpoint: pathlib.Path,
    limit: int = 64,
    seed: int = 0,
    policy_config: str = "pi05_libero",
    task_suite: str = "libero_spatial",
    tasks: tuple[int, ...] = (),
    episodes: int = 1,
    assets: pathlib.Path | None = None,
    action_horizon: int = 10,
) -> None:
    """Record what a policy sees, to calibrate a conversion on and to judge one by.

    evaluate-libero and serve-policy record too, with --record; so does openpi_duquant.recorder.Recorder any policy of
    openpi in Python. All sample their calls evenly and keep what they have when they are interrupted.

    Args:
        source: libero runs the policy in LIBERO (needs openpi and LIBERO); synthetic makes up random observations: they
            try the commands out, and say nothing of accuracy.
        output: Folder to make.
        checkpoint: The original checkpoint; libero takes a converted one too, with a --policy-config *_duquant.
        limit: Observations to keep.
        seed: Of everything random.
        policy_config: openpi's name of its config. (libero)
        task_suite: Suite of tasks. (libero)
        tasks: Numbers of tasks; all if not given. (libero)
        episodes: Episodes of every task. (libero)
        assets: Folder of LIBERO's assets, where LIBERO does not find them by itself. (libero)
        action_horizon: Actions that the noise is for. (synthetic)
    """
    if source == "synthetic":
        _record_synthetic(output, checkpoint, limit, seed, action_horizon)
        return
    with tempfile.TemporaryDirectory() as results:
        run_episodes(
            Arguments(
                checkpoint=checkpoint,
                policy_config=policy_config,
                task_suite_name=task_suite,
                tasks=tasks,
                num_trials_per_task=episodes,
                seed=seed,
                results_dir=pathlib.Path(results) / "run",
                videos=False,
                assets=assets,
                record=output,
                record_limit=limit,
            )
        )
    console.print(f"recorded {output}")


def _record_synthetic(
    output: pathlib.Path, checkpoint: pathlib.Path, limit: int, seed: int, action_horizon: int
) -> None:
    require_new(output)
    if limit < 1 or action_horizon < 1:
        raise DuQuantError(f"--limit {limit} and --action-horizon {action_horizon} must be at least 1")
    with open_source(checkpoint) as reader:
        architecture = Architecture.infer(reader.shapes)
    make = functools.partial(synthetic.libero_like_observation, architecture, action_horizon=action_horizon)
    examples = []
    with progress_bar(f"Recording {output.name}", limit) as advance:
        for index in range(limit):
            examples.append(Example(*make(seed=seed + index)))
            advance(1)
    save_recording(output, examples, {"source": "synthetic", "checkpoint": checkpoint.name, "seed": seed})
    console.print(f"wrote {output}: {limit} synthetic observations, of no use but for trying things out")
