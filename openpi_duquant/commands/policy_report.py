"""The results of bench-policy as a page and as a picture."""

from collections.abc import Mapping
import math
import pathlib
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from matplotlib.ticker import NullLocator

from openpi_duquant.accuracy import relative_error
from openpi_duquant.commands.policy_rows import COMPILE_MODE
from openpi_duquant.commands.policy_rows import ROWS
from openpi_duquant.commands.policy_timing import decode
from openpi_duquant.report import markdown_stamp
from openpi_duquant.report import markdown_table

EPISODE_CALLS = 18
"""Policy calls of an episode, as the original analysis counts."""

_COLORS = {"simulated W4A8": "C3", "real W4A8": "C0", "bf16": "0.55"}
_REAL = ("w4a8-triton", "w4a8-bitblas")

SUMMARY_ROWS = ("naive", "openpi-eager", "openpi-compiled", "bf16-engine", "w4a8-triton")
SUMMARY_COLUMNS = (
    "what runs",
    "calls",
    "p50 ms",
    "p99 ms",
    "calls/s",
    "x naive",
    "x openpi-compiled",
    "weights GB",
    "peak GB",
)

ANALYSIS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("current: full DuQuant", "13,086 (observed)", "1x", ("naive",)),
    ("simple: no permutation, no rotation", "3,000", "4.3x", ("simple",)),
    ("rotation blocks of 32", "8,000", "1.6x", ("block-32",)),
    ("no output restore", "6,000", "2.2x", ("no-restore",)),
    ("torch.compile", "2,000", "6.5x", ("layers-compiled", "compiled")),
    ("real INT4/INT8 kernels", "1,000-1,500", "8-13x", ("w4a8-expert-triton", *_REAL)),
    ("FP16 baseline", "1,000", "13x", ("bf16-eager", "openpi-eager")),
)
"""What the original analysis gives, estimated but for the first: configuration, ms a call, speed-up; our rows of it."""

Results = Mapping[str, Any]


def measured(results: Results) -> dict[str, Any]:
    """The rows that did not fail, in the order of the table."""
    return {name: results["rows"][name] for name in ROWS if "wall" in results["rows"].get(name, {})}


def milliseconds(results: Results) -> dict[str, float]:
    """Median of a whole call, by row."""
    return {name: row["wall"]["p50_ms"] for name, row in measured(results).items()}


def bf16_baseline(times: Mapping[str, float]) -> str | None:
    """The row of bf16 that speed-ups refer to: openpi's compiled, else the engine's eager."""
    return next((name for name in ("openpi-compiled", "bf16-eager") if name in times), None)


def shares(times: Mapping[str, float]) -> dict[str, float] | None:
    """How much of the time that bf16 takes without a graph is saved by the graph, and how much by W4A8 in the graph.

    Returns:
        `from_ms`, `to_ms`, and the shares `graph` and `precision`, which sum to 1; None where a row is missing, or
        nothing is saved.
    """
    real = [times[name] for name in _REAL if name in times]
    if not real or not {"bf16-eager", "bf16-engine"} <= set(times):
        return None
    eager, graph, quantized = times["bf16-eager"], times["bf16-engine"], min(real)
    if quantized >= eager:
        return None
    saved = eager - quantized
    return {
        "from_ms": eager,
        "to_ms": quantized,
        "graph": (eager - graph) / saved,
        "precision": (graph - quantized) / saved,
    }


def table(results: Results) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows; what does not apply is empty."""
    rows, times = measured(results), milliseconds(results)
    baseline = bf16_baseline(times)
    header = (
        "row", "what runs", "calls", "p50 ms", "p95 ms", "p99 ms", "model only, p50 ms", "calls/s",
        f"episode s ({EPISODE_CALLS} calls)", "x naive", f"x {baseline or 'bf16'}", "weights GB", "peak GB",
        "GPU in use GB", "first call s", "action difference",
    )  # fmt: skip
    bf16 = decode(rows["bf16-eager"]["actions"]) if "bf16-eager" in rows else None
    lines = []
    for name, row in rows.items():
        wall, actions = row["wall"], decode(row["actions"])
        memory = (row[part] for part in ("weight_bytes", "peak_bytes", "device_bytes"))
        lines.append(
            (
                name,
                ROWS[name].what,
                str(wall["policy_calls"]),
                *(_number(wall[part]) for part in ("p50_ms", "p95_ms", "p99_ms")),
                _number(row["model"]["p50_ms"]),
                _number(1000 / wall["p50_ms"]),
                _number(EPISODE_CALLS * wall["p50_ms"] / 1000),
                *(_number(times[base] / times[name]) if base in times else "" for base in ("naive", baseline)),
                *("" if size is None else f"{size / 1e9:.2f}" for size in memory),
                _number(row["first_call_s"]),
                "" if bf16 is None else f"{relative_error(actions, bf16):.2e}",
            )
        )
    return header, lines


def summary(results: Results) -> str:
    """The rows that a newcomer asks for, in the columns that matter most; README.md has it."""
    header, lines = table(results)
    columns = [header.index(name) for name in SUMMARY_COLUMNS]
    by_name = {line[0]: [line[column] for column in columns] for line in lines}
    return markdown_table(SUMMARY_COLUMNS, [by_name[name] for name in SUMMARY_ROWS if name in by_name])


def _number(value: float) -> str:
    """Three significant digits; whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def markdown(results: Results) -> str:
    """The page."""
    failed = [(name, row["failed"]) for name, row in results["rows"].items() if "failed" in row]
    sections = [
        "# A policy call, from fake quantization to the engine",
        markdown_table(*table(results)),
        _split(results),
        _notes(results),
        _beside_analysis(results),
        *([markdown_table(("not run", "why"), failed)] if failed else []),
        markdown_stamp(results["stamp"]),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _beside_analysis(results: Results) -> str:
    """The original analysis's table, and what was measured here for each of its lines; nothing if nothing was."""
    times = milliseconds(results)
    lines = [
        (what, theirs, gain, name, _number(times[name]), _number(times["naive"] / times[name]))
        for what, theirs, gain, names in ANALYSIS
        for name in names
        if name in times and "naive" in times
    ]
    if not lines:
        return ""
    header = "original analysis", "its ms", "its speed-up", "row here", "ms here", "x naive"
    title = "The original analysis, whose GPU is not stated; all but its first figure are estimates:"
    return f"{title}\n\n{markdown_table(header, lines)}"


def _split(results: Results) -> str:
    """Which share of the gain is the graph's."""
    split = shares(milliseconds(results))
    if results["stamp"]["gpu"] is None or split is None:
        return (
            "How much of the gain is the CUDA graph's and how much precision's is said where bf16-eager, bf16-engine "
            "and w4a8-triton or w4a8-bitblas were measured on a GPU."
        )
    return (
        f"From bf16 without a graph ({split['from_ms']:.1f} ms) to W4A8 as CUDA graphs ({split['to_ms']:.1f} ms): "
        f"{split['graph']:.0%} of the time saved is the graph's (bf16-eager to bf16-engine), {split['precision']:.0%} "
        "is precision's (bf16-engine to W4A8)."
    )


def _notes(results: Results) -> str:
    setting = results["setting"]
    weights = setting["checkpoint"] or f"random weights ({setting['size']}), so differences are no accuracy figure"
    asked = f"{setting['cameras']} live cameras of three, {setting['prompt_tokens']} prompt tokens"
    notes = [
        f"Batch 1, {asked}, {setting['num_steps']} steps; bf16; {weights}.",
        "A call goes from camera images on the host to actions on the host; model only: no preprocessing, no copies.",
        "Rows from naive to compiled simulate the action expert's W4A8 in this project's eager bf16 engine.",
        "Real W4A8 is of the language model and the expert (preset default) where nothing else is said.",
        f"torch.compile: {COMPILE_MODE} for a policy, default for a layer.",
        "The action difference is relative (L2) to bf16-eager, from the same noise.",
    ]
    by_commit: dict[str, list[str]] = {}
    for name, row in measured(results).items():
        by_commit.setdefault(row["commit"] or "no commit", []).append(name)
    if len(by_commit) > 1:
        parts = (f"{', '.join(names)} of {commit}" for commit, names in by_commit.items())
        notes.append(f"Rows measured at one commit and at another: {'; '.join(parts)}.")
    if results["stamp"]["gpu"] is None:
        notes.append("Without a GPU there are no CUDA graphs and no kernels: only the ratios say anything.")
    return "\n".join(f"- {note}" for note in notes)


def chart(results: Results, path: pathlib.Path) -> None:
    """Median and p99 of every row: points, for the scale is logarithmic and bars would have no length."""
    rows = measured(results)
    figure = Figure(figsize=(10, 1.2 + 0.36 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    for place, (name, row) in enumerate(rows.items()):
        wall = row["wall"]
        real = "real W4A8" if name.startswith(("w4a8", "module")) else "simulated W4A8"
        kind = "bf16" if "bf16" in name or "openpi" in name else real
        late = [[0], [max(0.0, wall["p99_ms"] - wall["p50_ms"])]]
        axes.errorbar(wall["p50_ms"], place, xerr=late, fmt="o", color=_COLORS[kind], ecolor="0.3", capsize=2)
        axes.annotate(
            f"{_number(wall['p50_ms'])} ms", (wall["p99_ms"], place), (5, 0), textcoords="offset points", va="center"
        )
    axes.set(xscale="log", xlabel="ms a call: p50, whisker to p99; logarithmic", title="A policy call")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda ms, _: f"{ms:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(axis="x", color="0.9")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    handles = [Patch(color=color, label=kind) for kind, color in _COLORS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=120)
