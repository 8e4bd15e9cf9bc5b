"""The demo's results as a page and as a picture."""

from collections.abc import Mapping
import pathlib
from typing import Any

from matplotlib.figure import Figure

from openpi_duquant.report import markdown_stamp
from openpi_duquant.report import markdown_table

MB = 1e6
_RANDOM = "The weights are random: the errors show that everything runs, they are no accuracy figure."
_TIMES = (
    "Times are those of plain-torch references on a CPU, as multiples of the original's in this run. "
    "They say nothing of the speed on a GPU."
)


def markdown(results: Mapping[str, Any]) -> str:
    """The comparison as a Markdown page."""
    header = (
        "policy", "backend", "quantized layers", "MB", "of original", "quantized weights, of bf16",
        "action error", "median layer error", "time, of original",
    )  # fmt: skip
    original = results["original_bytes"]
    rows: list[tuple[object, ...]] = [("original", results["dtype"], 0, f"{original / MB:.1f}", "1.000", "", 0, "", 1)]
    for row in results["presets"]:
        for backend, measured in row["backends"].items():
            rows.append(
                (
                    row["preset"],
                    backend,
                    row["layers"],
                    f"{row['bytes'] / MB:.1f}",
                    f"{row['bytes'] / original:.3f}",
                    f"{row['quantized_bytes'] / row['quantized_bytes_bf16']:.3f}",
                    f"{measured['action_error']:.4f}",
                    f"{row['median_layer_error']:.4f}",
                    f"{measured['time_relative_to_original']:.2f}",
                )
            )
    worst = [
        (row["preset"], row["worst_layer"], f"{row['layer_errors'][row['worst_layer']]:.4f}")
        for row in results["presets"]
    ]
    sections = [
        "# W4A8 conversion, compared with the original",
        *([_RANDOM] if results["random_weights"] else []),
        markdown_table(header, rows),
        "Errors are relative (L2). A layer's error is measured on the inputs that the original gives it.",
        markdown_table(("policy", "layer with the largest error", "error"), worst),
        _TIMES,
        markdown_stamp(results["stamp"]),
    ]
    return "\n\n".join(sections) + "\n"


def plot(results: Mapping[str, Any], path: pathlib.Path) -> None:
    """Bytes, action errors and the errors of all layers, side by side, as a PNG."""
    rows = results["presets"]
    names = [row["preset"] for row in rows]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    size, action, layers = figure.subplots(1, 3, width_ratios=(1, 1, 1.6))
    size.bar(["original", *names], [results["original_bytes"] / MB, *(row["bytes"] / MB for row in rows)], color="0.6")
    size.bar(names, [row["quantized_bytes"] / MB for row in rows], color="C0", label="quantized layers")
    size.set(title="Checkpoint", ylabel="MB")
    size.legend()
    for index, backend in enumerate(rows[0]["backends"]):
        positions = [place + 0.4 * (index - 0.5) for place in range(len(rows))]
        action.bar(positions, [row["backends"][backend]["action_error"] for row in rows], width=0.38, label=backend)
    action.set(title="Action error against the original", ylabel="relative error")
    action.set_xticks(range(len(rows)), names)
    action.legend(title="backend")
    for row in rows:
        layers.plot(sorted(row["layer_errors"].values(), reverse=True), marker=".", label=row["preset"])
    layers.set(title="Error of every layer, largest first", xlabel="layer", ylabel="relative error")
    layers.set_ylim(bottom=0)
    layers.legend()
    if results["random_weights"]:
        figure.suptitle("Random weights: errors are no accuracy figure")
    figure.savefig(path, dpi=120)
