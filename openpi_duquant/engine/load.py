"""From a checkpoint folder, converted or original, to a policy."""

from collections.abc import Mapping
import pathlib

import torch
from torch import Tensor

from openpi_duquant.architecture import Architecture
from openpi_duquant.architecture import kept_in_float32
from openpi_duquant.checkpoint import MANIFEST_NAME
from openpi_duquant.checkpoint import Manifest
from openpi_duquant.checkpoint import SafetensorsReader
from openpi_duquant.checkpoint.load import place_quant_linears
from openpi_duquant.checkpoint.load import stored_name
from openpi_duquant.checkpoint.load import verify
from openpi_duquant.config import DuQuantError
from openpi_duquant.engine.placement import HostResident
from openpi_duquant.engine.policies import build_policy
from openpi_duquant.engine.policy import Policy
from openpi_duquant.kernels.backend import require_device
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear
from openpi_duquant.linear import prepare_


def load_policy(
    folder: pathlib.Path | str,
    *,
    backend: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    optimize: bool = True,
) -> Policy:
    """The policy of a checkpoint: quantized if `openpi-duquant convert-checkpoint` made it, else in floating point.

    Args:
        folder: A checkpoint of openpi or of ours.
        backend: Backend of the quantized layers, see `kernels.resolve`.
        dtype: Type of activations and of floating-point weights (fp32 where openpi computes in fp32).
        device: Where to put it.
        optimize: Whether to prepare it for many calls, see `Policy.optimize_`; otherwise layers keep openpi's names.

    Raises:
        DuQuantError: If a file is missing or damaged, or does not hold what its manifest says; if the backend
            cannot run, or there is no such device here.
    """
    require_device(torch.device(device))
    folder = pathlib.Path(folder)
    with SafetensorsReader(folder) as reader:
        layers: dict[str, LayerSpec] = {}
        if (folder / MANIFEST_NAME).exists():
            manifest = Manifest.load(folder)
            verify(reader, manifest, folder)
            layers, architecture = manifest.layers, manifest.architecture
        else:
            architecture = Architecture.infer(reader.shapes)
        given = {"backend": backend, "dtype": dtype, "device": device, "optimize": optimize}
        return assemble(architecture, reader, layers, **given)


def assemble(
    architecture: Architecture,
    state: Mapping[str, Tensor],
    layers: Mapping[str, LayerSpec],
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    optimize: bool = False,
) -> Policy:
    """A policy of these tensors; they are looked up one by one, what it does not use never.

    Args:
        architecture: Its sizes.
        state: Tensors by name: openpi's, and those of `LayerSpec.tensors` for quantized layers.
        layers: The quantized layers.
        backend: Their backend.
        dtype: Type of floating-point tensors (fp32 where openpi computes in fp32).
        device: Where to put them.
        optimize: See `Policy.optimize_`.

    Raises:
        DuQuantError: If a tensor is missing or of a wrong shape, or the backend cannot run.
    """
    with torch.device("meta"):
        policy = build_policy(architecture)
    place_quant_linears(policy, layers, backend=backend, dtype=dtype)
    _fill(policy, state, layers, dtype, device)
    policy.requires_grad_(requires_grad=False).eval()
    if optimize:
        policy.optimize_()
    prepare_(policy)
    return policy


def layers_run(architecture: Architecture, layers: Mapping[str, LayerSpec]) -> list[LayerSpec]:
    """The quantized layers as an optimized policy has them: merged, and without those that nothing reads.

    Args:
        architecture: Its sizes.
        layers: The quantized layers of a checkpoint.
    """
    with torch.device("meta"):
        policy = build_policy(architecture)
    place_quant_linears(policy, layers, backend="auto", dtype=torch.bfloat16)
    policy.optimize_()
    return [module.spec for module in policy.modules() if isinstance(module, QuantLinear)]


def _fill(
    policy: Policy,
    state: Mapping[str, Tensor],
    layers: Mapping[str, LayerSpec],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Gives a policy its tensors."""
    tensors: dict[str, Tensor] = {}
    sources: dict[str, Tensor] = {}
    on_host = {name for name, module in policy.named_modules() if isinstance(module, HostResident)}
    for name in policy.state_dict():
        source = stored_name(name, layers)
        if source not in state:
            raise DuQuantError(f"tensor {source} is missing")
        if source not in sources:
            place = "cpu" if name.rpartition(".")[0] in on_host else device
            sources[source] = cast(name, state[source], layers, dtype).to(place)
        tensors[name] = sources[source]
    try:
        policy.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise DuQuantError(" ".join(str(error).split())) from None


def cast(name: str, tensor: Tensor, layers: Mapping[str, LayerSpec], dtype: torch.dtype) -> Tensor:
    """Quantized layers keep their dtypes; floating-point weights take the policy's, or fp32 where openpi does."""
    if name.rpartition(".")[0] in layers:
        return tensor
    return tensor.to(torch.float32 if kept_in_float32(name) else dtype)
