"""One row of bench-linear: a layer of the `default` preset, on one backend, taken apart."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import torch
from torch import Tensor

from openpi_duquant import kernels
from openpi_duquant import packing
from openpi_duquant.commands.simulation import SimulatedLinear
from openpi_duquant.commands.simulation import Style
from openpi_duquant.config import DuQuantError
from openpi_duquant.kernels import reference
from openpi_duquant.kernels.bitblas.launch import accumulate
from openpi_duquant.kernels.epilogue import epilogue
from openpi_duquant.kernels.timing import L2_BYTES
from openpi_duquant.kernels.timing import microseconds
from openpi_duquant.kernels.timing import wall_microseconds
from openpi_duquant.linear import LayerSpec
from openpi_duquant.linear import QuantLinear

_DEVICE = "cuda"
_LAUNCHES = 256
_NOTHING = dict.fromkeys(("transform", "matmul", "epilogue", "layer_us", "tops", "roofline", "exact", "note"))
_RESEARCH = {"rotation": "matrix", "rotation_block": 16, "output_rotation": "matrix", "output_rotation_block": 16}
_RESTORED = {"triton, restored": ("triton", _RESEARCH)}
"""What the simulation computes, as a backend does: blocks of 16 by matrices, output rows rotated and restored."""

_CEILING = {"bf16 cuBLAS": "bf16 TFLOP/s"}


def ceilings() -> dict[str, float]:
    """Rates of this GPU: of memory (bytes read and written in a large pass), of bf16 (a large product), twice for int8.

    Twice, because that is what the tensor cores of every architecture from sm_80 on can do; no library reaches it.
    """
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = microseconds(lambda _: torch.neg(source, out=target), 4)
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = microseconds(lambda _: left @ right, 4)
    rate = 2 * size**3 / product / 1e6
    return {"memory TB/s": 2 * source.nbytes / copy / 1e6, "bf16 TFLOP/s": rate, "int8 TOP/s": 2 * rate}


def measure(m: int, n: int, k: int, backend: str, rates: Mapping[str, float]) -> dict[str, Any]:
    """Microseconds of the parts; TOPS and share of the roofline of the matmul; whether accumulators are exact.

    The share is the time that the matmul's operands need at the rates of `ceilings` over the time it takes.
    """
    torch.manual_seed(0)
    x = torch.randn(m, k, device=_DEVICE, dtype=torch.bfloat16)
    try:
        row = _BASELINES[backend](x, n) if backend in _BASELINES else _backend(x, n, backend)
    except DuQuantError as error:
        return _NOTHING | {"note": str(error)}
    operations = 2 * m * n * k
    per_weight = {"bf16 cuBLAS": 2, "int8 cuBLASLt": 1}.get(backend, 0.5)
    moved = n * k * per_weight + m * k * (2 if backend == "bf16 cuBLAS" else 1) + 2 * m * n
    rate = rates[_CEILING.get(backend, "int8 TOP/s")]
    floor = max(operations / rate, moved / rates["memory TB/s"]) / 1e6
    if "matmul" in row:
        row |= {"tops": operations / row["matmul"] / 1e6, "roofline": floor / row["matmul"]}
    return _NOTHING | {"note": ""} | row


def _weights(n: int, bytes_per_row: int) -> list[Tensor]:
    """Random weights [N, bytes] uint8 that together are larger than the cache."""
    size = n * bytes_per_row
    copies = max(1, min(_LAUNCHES, -(-L2_BYTES // size)))
    pool = torch.randint(256, (copies, n, bytes_per_row), dtype=torch.uint8, device=_DEVICE)
    return list(pool)


def _bf16(x: Tensor, n: int) -> dict[str, Any]:
    weights = [torch.randn(n, x.shape[1], device="cuda").bfloat16() for _ in _weights(n, 2 * x.shape[1])]
    us = microseconds(lambda i: x @ weights[i % len(weights)].T, max(len(weights), 20))
    return {"matmul": us, "layer_us": us}


def _int8(x: Tensor, n: int) -> dict[str, Any]:
    if len(x) <= 16:
        return {"note": "needs M > 16"}
    weights = [weight.view(torch.int8) for weight in _weights(n, x.shape[1])]
    codes = torch.randint(-127, 128, x.shape, dtype=torch.int8, device="cuda")
    us = microseconds(lambda i: torch._int_mm(codes, weights[i % len(weights)].T), max(len(weights), 20))  # noqa: SLF001
    sums = torch._int_mm(codes, weights[0].T)  # noqa: SLF001
    return {"matmul": us, "exact": torch.equal(sums, reference.integer_matmul(codes, weights[0]))}


def _naive(x: Tensor, n: int, time: Callable[[Callable[[int], Tensor]], float]) -> dict[str, Any]:
    """The research code's simulation: a Python loop over blocks of 16, clones, all in floating point."""
    layer = SimulatedLinear(_random_layer(x, n, "reference", _RESEARCH), Style())
    row = {"transform": time(lambda _: layer.simulated_input(x)), "layer_us": time(lambda _: layer(x))}
    return row | {"note": "no integers"}


_BASELINES: dict[str, Callable[[Tensor, int], dict[str, Any]]] = {
    "bf16 cuBLAS": _bf16,
    "int8 cuBLASLt": _int8,
    "naive loop": lambda x, n: _naive(x, n, lambda work: wall_microseconds(lambda: work(0))),
    "naive loop, in a graph": lambda x, n: _naive(x, n, lambda work: microseconds(work, 1)),
}


def _backend(x: Tensor, n: int, name: str) -> dict[str, Any]:
    """A W4A8 layer with permutation and Hadamard rotation, or one of `_RESTORED`."""
    name, changes = _RESTORED.get(name, (name, {}))
    layer = _random_layer(x, n, name, changes)
    layer.prepare()
    weights = _weights(n, layer.weight_packed.shape[1])
    slow = name in ("reference", "fake")
    launches, replays = (2, 1) if slow else (max(len(weights), 20), 5)
    codes, scale, row_sum = layer.quantize_input(x)

    def whole(index: int) -> Tensor:
        layer.weight_packed = weights[index % len(weights)]
        return layer(x)

    row = {
        "transform": microseconds(lambda _: layer.quantize_input(x), 2 if slow else 20),
        "layer_us": microseconds(whole, launches, replays),
    }
    canonical = kernels.BACKENDS[name].canonical(layer.problem, weights[0])
    sums = reference.integer_matmul(codes, packing.unpack(canonical))
    if name == "bitblas":
        found = accumulate(codes, weights[0])
        us = microseconds(lambda i: accumulate(codes, weights[i % len(weights)]), launches)
        after = microseconds(lambda _: epilogue(found, scale, layer.weight_scale, None, None, x.dtype, row_sum), 20)
        return row | {"matmul": us, "epilogue": after, "exact": torch.equal(found, sums + 8 * row_sum)}

    def product(index: int) -> Tensor:
        weight = weights[index % len(weights)]
        return kernels.BACKENDS[name].matmul(
            codes, scale, weight, layer.weight_scale, None, layer.restore, x.dtype, row_sum
        )

    row |= {"matmul": microseconds(product, launches, replays), "note": "epilogue in matmul"}
    if name == "triton":
        ones = torch.ones_like(scale), torch.ones_like(layer.weight_scale)
        found = kernels.BACKENDS[name].matmul(codes, ones[0], weights[0], ones[1], None, None, torch.float32)
        row["exact"] = torch.equal(found, sums.float())  # int4 sums are below 2^24: fp32 holds every one
    return row


def _random_layer(x: Tensor, n: int, backend: str, changes: Mapping[str, Any]) -> QuantLinear:
    spec = LayerSpec(
        in_features=x.shape[1], out_features=n, bias=False, weight_bits=4, activation_bits=8, group_size=None,
        pre_rotation=False, permute=True, rotation="hadamard", rotation_block=64, output_rotation="none",
        output_rotation_block=0, group="x",
    )  # fmt: skip
    layer = QuantLinear(dataclasses.replace(spec, **changes), backend=backend, dtype=x.dtype, device=x.device)
    layer.weight_packed.random_(256)
    layer.weight_scale.fill_(0.01)
    layer.permutation.copy_(torch.randperm(x.shape[1]))
    for matrices in (layer.rotation, layer.output_rotation):
        if matrices is not None:
            matrices.copy_(torch.linalg.qr(torch.randn(matrices.shape, device=x.device))[0])
    return layer
