"""QuantLinear: a drop-in for nn.Linear whose weight is int4 or int8 and whose input is rounded to int8."""

from collections.abc import Callable, Sequence
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch import nn

from openpi_duquant import kernels
from openpi_duquant import packing
from openpi_duquant import quant
from openpi_duquant import transforms
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.around import apply_epilogue
from openpi_duquant.kernels.around import apply_prologue
from openpi_duquant.kernels.backend import USUAL_TOKENS
from openpi_duquant.kernels.backend import Workload
from openpi_duquant.kernels.reference import NO_EPILOGUE
from openpi_duquant.kernels.reference import NO_PROLOGUE
from openpi_duquant.kernels.reference import Epilogue
from openpi_duquant.kernels.reference import Prologue
from openpi_duquant.kernels.transform import fused_transform
from openpi_duquant.linear.spec import SHARED_TENSORS
from openpi_duquant.linear.spec import LayerSpec
from openpi_duquant.profiling import in_layer
from openpi_duquant.profiling import span


class QuantizedInput(NamedTuple):
    """An activation as a backend takes it.

    Attributes:
        a: [M, K] int8 codes; weights only: fp32.
        act_scale: [M, 1] fp32; weights only: None.
        row_sum: [M, 1] int32, sums of the codes; weights only: None.
    """

    a: Tensor
    act_scale: Tensor | None = None
    row_sum: Tensor | None = None


_PREPARING = threading.RLock()


class QuantLinear(nn.Module):
    """y = x W^T + b with W in `weight_packed` and `weight_scale`, x permuted, rotated and rounded per token.

    Its tensors keep their dtypes whatever `.to(dtype)` the host calls: scales stay fp32. `dtype` follows the host's
    casts and is what `.weight.dtype` answers; the output has the input's dtype.

    Args:
        spec: The layer.
        backend: A name that `kernels.resolve` knows. What it stands for is chosen once the tensors are on their device:
            by `prepare`, by a move to a GPU, or at the first use.
        dtype: Floating-point type the host computes in.
        tokens: See `Problem.tokens`.
        device: Where the (uninitialised) tensors are made; "meta" for none.

    Raises:
        DuQuantError: On an unknown backend.
    """

    def __init__(
        self,
        spec: LayerSpec,
        *,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
        tokens: Workload = USUAL_TOKENS,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.dtype = dtype
        kernels.check_name(backend)
        self.backend = backend
        self.tokens = tokens
        self.running: str | None = None
        tensors = dict.fromkeys((*SHARED_TENSORS, "output_rotation", "bias")) | spec.tensors()
        if spec.bias:
            tensors["bias"] = dtype, (spec.out_features,)
        for name, shape in tensors.items():
            self.register_buffer(name, shape and torch.empty(shape[1], dtype=shape[0], device=device))

    @property
    def problem(self) -> kernels.Problem:
        """What a backend is told of it."""
        return self.spec.problem(self.dtype, self.tokens)

    @property
    def weight(self) -> Tensor:
        """A stand-in on the meta device: answers `.dtype` and `.shape` [N, K], holds nothing."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLinear":  # noqa: FBT001, FBT002
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.weight_scale.device))
        changes = (probe.dtype, probe.device) != (self.dtype, self.weight_scale.device)
        if changes:
            self._release()
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        self.dtype = probe.dtype
        if changes and probe.is_cuda:
            self.prepare()
        return self

    def prepared(self) -> str:
        """The backend that it runs on, chosen now if it was not."""
        if self.running is None:
            self.prepare()
        return self.running

    def prepare(self) -> None:
        """Chooses the backend for the device that the tensors are on and repacks the weight for it, in its place.

        Raises:
            DuQuantError: If the backend asked for cannot run; says every reason.
        """
        with _PREPARING:  # threads may meet here in their first calls
            if self.running is None:
                running = kernels.resolve(self.backend, self.problem, self.weight_packed.device)
                self.weight_packed = kernels.BACKENDS[running].repack(self.problem, self.weight_packed)
                self.running = running

    def _canonical_weight(self) -> Tensor:
        if self.running is None:
            return self.weight_packed
        return kernels.BACKENDS[self.running].canonical(self.problem, self.weight_packed)

    def stored_weight(self) -> Tensor:
        """The values [N, K] fp32 that codes and scales stand for: of the transformed weight."""
        return quant.dequantize_weight(packing.unpack(self._canonical_weight()), self.weight_scale)

    def _release(self) -> None:
        """Undoes `prepare`."""
        self.weight_packed, self.running = self._canonical_weight(), None

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._save_to_state_dict(destination, prefix, *args)
        destination[prefix + "weight_packed"] = self._canonical_weight()

    def _load_from_state_dict(self, *args: object) -> None:
        self._release()
        super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, object]:
        """Without what else may lie in the memory of its tensors: those of other layers, see `engine.stack`."""
        state = super().__getstate__()
        return state | {"_buffers": {name: _alone(tensor) for name, tensor in self._buffers.items()}}

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        if self.running is not None:  # in a new process its kernels are not loaded yet
            kernels.resolve(self.running, self.problem, self.weight_packed.device)

    @property
    def transform(self) -> transforms.Transform:
        """What is done to the input before it is rounded."""
        rotation = _rotation(self.spec.rotation, self.spec.rotation_block, self.rotation)
        return transforms.Transform(self.pre_rotation, self.permutation, rotation)

    @property
    def restore(self) -> transforms.Rotation:
        """The rotation that restores the output."""
        return _rotation(self.spec.output_rotation, self.spec.output_rotation_block, self.output_rotation)

    @property
    def only_rounds(self) -> bool:
        """Whether its input is rounded by a kernel and not transformed before: see `attention.attend_quantized`."""
        untransformed = all(part is None for part in self.transform)
        return untransformed and self.spec.activation_bits == 8 and kernels.BACKENDS[self.prepared()].fused

    @property
    def fuses_geglu(self) -> bool:
        """Whether its matmul applies `Epilogue.geglu` itself; else a prologue of the layer that follows costs less."""
        return kernels.BACKENDS[self.prepared()].fuses_epilogue and self.restore is None

    def quantize_input(self, x: Tensor, prologue: Prologue = NO_PROLOGUE) -> QuantizedInput:
        """Prologue, transform and rounding of x [..., K], once for all layers that share it."""
        fused = kernels.BACKENDS[self.prepared()].fused
        x = x.reshape(-1, x.shape[-1])
        if self.spec.activation_bits == 8:
            make = fused_transform if fused else reference.fused_transform
            return QuantizedInput(*make(x, self.transform, prologue))
        with span("input_transform", x):
            return QuantizedInput(self.transform.apply(prologue.apply(x).float()))

    def matmul(self, quantized: QuantizedInput, like: Tensor, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
        """epilogue(quantized W^T + b): [..., N], or [..., N / 2] for GeGLU, tokens and dtype those of `like`, as of
        `quantize_input(like)`."""
        backend = kernels.BACKENDS[self.prepared()]
        a, act_scale, row_sum = quantized
        given = {"epilogue": epilogue} if backend.fuses_epilogue else {}
        weight = self.weight_packed, self.weight_scale
        y = backend.matmul(a, act_scale, *weight, self.bias, self.restore, like.dtype, row_sum, **given)
        y = y.reshape(*like.shape[:-1], y.shape[-1])
        return y if given else epilogue.apply(y)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K], floating point -> [..., N], the same dtype."""
        return self.matmul(self.quantize_input(x), x)

    def extra_repr(self) -> str:
        """As nn.Linear's, with bits, transforms and backend."""
        spec = self.spec
        return (
            f"in_features={spec.in_features}, out_features={spec.out_features}, bias={spec.bias}, "
            f"W{spec.weight_bits}A{spec.activation_bits}, permute={spec.permute}, rotation={spec.rotation} "
            f"{spec.rotation_block}, backend={self.running or self.backend}"
        )


def _alone(tensor: Tensor | None) -> Tensor | None:
    """The tensor in memory that holds nothing else."""
    if tensor is None or tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone()


def _rotation(kind: str, block: int, matrices: Tensor | None) -> transforms.Rotation:
    return block if kind == "hadamard" else matrices


def name_layers(model: nn.Module) -> None:
    """Makes a profile count the spans of each quantized layer of `model` under its name."""
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            layer.quantize_input = in_layer(name, layer.quantize_input)
            layer.matmul = in_layer(name, layer.matmul)


def apply_linear(
    layer: nn.Module, x: Tensor, prologue: Prologue = NO_PROLOGUE, epilogue: Epilogue = NO_EPILOGUE
) -> Tensor:
    """epilogue(layer(prologue(x))), [..., N], or [..., N / 2] for GeGLU, in as few launches as the layer's backend can.

    Args:
        layer: nn.Linear or QuantLinear.
        x: [..., K], or [..., 2 K] for GeGLU, floating point.
        prologue: What is done to x first.
        epilogue: What is done to the output last.
    """
    if isinstance(layer, QuantLinear):
        return layer.matmul(layer.quantize_input(x, prologue), x, epilogue)
    return apply_epilogue(layer(apply_prologue(x, prologue)), epilogue)


def shared_forward(layers: Sequence[nn.Module], x: Tensor, prologue: Prologue = NO_PROLOGUE) -> list[Tensor]:
    """Outputs of layers that read one input; it is transformed and rounded once for those that share a group.

    Args:
        layers: nn.Linear or QuantLinear.
        x: [..., K], floating point.
        prologue: What is done to x first.

    Returns:
        [..., N_i] for every layer.
    """
    quantized: dict[str, QuantizedInput] = {}
    floating = None
    outputs = []
    for layer in layers:
        if not isinstance(layer, QuantLinear):
            floating = apply_prologue(x, prologue) if floating is None else floating
            outputs.append(layer(floating))
            continue
        if layer.spec.group not in quantized:
            quantized[layer.spec.group] = layer.quantize_input(x, prologue)
        outputs.append(layer.matmul(quantized[layer.spec.group], x))
    return outputs
