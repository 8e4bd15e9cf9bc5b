"""From a checkpoint folder, original or converted, to the model that openpi's Policy drives, in either runtime."""

import importlib.metadata
import logging
import pathlib
from typing import Any

import torch
from torch import nn

from openpi_duquant import kernels
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.config import DuQuantError
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import name_layers
from openpi_duquant.linear import prepare_
from openpi_duquant.plugin.converted import converted_folder
from openpi_duquant.plugin.engine_model import EngineModel
from openpi_duquant.plugin.engine_model import Pi0ConfigLike
from openpi_duquant.plugin.module_model import load_module
from openpi_duquant.plugin.quantization import Quantization
from openpi_duquant.profiling import profile_until_exit

logger = logging.getLogger("openpi_duquant")

_ANY_LAYER = kernels.Problem(2048, 1024, 4, 8, 1, "none", 0, torch.bfloat16)


def load_model(folder: pathlib.Path, config: Pi0ConfigLike, quantization: Quantization) -> nn.Module:
    """The quantized model of a checkpoint; an original one is converted first, once.

    Args:
        folder: The checkpoint.
        config: openpi's model config.
        quantization: How to quantize, and what runs it.

    Returns:
        openpi's PI0Pytorch with quantized layers, or the engine behind its interface. `duquant` holds the facts: what
        was quantized, what runs it, the versions.

    Raises:
        DuQuantError: If the checkpoint is damaged, is of another model than the config, was converted otherwise than
            asked for, or if a layer, backend or runtime cannot be had. There is never a policy in floating point.
    """
    environment = quantization.environment
    if environment.dry_run:
        raise DuQuantError(
            "OPENPI_DUQUANT_DRYRUN is set, so no policy is loaded; openpi-duquant convert-checkpoint lists the layers"
        )
    if environment.profile:
        profile_until_exit(environment.profile, sync=environment.profile_sync)
        logger.warning(
            "profiling runs without torch.compile and without CUDA graphs: inside them nothing is timed apart"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where openpi puts it
    kernels.check_name(environment.backend)  # a conversion takes minutes: refuse before it
    if device.type == "cpu":
        kernels.resolve(environment.backend, _ANY_LAYER, device)
    folder = converted_folder(folder, quantization)
    manifest = Manifest.load(folder)
    for field in ("pi05", "action_dim"):
        has, wanted = getattr(manifest.architecture, field), getattr(config, field)
        if has != wanted:
            raise DuQuantError(f"{folder}: its model has {field}={has}, the config {wanted}; take the config it is of")
    load = {"engine": EngineModel.load, "module": load_module}[environment.runtime]
    problems = [spec.problem(getattr(torch, config.dtype)) for spec in manifest.layers.values()]
    kernels.load(environment.backend, problems, device)
    model = load(folder, manifest, config, backend=environment.backend).to(device)
    prepare_(model)
    model.duquant = facts(model, manifest, environment.runtime)
    logger.info("%s: %s", folder, describe(model.duquant))
    if environment.debug:
        for name, spec in manifest.layers.items():
            logger.info("%s: %s", name, spec)
    if environment.profile:
        name_layers(model)
    return model


def facts(model: nn.Module, manifest: Manifest, runtime: str) -> dict[str, Any]:
    """What is quantized and what runs it, as JSON values: the policy's metadata, and the stamp of results."""
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    return {
        "layers": manifest.counts["layers"],
        "layers_run": len(layers),  # the engine leaves out those whose output nothing reads
        "quantized_parameters": manifest.counts["quantized_parameters"],
        "quantized_bytes": manifest.counts["quantized_bytes"],
        "bytes": manifest.counts["bytes"],
        "config": manifest.config.to_json(),
        "runtime": runtime,
        "backends": sorted({layer.running or layer.backend for layer in layers}),
        "sha256": manifest.sha256,
        "source_sha256": manifest.source["sha256"],
        "versions": {name: importlib.metadata.version(name) for name in ("openpi-duquant", "torch", "numpy")},
    }


def describe(values: dict[str, Any]) -> str:
    """The facts in one line."""
    config = values["config"]
    return (
        f"{values['layers']} layers quantized, W{config['weight_bits']}A{config['activation_bits']}, "
        f"rotation {config['rotation']}, runtime {values['runtime']}, backend {', '.join(values['backends'])}"
    )
