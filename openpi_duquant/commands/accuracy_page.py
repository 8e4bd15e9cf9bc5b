"""The accuracy report for readers: sections of text, tables and pictures, as Markdown and as one HTML file."""

import base64
from collections.abc import Mapping, Sequence
import html as escaping
import pathlib
from typing import Any, NamedTuple

from openpi_duquant.report import markdown_stamp
from openpi_duquant.report import markdown_table

TITLE = "Accuracy of converted checkpoints"

ACTIVATION_GOAL = 1.25
"""Error by 8-bit activations, over the ideal for Gaussian inputs, that is to be reached in the median."""

Row = Sequence[object]


class Section(NamedTuple):
    """A heading, a paragraph, a table (its header first) and the name of a picture; what is empty is left out."""

    title: str
    text: str = ""
    table: Sequence[Row] = ()
    picture: str = ""


def sections(results: Mapping[str, Any]) -> list[Section]:
    """The report, part by part."""
    rows = results["checkpoints"]
    parts = [_summary(results), _actions(results), _steps(rows)]
    quantized = [row for row in rows if row["layers"]]
    if results["methods"]:
        parts.append(_methods(results))
    if quantized:
        parts += [_components(quantized), _activations(quantized)]
        parts += [section for row in quantized for section in (_worst(row), _layers(row))]
    return parts


def _summary(results: Mapping[str, Any]) -> Section:
    header = ("checkpoint", "bits", "layers", "MB", "actions, relative L2", "cosine, mean", "cosine, least",
              "worst dimension", "its relative error", "layers, mean error", "SQNR, dB")  # fmt: skip
    table: list[Row] = [header]
    for row in results["checkpoints"]:
        actions, counts = row["actions"], row["counts"] or {}
        worst = actions["worst_dimension"]
        table.append((
            row["checkpoint"], row["bits"], counts.get("layers", 0),
            f"{counts['bytes'] / 1e6:.1f}" if counts else "", _error(actions["relative_l2"]),
            f"{actions['cosine_mean']:.6f}", f"{actions['cosine_min']:.6f}", worst,
            _error(actions["relative_error"][worst]), _error(row["mean_layer_error"]),
            _mean_db([values["sqnr_db"] for values in row["layers"].values()]),
        ))  # fmt: skip
    recorded = results["observations"]
    text = (
        f"Original: {results['original']}, in {results['dtype']}, {results['num_steps']} denoising steps, the same "
        f"observations and noise for all. Judged by {results['judged_by']} observations "
        f"(source: {recorded.get('source', 'not recorded')}); {results['calibrated_on']} earlier ones calibrate the "
        f"published methods alone. Actions are in {results['units']}. Errors are relative L2 norms; "
        "a layer's is measured on the inputs that the original gives it."
    )
    if recorded.get("source") == "synthetic":
        text += " The observations are synthetic: the figures show that everything runs, and say nothing of accuracy."
    if recorded.get("assets", "LIBERO") != "LIBERO":
        text += f" They were recorded in LIBERO with {recorded['assets']}."
    for row in results["checkpoints"]:
        unread = (row["counts"] or {}).get("layers", 0) - len(row["layers"])
        if unread:
            text += f" {unread} layers of {row['checkpoint']} are not measured: no action reads what they give."
        if row["judged_by_its_calibration_data"]:
            text += f" {row['checkpoint']} was calibrated on these very observations: they are not held out."
    return Section("Summary", text, table)


def _actions(results: Mapping[str, Any]) -> Section:
    columns = [
        (f"{row['checkpoint']}, {title}", [text(value) for value in row["actions"][name]])
        for row in results["checkpoints"]
        for title, name, text in (("RMS", "rms_error", _value), ("relative", "relative_error", _error))
    ]
    table: list[Row] = [("dimension", *(title for title, _ in columns))]
    table += [(d, *errors) for d, errors in enumerate(zip(*(errors for _, errors in columns)))]
    text = f"RMS errors in {results['units']}. The picture: all dimensions of the first observation judged by."
    return Section("Actions", text, table, "actions.png")


def _steps(rows: Sequence[Mapping[str, Any]]) -> Section:
    names = {"velocity": "velocity", "x": "x", "expert_layers": "expert's layers"}
    columns = [(f"{row['checkpoint']}, {names[n]}", row["steps"][n]) for row in rows for n in names if row["steps"][n]]
    table: list[Row] = [("step", *(title for title, _ in columns))]
    table += [(step, *map(_error, errors)) for step, errors in enumerate(zip(*(errors for _, errors in columns)))]
    text = (
        "velocity: the field that the expert gives; x: the noisy actions after the step, after the last the actions; "
        "both as each policy goes its own way, in the model's units. Expert's layers: their mean error on the "
        "original's inputs."
    )
    return Section("Denoising steps", text, table, "steps.png")


def _methods(results: Mapping[str, Any]) -> Section:
    header = ("method", "layers", "error", "of rtn's", "SQNR, dB", "language model", "expert")
    table: list[Row] = [header]
    for row in results["methods"]:
        parts = ("" if row[part] is None else _error(row[part]) for part in ("language", "expert"))
        table.append(
            (row["method"], row["layers"], _error(row["error"]), f"{row['of_rtn']:.3f}", _db(row["sqnr_db"]), *parts)
        )
    text = (
        f"Methods are W4A8: mean relative error of the outputs of {len(results['method_layers'])} layers, on held-out "
        f"inputs that the original gives them; methods that calibrate do so on {_range(results['method_rows'])} "
        "inputs of each. Checkpoints: those of these layers that they quantize, against rtn on the same. Weights are "
        "not folded for the methods. "
        f"Layers: {', '.join(map(_short, results['method_layers']))}."
    )
    return Section("Methods at the same bits", text, table)


def _components(rows: Sequence[Mapping[str, Any]]) -> Section:
    table: list[Row] = [("checkpoint", "part", "projection", "layers", "error", "SQNR, dB", "worst layer")]
    for row in rows:
        for c in row["components"]:
            figures = c["layers"], _error(c["error"]), _db(c["sqnr_db"]), _short(c["worst_layer"])
            table.append((row["checkpoint"], c["part"], c["projection"], *figures))
    return Section("Parts of the policy", "Mean over layers.", table, "layers.png")


def _activations(rows: Sequence[Mapping[str, Any]]) -> Section:
    table: list[Row] = [("checkpoint", "median", "largest", "layer", "its error", "ideal", "would help")]
    for row in rows:
        ratios = row["activations_over_ideal"]
        for name in sorted(ratios, key=ratios.__getitem__, reverse=True)[:5]:
            values = row["layers"][name]
            median = f"{row['median_activations_over_ideal']:.3f}"
            errors = _error(values["activation_error"]), _error(values["ideal_error"])
            advice = "take 16-bit activations" if ratios[name] > ACTIVATION_GOAL else ""
            table.append((row["checkpoint"], median, f"{ratios[name]:.3f}", _short(name), *errors, advice))
    text = (
        "The outputs' error by 8-bit activations alone, weights in floating point, as a multiple of what int8 leaves "
        f"of Gaussian inputs of the same width. To reach: a median of at most {ACTIVATION_GOAL}."
    )
    return Section("Activations alone", text, table if len(table) > 1 else ())


def _worst(row: Mapping[str, Any]) -> Section:
    table: list[Row] = [("layer", "error", "by weights", "by activations", "would help")]
    for worst in row["worst_layers"]:
        errors = (_error(worst[name]) for name in ("error", "by_weights", "by_activations"))
        table.append((worst["layer"], *errors, worst["suggestion"]))
    text = (
        "8-bit weights of single layers: convert-checkpoint --layer-bits <layer> 8; with --calibration, "
        "--keep-error-below chooses them. 16-bit activations, of all layers: --activation-bits 16. Layers are left out "
        "by --exclude, a regular expression."
    )
    return Section(f"Worst layers of {row['checkpoint']}", text, table)


def _layers(row: Mapping[str, Any]) -> Section:
    table: list[Row] = [("layer", "weight bits", "error", "SQNR, dB", "by activations alone", "over ideal")]
    for name, values in row["layers"].items():
        ratio = row["activations_over_ideal"].get(name)
        alone = ("", "") if ratio is None else (_error(values["activation_error"]), f"{ratio:.3f}")
        figures = values["weight_bits"], _error(values["error"]), _db(values["sqnr_db"])
        table.append((_short(name), *figures, *alone))
    return Section(f"Every layer of {row['checkpoint']}", "", table)


def _short(layer: str) -> str:
    """A layer's name without what is the same in every name."""
    return layer.removeprefix("paligemma_with_expert.").replace("paligemma.model.", "").replace(".model.", ".")


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _error(value: float) -> str:
    return f"{value:.4f}"


def _value(value: float) -> str:
    return f"{value:.3g}"


def _db(value: float | None) -> str:
    return "no error" if value is None else f"{value:.1f}"


def _mean_db(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.1f}" if known else ""


def markdown(parts: Sequence[Section], results: Mapping[str, Any]) -> str:
    """The report as Markdown; pictures lie beside it."""
    blocks = [f"# {TITLE}"]
    for part in parts:
        blocks += [f"## {part.title}", part.text]
        blocks += [markdown_table(part.table[0], part.table[1:])] if part.table else []
        blocks += [f"![{part.title}]({part.picture})"] if part.picture else []
    return "\n\n".join(block for block in [*blocks, markdown_stamp(results["stamp"])] if block) + "\n"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
img { max-width: 100%; } summary { cursor: pointer; } footer { color: #666; margin-top: 3em; }
"""
_LONG = 40


def html(parts: Sequence[Section], results: Mapping[str, Any], pictures: Sequence[pathlib.Path]) -> str:
    """The report as one HTML file: pictures within, nothing is fetched."""
    images = {path.name: base64.b64encode(path.read_bytes()).decode() for path in pictures}
    blocks = [f"<h1>{TITLE}</h1>"]
    for part in parts:
        blocks += [f"<h2>{escaping.escape(part.title)}</h2>", f"<p>{escaping.escape(part.text)}</p>"]
        if part.picture:
            source = f"data:image/png;base64,{images[part.picture]}"
            blocks.append(f'<img alt="{escaping.escape(part.title)}" src="{source}">')
        table = _html_table(part.table) if part.table else ""
        long = f"<details><summary>{len(part.table) - 1} rows</summary>{table}</details>"
        blocks.append(long if len(part.table) > _LONG else table)
    blocks.append(f"<footer>{escaping.escape(markdown_stamp(results['stamp']))}</footer>")
    head = f'<meta charset="utf-8"><title>{TITLE}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(blocks) + "\n</body></html>\n"


def _html_table(table: Sequence[Row]) -> str:
    def line(row: Row, tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escaping.escape(str(cell))}</{tag}>' for cell in row)}</tr>"

    body = "".join(line(row, "td") for row in table[1:])
    return f"<table><thead>{line(table[0], 'th')}</thead><tbody>{body}</tbody></table>"
