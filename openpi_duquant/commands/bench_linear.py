"""openpi-duquant bench-linear."""

from collections.abc import Iterator, Mapping
import json
import pathlib
from typing import Any

from matplotlib.figure import Figure
import torch

from openpi_duquant import kernels
from openpi_duquant.commands import linear_timing
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import refuse_variables
from openpi_duquant.commands.console import require_known
from openpi_duquant.config import DuQuantError
from openpi_duquant.progress import progress_bar
from openpi_duquant.report import markdown_stamp
from openpi_duquant.report import markdown_table
from openpi_duquant.report import stamp
from openpi_duquant.report import write_json

SHAPES: dict[str, tuple[int, int]] = {
    "language q, o": (2048, 2048),
    "language k, v": (256, 2048),
    "language q+k+v": (2560, 2048),
    "language gate, up": (16384, 2048),
    "language gate+up": (32768, 2048),
    "language down": (2048, 16384),
    "expert q": (2048, 1024),
    "expert k, v": (256, 1024),
    "expert q+k+v": (2560, 1024),
    "expert o": (1024, 2048),
    "expert gate, up": (4096, 1024),
    "expert gate+up": (8192, 1024),
    "expert down": (1024, 4096),
}
"""Linear layers of pi0.5: N and K."""

TOKENS = (1, 10, 50, 536, 968)
BASELINES = ("bf16 cuBLAS", "int8 cuBLASLt")
NAIVE, NAIVE_GRAPH, RESTORED = "naive loop", "naive loop, in a graph", "triton, restored"
ROWS = (*BASELINES, NAIVE, NAIVE_GRAPH, *kernels.BACKENDS, RESTORED)
_KEY = ("layer", "m", "backend")


def bench_linear(
    *,
    output: pathlib.Path = pathlib.Path("out/bench-linear"),
    layers: tuple[str, ...] = tuple(SHAPES),
    tokens: tuple[int, ...] = TOKENS,
    backends: tuple[str, ...] = ROWS,
) -> None:
    """Time pi0.5's linear layers on this GPU: transform, matmul, epilogue and the whole layer, by backend.

    Beside them: cuBLAS, and the research code's simulation, whose transforms are a Python loop over blocks of 16; as it
    ran, eager, and in a CUDA graph. "triton, restored" computes what it simulates.

    Writes linear.json, linear.md and linear.png. What linear.json has already is not measured again: run the command
    again after an interruption.

    Args:
        output: Folder for the results.
        layers: Layers to measure, of "language ..." and "expert ...".
        tokens: Numbers of tokens, M.
        backends: Backends, baselines and simulations to measure.
    """
    refuse_variables("bench-linear")
    require_known("layers", layers, SHAPES)
    require_known("backends", backends, ROWS)
    if not torch.cuda.is_available():
        raise DuQuantError("bench-linear needs a CUDA device; see openpi-duquant doctor")
    output.mkdir(parents=True, exist_ok=True)
    path = output / "linear.json"
    results = _resume(path)
    results["ceilings"] = results["ceilings"] or linear_timing.ceilings()
    results["rows"] = [row for row in results["rows"] if row["layer_us"] is not None]  # what could not run may run now
    done = {tuple(row[name] for name in _KEY) for row in results["rows"]}
    wanted = [(layer, m, backend) for layer in layers for backend in backends for m in tokens]
    missing = [key for key in wanted if key not in done]
    with progress_bar("Measuring", len(missing)) as advance:
        for row in _measure(missing, results["ceilings"]):
            results["rows"].append(row)
            write_json(path, results)
            advance(1)
    (output / "linear.md").write_text(_markdown(results))
    _chart(results, output / "linear.png")
    console.print(_markdown(results))


def _resume(path: pathlib.Path) -> dict[str, Any]:
    """Results so far: an empty frame, or those of the file, if they are of this GPU and this torch."""
    now = stamp()
    if not path.exists():
        return {"stamp": now, "ceilings": {}, "rows": []}
    results = json.loads(path.read_text())
    for name in ("gpu", "versions"):
        before, here = results["stamp"][name], now[name]
        if before != here:
            raise DuQuantError(f"{path}: was measured with {before}, here is {here}; use another --output")
    return results


def _measure(keys: list[tuple[str, int, str]], ceilings: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    for layer, m, backend in keys:
        n, k = SHAPES[layer]
        row = dict(zip(_KEY, (layer, m, backend))) | {"n": n, "k": k}
        yield row | linear_timing.measure(m, n, k, backend, ceilings)


def _markdown(results: Mapping[str, Any]) -> str:
    header = (
        "layer", "N x K", "M", "backend", "transform us", "matmul us", "epilogue us", "layer us", "TOPS",
        "share of roofline", "exact",
    )  # fmt: skip
    order = list(SHAPES)
    rows = [
        (
            row["layer"],
            f"{row['n']} x {row['k']}",
            row["m"],
            row["backend"],
            *(_number(row[part]) for part in ("transform", "matmul", "epilogue", "layer_us")),
            _number(row["tops"]),
            _number(row["roofline"]),
            {True: "yes", False: "NO", None: row["note"]}[row["exact"]],
        )
        for row in sorted(results["rows"], key=lambda row: (order.index(row["layer"]), row["m"]))
    ]
    ceilings = ", ".join(f"{name} {value:.3g}" for name, value in results["ceilings"].items())
    against = _against_the_loop(results)
    table = f"{markdown_table(header, rows)}\n\n{against}Ceilings, measured: {ceilings}."
    return f"{table}\n\n{markdown_stamp(results['stamp'])}\n"


def _against_the_loop(results: Mapping[str, Any]) -> str:
    """How many times faster the same transform is in one kernel; nothing if one of them was not measured."""
    times = {tuple(row[name] for name in _KEY): row["transform"] for row in results["rows"]}
    header = ("layer", "M", "loop us", "in a graph us", "one kernel us", "times faster", "than in a graph")
    rows = []
    for layer, m in sorted({key[:2] for key in times}, key=lambda key: (list(SHAPES).index(key[0]), key[1])):
        loop, graph, ours = (times.get((layer, m, name)) for name in (NAIVE, NAIVE_GRAPH, RESTORED))
        if loop and graph and ours:
            rows.append((layer, m, *map(_number, (loop, graph, ours, loop / ours, graph / ours))))
    title = "The transform (permutation, matrices of 16, rounding) against the naive loop"
    return f"{title}:\n\n{markdown_table(header, rows)}\n\n" if rows else ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _chart(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Bars of matmul and epilogue, beside bf16 where that was measured, for the expert's and the language model's M."""
    tokens = sorted({row["m"] for row in results["rows"]})
    shown = [m for m in (10, 968) if m in tokens] or tokens[:1]
    names = [name for name in (*BASELINES, *kernels.BACKENDS) if name not in ("reference", "fake")]
    figure = Figure(figsize=(12, 4.5 * len(shown)), layout="constrained")
    for axes, m in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown):
        rows = [row for row in results["rows"] if row["m"] == m and row["matmul"]]
        bf16 = {row["layer"]: row["matmul"] for row in rows if row["backend"] == BASELINES[0]}
        for index, name in enumerate(names):
            bars = [row for row in rows if row["backend"] == name and (row["layer"] in bf16 or not bf16)]
            places = [list(SHAPES).index(row["layer"]) + (index - 1) * 0.25 for row in bars]
            matmul = [row["matmul"] / bf16.get(row["layer"], 1) for row in bars]
            epilogue = [(row["epilogue"] or 0) / bf16.get(row["layer"], 1) for row in bars]
            if bars:
                axes.bar(places, matmul, 0.25, label=name, color=f"C{index}")
                axes.bar(places, epilogue, 0.25, matmul, color=f"C{index}", alpha=0.4)
        unit = "time, of bf16 cuBLAS" if bf16 else "microseconds"
        axes.set(title=f"M = {m}: matmul, and epilogue (pale)", ylabel=unit)
        axes.set_xticks(range(len(SHAPES)), list(SHAPES), rotation=30, ha="right")
        if axes.containers:
            axes.legend()
    figure.savefig(path, dpi=120)
