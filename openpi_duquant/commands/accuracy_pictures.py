"""The accuracy report's pictures."""

from collections.abc import Mapping, Sequence
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from openpi_duquant.fidelity.layers import component

COLUMNS = 4


def draw(results: Mapping[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes actions.png, steps.png and, where layers are quantized, layers.png; returns their paths."""
    figures = {"actions.png": _actions(results), "steps.png": _steps(results["checkpoints"])}
    quantized = [row for row in results["checkpoints"] if row["layers"]]
    if quantized:
        figures["layers.png"] = _layers(quantized)
    for name, figure in figures.items():
        if results["observations"].get("source") == "synthetic":
            figure.suptitle("Synthetic observations: no accuracy figure")
        figure.savefig(folder / name, dpi=120)
    return [folder / name for name in figures]


def _actions(results: Mapping[str, Any]) -> Figure:
    """The actions of one observation over one another, a panel a dimension."""
    dimensions = len(results["trace"][0])
    rows = -(-dimensions // COLUMNS)
    figure = Figure(figsize=(13, 0.6 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for d, panel in enumerate(panels):
        if d >= dimensions:
            panel.axis("off")
            continue
        panel.plot([step[d] for step in results["trace"]], color="black", linewidth=2.5, label="original")
        for row in results["checkpoints"]:
            panel.plot([step[d] for step in row["trace"]], linestyle="--", label=row["checkpoint"])
        panel.set_title(f"dimension {d}", fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.supxlabel("action of the chunk")
    figure.supylabel(results["units"])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _steps(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Errors by denoising step: of the velocity, of x, of the expert's layers."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    titles = {"velocity": "Velocity", "x": "x after the step", "expert_layers": "The expert's layers, mean"}
    for panel, (name, title) in zip(figure.subplots(1, 3), titles.items()):
        for row in rows:
            panel.plot(row["steps"][name], marker=".", label=row["checkpoint"])
        panel.set(title=title, xlabel="denoising step", ylabel="relative error")
        _from_zero(panel)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend()
    return figure


def _layers(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Errors of all layers in their order; dotted, what 8-bit activations alone leave."""
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panel = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["layers"]))
    places = {name: place for place, name in enumerate(names)}
    for index, row in enumerate(rows):
        layers = {places[name]: values for name, values in row["layers"].items()}
        color = f"C{index}"
        panel.plot(list(layers), [v["error"] for v in layers.values()], ".", color=color, label=row["checkpoint"])
        alone = {place: v["activation_error"] for place, v in layers.items() if v["activation_error"] is not None}
        panel.plot(list(alone), list(alone.values()), "x+"[index % 2], markersize=4, color=color)
    panel.set(title="Error of every layer; crosses: by activations alone", xlabel="layer", ylabel="relative error")
    _from_zero(panel)
    parts = [component(name)[0] for name in names]
    for place in (place for place in range(1, len(parts)) if parts[place] != parts[place - 1]):
        panel.axvline(place - 0.5, color="0.7", linewidth=1)
    for part in dict.fromkeys(parts):
        panel.text(parts.index(part), panel.get_ylim()[1], part, color="0.4", va="top")
    panel.legend(loc="center right")
    return figure


def _from_zero(panel: Axes) -> None:
    panel.set_ylim(0, 1.08 * panel.get_ylim()[1])
