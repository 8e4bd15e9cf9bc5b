"""openpi-duquant bench-policy."""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from typing import Any, Literal

from openpi_duquant.commands import policy_timing
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import refuse_variables
from openpi_duquant.commands.console import require_known
from openpi_duquant.commands.console import resolve_device
from openpi_duquant.commands.policy_report import chart
from openpi_duquant.commands.policy_report import markdown
from openpi_duquant.commands.policy_rows import ROWS
from openpi_duquant.commands.policy_rows import Setting
from openpi_duquant.config import DuQuantError
from openpi_duquant.progress import progress_bars
from openpi_duquant.report import stamp
from openpi_duquant.report import write_json


def bench_policy(
    *,
    output: pathlib.Path = pathlib.Path("out/bench-policy"),
    rows: tuple[str, ...] = (),
    size: Literal["full", "small"] = "full",
    checkpoint: pathlib.Path | None = None,
    device: str = "auto",
    num_steps: int = 10,
    cameras: Literal[1, 2, 3] = 2,
    prompt_tokens: int = 24,
    seed: int = 0,
    calls: int = 100,
    seconds_per_row: float = 20.0,
    row_timeout: float = 540.0,
) -> None:
    """Time a policy call: naive fake quantization, its improvements one by one, bf16, and this project's engine.

    Every row runs in a process of its own, on the same weights, observation and noise. Writes policy.json after every
    row, then policy.md, policy.png and logs. What policy.json has is not measured again: run the command again, with
    the same options, after an interruption. A row that fails is recorded with its reason; name it in --rows to try it
    again.

    Args:
        output: Folder for the results.
        rows: Rows to run, all when none are named: naive, w4a8-triton, bf16-engine, openpi-compiled, ...
        size: Of the random weights, when no checkpoint is given.
        checkpoint: A checkpoint of openpi, not converted.
        device: cpu, cuda, cuda:<index>, or auto.
        num_steps: Denoising steps.
        cameras: Live cameras, of three.
        prompt_tokens: Length of the prompt, up to 200.
        seed: Of weights, observation and noise.
        calls: Calls to time.
        seconds_per_row: Time fewer calls where they take longer than this, at least three; once with preprocessing,
            once without.
        row_timeout: Seconds after which a row is given up.
    """
    refuse_variables("bench-policy")
    require_known("rows", rows, ROWS)
    if not 1 <= prompt_tokens <= 200:
        raise DuQuantError(f"prompt_tokens: {prompt_tokens} is not between 1 and 200")
    output.mkdir(parents=True, exist_ok=True)
    where = resolve_device(device)
    folder = None if checkpoint is None else str(checkpoint.resolve())
    scratch = output.resolve() / f"converted-{checkpoint.name if checkpoint else size}-{seed}-{where.type}"
    asked = num_steps, cameras, prompt_tokens
    setting = Setting("given" if folder else size, folder, seed, *asked, str(where), str(scratch))
    limits = {"calls": calls, "seconds_per_row": seconds_per_row}
    path = output / "policy.json"
    results = _resume(path, dataclasses.asdict(setting) | {"scratch": None} | limits)
    wanted = [name for name in ROWS if _is_wanted(name, rows, results["rows"])]
    if kept := [name for name in results["rows"] if name not in wanted]:
        console.print(f"{path} has {', '.join(kept)}: not measured again; use another --output for that")
    with progress_bars() as bars:
        task = bars.add_task("Measuring", total=len(wanted))
        for name in wanted:
            bars.update(task, description=name)
            results["rows"][name] = _run(name, setting, limits, row_timeout, output / "logs")
            write_json(path, results)
            bars.advance(task)
    if results["rows"].keys() == ROWS.keys():
        shutil.rmtree(scratch, ignore_errors=True)
    elif scratch.exists():
        console.print(f"{scratch} keeps converted weights for other rows; delete it when you measure none of them")
    (output / "policy.md").write_text(markdown(results))
    chart(results, output / "policy.png")
    console.print(markdown(results))
    asked = {name: results["rows"][name] for name in rows or ROWS}
    if all("failed" in row for row in asked.values()):
        reasons = "; ".join(f"{name}: {row['failed']}" for name, row in asked.items())
        raise DuQuantError(f"no row could be measured: {reasons}")


def _is_wanted(name: str, rows: Sequence[str], done: dict[str, Any]) -> bool:
    """Whether to run a row: never once it is measured; once it has failed, if it is named."""
    return name in rows and (name not in done or "failed" in done[name]) if rows else name not in done


def _resume(path: pathlib.Path, setting: dict[str, Any]) -> dict[str, Any]:
    """Results so far: an empty frame, or those of the file, if they were measured as is asked for now."""
    now = {"stamp": stamp(), "setting": setting}
    if not path.exists():
        return {**now, "rows": {}}
    results = json.loads(path.read_text())
    for part, names in (("stamp", ("gpu", "versions")), ("setting", setting)):
        for name in names:
            before, here = results[part].get(name), now[part][name]
            if before != here:
                raise DuQuantError(f"{path}: was measured with {name} {before}, here is {here}; use another --output")
    return results


def _run(
    name: str, setting: Setting, limits: dict[str, float], row_timeout: float, logs: pathlib.Path
) -> dict[str, Any]:
    """The row that a process of its own measures, or why there is none; what the process says goes into a log."""
    logs.mkdir(exist_ok=True)
    result, log = logs / f"{name}.json", logs / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-c", f"from {policy_timing.__name__} import main; main()", name]
    options = json.dumps(dataclasses.asdict(setting)), str(limits["calls"]), str(limits["seconds_per_row"]), str(result)
    try:
        with log.open("w") as file:
            status = subprocess.run(
                [*command, *options], stdout=file, stderr=file, timeout=row_timeout, check=False
            ).returncode
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {row_timeout:g} s", "commit": stamp()["commit"]}
    if status:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {"failed": said[-1].strip() if said else f"exit status {status}", "commit": stamp()["commit"]}
    row = json.loads(result.read_text())
    result.unlink()
    return row | {"commit": stamp()["commit"]}
