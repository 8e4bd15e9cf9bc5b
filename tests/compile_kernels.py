"""python compile_kernels.py: PTX of every Triton kernel that may be launched dependently, as JSON; needs no GPU.

A process of its own: the interpreter, which tests run in without a GPU, and the compiler exclude each other.
"""

from collections.abc import Callable
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton.language as tl

from openpi_duquant.kernels import attention_triton
from openpi_duquant.kernels import layer_norm_triton
from openpi_duquant.kernels import matmul_triton
from openpi_duquant.kernels import rotary_triton
from openpi_duquant.kernels import transform_triton

TYPES = {
    "a_ptr": "*i8", "weight_ptr": "*u8", "codes_ptr": "*i8", "row_sum_ptr": "*i32", "permutation_ptr": "*i64",
    "visible_ptr": "*i1", "act_scale_ptr": "*fp32", "weight_scale_ptr": "*fp32", "scale_ptr": "*fp32",
    "shift_ptr": "*fp32", "gate_ptr": "*fp32", "sums_ptr": "*fp32", "parts_ptr": "*fp32", "scale": "fp32",
}  # fmt: skip
"""Of parameters; other pointers are to bf16, other numbers i32."""

_TRANSFORM = {
    "GEGLU": False, "NORM": True, "SCALE": True, "SHIFT": True, "PERMUTE": True, "FLOAT32": False, "EPS": 1e-6,
    "K": 1024,
}  # fmt: skip
_MATMUL = {
    "BN": 64, "BK": 128, "GROUP": 1, "K": 512, "INT4": True, "BIAS": False, "HADAMARD": False, "BLOCK": 0, "GAIN": 1.0,
    "HEAD": 0, "RESIDUAL": True, "GATE": True, "EXACT": False, "INTERPRETED": False,
}  # fmt: skip
_ROTARY = {"HEAD": 256, "RESIDUAL": False, "GATE": False}
KERNELS: dict[str, tuple[Callable[..., None], dict[str, object]]] = {
    "row": (
        transform_triton._by_row,
        _TRANSFORM | {"ROWS": 1, "BLOCKS": 16, "B": 64, "HADAMARD": True, "BUTTERFLY": True},
    ),
    "block": (transform_triton._by_block, _TRANSFORM | {"ROWS": 16, "B": 16}),
    "matmul, few": (matmul_triton._matmul, _MATMUL | {"BM": 16, "LINES": 4}),
    "matmul, many": (matmul_triton._matmul, _MATMUL | {"BM": 128, "LINES": 0}),
    "matmul, rotary": (matmul_triton._matmul, _MATMUL | _ROTARY | {"BM": 16, "LINES": 4}),
    "rotary": (rotary_triton._rotary, {"HEADS": 9, "PADDED": 16, "HALF": 128}),
    "layer norm": (layer_norm_triton._add_layer_norm, {"EPS": 1e-6, "WIDTH": 1152, "PADDED": 2048}),
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
}  # fmt: skip


def ptx(name: str, architecture: int, *, dependent: bool) -> str:
    """The PTX of a kernel for an architecture such as 90."""
    kernel, constants = KERNELS[name]
    constants = constants | {"PDL": dependent}
    known = [parameter for parameter in kernel.arg_names if parameter not in constants]
    types = {parameter: TYPES.get(parameter, "*bf16" if parameter.endswith("_ptr") else "i32") for parameter in known}
    signature = {parameter: types.get(parameter, "constexpr") for parameter in kernel.arg_names}
    places = {(kernel.arg_names.index(parameter),): value for parameter, value in constants.items()}
    options = {"launch_pdl": True} if dependent else {}
    source = ASTSource(kernel, signature, places)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]


if __name__ == "__main__":
    compiled = {name: [ptx(name, 90, dependent=True), ptx(name, 90, dependent=False)] for name in KERNELS}
    sys.stdout.write(json.dumps(compiled))
