"""openpi-duquant accuracy-report."""

from collections.abc import Callable
import dataclasses
import functools
import pathlib

import tyro

from openpi_duquant.commands.accuracy_page import html
from openpi_duquant.commands.accuracy_page import markdown
from openpi_duquant.commands.accuracy_page import sections
from openpi_duquant.commands.accuracy_pictures import draw
from openpi_duquant.commands.console import console
from openpi_duquant.commands.console import resolve_device
from openpi_duquant.config import DuQuantError
from openpi_duquant.fidelity import Settings
from openpi_duquant.fidelity import measure
from openpi_duquant.progress import progress_bars
from openpi_duquant.recording import load_recording
from openpi_duquant.report import stamp
from openpi_duquant.report import write_json


def accuracy_report(
    original: tyro.conf.Positional[pathlib.Path],
    converted: tyro.conf.Positional[tuple[pathlib.Path, ...]],
    settings: tyro.conf.OmitArgPrefixes[Settings] = Settings(),  # noqa: B008 - frozen
    *,
    observations: pathlib.Path,
    output: pathlib.Path = pathlib.Path("out/accuracy"),
    fail_above: float | None = None,
) -> None:
    """Compare converted checkpoints with their original on recorded observations, with the same noise.

    Writes report.html (one file, with its pictures), report.md, report.json, actions.png, steps.png and layers.png.

    Args:
        original: The checkpoint of openpi that the others were converted from.
        converted: One or more converted checkpoints.
        settings: How to compare.
        observations: A recording that none of them was calibrated on, see record-observations.
        output: Folder for the report; files of an earlier one are replaced.
        fail_above: Exit with status 1 if the relative L2 error of a checkpoint's actions is above this.
    """
    if not converted:
        raise DuQuantError("name at least one converted checkpoint behind the original")
    recording = load_recording(observations)
    settings = dataclasses.replace(settings, device=str(resolve_device(settings.device)))
    output.mkdir(parents=True, exist_ok=True)
    with progress_bars() as bars:

        def progress(title: str, total: int) -> Callable[[], None]:
            return functools.partial(bars.advance, bars.add_task(title, total=total))

        results = measure(original, converted, recording, settings, progress) | {"stamp": stamp()}
    write_json(output / "report.json", results)
    pictures = draw(results, output)
    parts = sections(results)
    (output / "report.md").write_text(markdown(parts, results))
    (output / "report.html").write_text(html(parts, results, pictures))
    for row in results["checkpoints"]:
        console.print(f"{row['checkpoint']}: relative L2 error of the actions {row['actions']['relative_l2']:.4f}")
        if row["judged_by_its_calibration_data"]:
            console.print(f"warning: {row['checkpoint']} was calibrated on these very observations; judge it by others")
    console.print(f"wrote {output}/report.html, .md and .json, {', '.join(path.name for path in pictures)}")
    _check(results, fail_above)


def _check(results: dict, fail_above: float | None) -> None:
    """Raises DuQuantError if a checkpoint's actions err by more than what is allowed, or are no numbers."""
    for row in results["checkpoints"]:
        error = row["actions"]["relative_l2"]
        if fail_above is not None and not error <= fail_above:
            name = row["checkpoint"]
            raise DuQuantError(
                f"{name}: relative L2 error of the actions {error:.4g} is above --fail-above {fail_above:g}"
            )
