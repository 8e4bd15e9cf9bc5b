"""openpi-duquant build-kernels."""

import pathlib
import re

import torch
import tyro

from openpi_duquant.checkpoint import Manifest
from openpi_duquant.commands.console import console
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine import layers_run
from openpi_duquant.kernels.backend import architecture
from openpi_duquant.kernels.bitblas import build
from openpi_duquant.kernels.bitblas import loading
from openpi_duquant.kernels.bitblas import operators


def build_kernels(checkpoint: tyro.conf.Positional[pathlib.Path], *, arch: str = "auto") -> None:
    """Build the BitBLAS kernels that a converted checkpoint needs into the cache; needs BitBLAS and nvcc, no GPU.

    They are those of both runtimes: of the checkpoint's own layers, and of the engine's, which merges some. Where the
    cache has them, the checkpoint runs without BitBLAS and without nvcc.

    Args:
        checkpoint: A checkpoint that convert-checkpoint made.
        arch: Architecture of the GPU they are for, as sm_90; auto is that of the GPU here.
    """
    architecture = _architecture(arch)
    manifest = Manifest.load(checkpoint)
    specs = *manifest.layers.values(), *layers_run(manifest.architecture, manifest.layers)
    problems = {spec.problem(torch.bfloat16) for spec in specs}
    reasons = {reason for problem in problems for reason in loading.unsupported(problem)}
    runnable = [problem for problem in problems if not loading.unsupported(problem)]
    for reason in sorted(reasons):
        console.print(f"layers left out: {reason}")
    if not runnable:
        raise DuQuantError(f"{checkpoint}: BitBLAS can run none of its layers")
    needed = sorted({operator for problem in runnable for operator in operators.operators(problem)}, key=str)
    folder = build.build(needed, architecture)
    console.print(f"{len(needed)} kernels for {architecture} in {folder}")


def _architecture(name: str) -> str:
    if name == "auto":
        if not torch.cuda.is_available():
            raise DuQuantError("arch: there is no GPU here to build for; name one, as --arch sm_90")
        return architecture(torch.device("cuda"))
    if not re.fullmatch(r"sm_[89]\d|sm_1\d\d", name):
        raise DuQuantError(f"arch: {name!r} is not sm_80 or later, as sm_90")
    return name
