"""python compile_kernels.py: PTX of every Triton kernel, as JSON; needs no GPU.

A process of its own: the interpreter, which tests run in without a GPU, and the compiler exclude each other.
"""

from collections.abc import Callable
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl

from openpi_duquant.kernels import around_triton
from openpi_duquant.kernels import attention_triton
from openpi_duquant.kernels import denoising_triton
from openpi_duquant.kernels import epilogue_triton
from openpi_duquant.kernels import layer_norm_triton
from openpi_duquant.kernels import matmul_triton
from openpi_duquant.kernels import patches_triton
from openpi_duquant.kernels import persistent_triton
from openpi_duquant.kernels import rotary_triton
from openpi_duquant.kernels import transform_triton

TYPES = {
    "a_ptr": "*i8", "weight_ptr": "*u8", "codes_ptr": "*i8", "row_sum_ptr": "*i32", "permutation_ptr": "*i64",
    "visible_ptr": "*i1", "act_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "scale_ptr": "*fp32",
    "qkv_ptr": "*u8", "o_ptr": "*u8", "up_ptr": "*u8", "down_ptr": "*u8", "qkv_scale_ptr": "*fp32",
    "o_scale_ptr": "*fp32", "up_scale_ptr": "*fp32", "down_scale_ptr": "*fp32", "qkv_permutation_ptr": "*i64",
    "up_permutation_ptr": "*i64", "norms_ptr": "*fp32", "all_sums_ptr": "*i32", "counter_ptr": "*i32",
    "accumulators": "*i32", "act_scale": "*fp32", "weight_scale": "*fp32", "row_sum": "*i32", "bias": "*bf16",
    "matrices": "*bf16", "out": "*bf16", "actions_ptr": "*fp32",
    "shift_ptr": "*fp32", "gate_ptr": "*fp32", "sums_ptr": "*fp32", "parts_ptr": "*fp32", "scale": "fp32",
}  # fmt: skip
"""Of parameters, unless a kernel gives its own; other pointers are to bf16, other numbers i32."""

_TRANSFORM = {
    "GEGLU": False, "NORM": True, "SCALE": True, "SHIFT": True, "PERMUTE": True, "FLOAT32": False, "EPS": 1e-6,
    "K": 1024,
}  # fmt: skip
_MATMUL = {
    "BN": 64, "BK": 128, "GROUP": 1, "K": 512, "INT4": True, "BIAS": False, "HADAMARD": False, "BLOCK": 0, "GAIN": 1.0,
    "HEAD": 0, "GEGLU": False, "RESIDUAL": True, "GATE": True, "EXACT": False, "INTERPRETED": False,
}  # fmt: skip
_FLOAT32 = {"weight_ptr": "*fp32", "bias_ptr": "*fp32"}
_ROTARY = {"HEAD": 256, "RESIDUAL": False, "GATE": False}
_GEGLU = {"HEAD": 8192, "GEGLU": True, "RESIDUAL": False, "GATE": False}
KERNELS: dict[str, tuple[Callable[..., None], dict[str, object]]] = {
    "row": (
        transform_triton._by_row,
        _TRANSFORM | {"ROWS": 1, "BLOCKS": 16, "B": 64, "HADAMARD": True, "BUTTERFLY": True},
    ),
    "block": (
        transform_triton._by_block,
        {name: value for name, value in _TRANSFORM.items() if name != "FLOAT32"} | {"BLOCKS": 64, "B": 16},
    ),
    "blocks": (
        transform_triton._rotate_blocks,
        {"ROWS": 64, "B": 16, "PERMUTE": True, "FLOAT32": False, "K": 1024, "out_ptr": "*fp32"},
    ),
    "matmul, few": (matmul_triton._matmul, _MATMUL | {"BM": 16}),
    "matmul, many": (matmul_triton._matmul, _MATMUL | {"BM": 128}),
    "matmul, rotary": (matmul_triton._matmul, _MATMUL | _ROTARY | {"BM": 16}),
    "matmul, GeGLU": (matmul_triton._matmul, _MATMUL | _GEGLU | {"BM": 16}),
    "prologue": (
        transform_triton._prologue,
        {"GEGLU": True, "NORM": True, "SCALE": True, "SHIFT": True, "EPS": 1e-6, "K": 1000, "PADDED": 1024},
    ),
    "residual": (around_triton._add_gated, {"GATE": True, "N": 1000, "PADDED": 1024}),
    "rotary": (rotary_triton._rotary, {"HEADS": 9, "PADDED": 16, "HALF": 128}),
    "layer norm": (layer_norm_triton._add_layer_norm, {"DELTA_BIAS": True, "EPS": 1e-6, "WIDTH": 1152, "PADDED": 2048}),
    "embed patches": (
        patches_triton._embed_patches,
        {
            "images_ptr": "*u8", "offset_ptr": "*fp32", "SIDE": 224, "SIZE": 14, "K": 640, "BM": 64, "BN": 64, "BK": 64,
        },
    ),
    "embed actions": (
        denoising_triton._embed_actions,
        {"WIDTH": 1024, "CHANNELS": 32, "PADDED": 32, "OUTPUTS": 64} | _FLOAT32,
    ),
    "euler step": (
        denoising_triton._euler_step,
        {"WIDTH": 1024, "CHANNELS": 32, "PADDED": 1024, "OUTPUTS": 4, "EPS": 1e-6} | _FLOAT32,
    ),
    "attend": (
        attention_triton._attend,
        {
            "HEADS": 8, "D": 256, "ROWS": 16, "KEYS": 64, "SPLITS": 4, "VISIBLE": True, "OWN": True,
            "STATE_FIRST": False, "EXACT": False,
        },
    ),
    "combine": (attention_triton._combine, {"SPLITS": 4, "D": 256}),
    "combine and round": (
        attention_triton._combine_quantized,
        {"SPLITS": 16, "HEADS": 8, "PADDED": 8, "D": 256, "DTYPE": tl.bfloat16},
    ),
    "epilogue": (
        epilogue_triton._epilogue,
        {
            "HAS_SUM": True, "HAS_BIAS": True, "HADAMARD": False, "BLOCK": 16, "NORM": 1.0, "PART": tl.bfloat16,
            "ROWS": 16, "COLUMNS": 64,
        },
    ),
    "layers": (
        persistent_triton._layers,
        {
            "W": 1024, "MLP": 4096, "HEADS": 8, "PADDED": 8, "D": 256, "BM": 16, "ROWS": 16, "KEYS": 32, "SPLITS": 18,
            "ADAPTIVE": True, "VISIBLE": True, "STATE_FIRST": False, "EPS": 1e-6, "SCALE": 0.1,
            "EXACT": False, "INTERPRETED": False, "QKV_COLUMNS": 32, "QKV_PERMUTE": True, "QKV_BLOCK": 64,
            "UP_COLUMNS": 64, "UP_PERMUTE": True, "UP_BLOCK": 64, "DOWN_PERMUTE": False, "DOWN_BLOCK": 64,
            "COLUMNS": 64, "O_PARTS": 8, "DOWN_PARTS": 8, "OPERATION": -1, "o_permutation_ptr": None,
            "down_permutation_ptr": None,
        },
    ),
}  # fmt: skip


def ptx(name: str, architecture: int) -> str:
    """The PTX of a kernel for an architecture such as 90."""
    kernel, given = KERNELS[name]
    own = {parameter: value for parameter, value in given.items() if isinstance(value, str)}
    constants = {parameter: value for parameter, value in given.items() if parameter not in own}
    known = [parameter for parameter in kernel.arg_names if parameter not in constants]
    types = {p: (TYPES | own).get(p, "*bf16" if p.endswith("_ptr") else "i32") for p in known}
    signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
    places = {(kernel.arg_names.index(parameter),): value for parameter, value in constants.items()}
    source = ASTSource(kernel, signature, places)
    options = {"num_warps": 8} if name == "layers" else {}
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]


if __name__ == "__main__":
    sys.stdout.write(json.dumps({name: [ptx(name, architecture) for architecture in (80, 90)] for name in KERNELS}))
