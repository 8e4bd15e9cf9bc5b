"""Makes kernels with BitBLAS and nvcc. A program of its own: BitBLAS brings its own TVM and TileLang into a process.

    python -m openpi_duquant.kernels.bitblas.generate < job.json

The job names the architecture, nvcc, the folder and the operators; a line is printed for every one that is done.
"""

from collections.abc import Mapping
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from openpi_duquant.kernels.bitblas import patches
from openpi_duquant.kernels.bitblas.cache import Entry
from openpi_duquant.kernels.bitblas.operators import Operator
from openpi_duquant.kernels.bitblas.operators import Tile

_TARGET = "cuda -arch=sm_80"  # for sm_90 BitBLAS generates code that does not compile


def main() -> None:
    """Reads the job from stdin."""
    job = json.load(sys.stdin)
    bitblas = patches.import_bitblas()
    compiler = Compiler(job["nvcc"], job["architecture"], pathlib.Path(bitblas.__file__).parent / "3rdparty")
    folder = pathlib.Path(job["folder"])
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = []
        for values in job["operators"]:
            operator = Operator(**{**values, "tile": Tile(**values["tile"])})
            futures.append(pool.submit(_make, compiler, folder, operator, *lower(operator)))
        for future in concurrent.futures.as_completed(futures):
            print(future.result(), flush=True)  # noqa: T201


def _make(compiler: "Compiler", folder: pathlib.Path, operator: Operator, source: str, shared_memory: int) -> str:
    tile = operator.tile
    launch = {"threads": tile.threads, "rows": tile.rows, "columns": tile.columns, "shared_memory": shared_memory}
    Entry(folder, operator.name).store(compiler(source), launch)
    return operator.name


def lower(operator: Operator) -> tuple[str, int]:
    """CUDA source of an operator, and the bytes of dynamic shared memory that it needs."""
    from bitblas.utils.rtmod_analysis import get_annotated_device_mod
    import tilelang
    import tvm

    tvm.register_func("tilelang_callback_cuda_compile", lambda _code, _target: bytearray(b"-"), override=True)
    function = _schedule(operator).with_attr("global_symbol", operator.name)
    module, target = tvm.IRModule({operator.name: function}), tvm.target.Target(_TARGET)
    with tvm.transform.PassContext(config={"tir.use_async_copy": True, "tir.disable_cse_tir": True}):
        built = tilelang.lower(module, target=target, runtime_only=True)
        (device,) = get_annotated_device_mod(module, target, backend="tl").functions.values()
    source = built.imported_modules[0].get_source().replace(f"{operator.name}_kernel", operator.name)
    return patches.mend_barriers(source), int(device.attrs["dyn_shared_memory_buf"])


def _schedule(operator: Operator) -> Any:  # noqa: ANN401
    """BitBLAS's scheduled function (TVM); M is dynamic, split-K off: it starts from memory that is not yet zero."""
    tile = operator.tile
    cut = {
        "block_row_warps": tile.row_warps,
        "block_col_warps": tile.column_warps,
        "warp_row_tiles": tile.warp_rows,
        "warp_col_tiles": tile.warp_columns,
        "chunk": tile.chunk,
        "num_stages": tile.stages,
        "enable_rasterization": False,
    }
    scheduler = _scheduler(operator.kind, {"M": (1, 2), "N": operator.n, "K": operator.k})
    return scheduler.apply_config(**cut, **({} if operator.kind == "w8a8" else {"split_k_factor": 1}))


def _scheduler(kind: str, shape: Mapping[str, object]) -> Any:  # noqa: ANN401
    """The scheduler of BitBLAS for a kind of operator; `operators.repack` makes the weights that each reads."""
    from bitblas.base.operator_common import TransformKind
    from bitblas.ops.general_matmul.tilelang import dense
    from bitblas.ops.general_matmul.tilelang import dequantize

    layout = {"trans_A": False, "trans_B": True}
    integers = {"in_dtype": "int8", "out_dtype": "int32", "accum_dtype": "int32"}
    floats = {"in_dtype": "float16", "out_dtype": "float32", "accum_dtype": "float32"}
    int4 = {"num_bits": 4, "storage_dtype": "int8"}
    if kind == "w8a8":
        return dense.matmul_mma.MatmulMMAScheduler(**shape, **layout, **integers)
    if kind == "w4a16":
        plain = dequantize.matmul_dequantize_mma.MatmulDequantizeMMAScheduler
        return plain(**shape, **layout, **floats, **int4, source_format="int")
    # Fast decoding of int4 to int8 subtracts 7 where it should subtract 8; of uint4 it is right.
    propagated = dequantize.matmul_dequantize_mma_weight_transform.MatmulDequantizeMMAWeightPropagationScheduler
    fast = {"source_format": "uint", "fast_decoding": True, "weight_transform_kind": TransformKind.LDMatrixTransform}
    return propagated(**shape, **layout, **integers, **int4, **fast)


class Compiler:
    """nvcc, for one architecture: source -> cubin.

    Args:
        nvcc: Its path.
        architecture: "sm_90", say; the code is generated for compute_80, whose instructions later ones have.
        third_party: BitBLAS's folder of headers.
    """

    def __init__(self, nvcc: str, architecture: str, third_party: pathlib.Path) -> None:
        headers = [f"-I{third_party / 'tilelang' / 'src'}", f"-I{third_party / 'cutlass' / 'include'}"]
        code = ["-gencode", f"arch=compute_80,code={architecture}"]
        self.command = [nvcc, "-cubin", "-std=c++17", "-w", "--use_fast_math", *code, *headers]

    def __call__(self, source: str) -> bytes:
        """Compiles; raises CalledProcessError, whose output is on stderr."""
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "kernel.cu")
            path.write_text(source)
            cubin = path.with_suffix(".cubin")
            subprocess.run([*self.command, str(path), "-o", str(cubin)], check=True)
            return cubin.read_bytes()


if __name__ == "__main__":
    main()
