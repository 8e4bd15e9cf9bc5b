"""BitBLAS: W4A8, W8A8 and weights-only W4A16 on NVIDIA GPUs from sm_80 on; measured on sm_90.

BitBLAS generates the kernels (`generate`, in a process of its own, with the faults in `patches` mended), nvcc compiles
them into a cache (`build`, `cache`), the driver loads them (`driver`) and integers test them (`loading`). A policy that
finds its kernels in the cache needs neither BitBLAS nor nvcc.
"""

from openpi_duquant.kernels.backend import Backend
from openpi_duquant.kernels.bitblas.launch import matmul
from openpi_duquant.kernels.bitblas.loading import can_run
from openpi_duquant.kernels.bitblas.loading import load
from openpi_duquant.kernels.bitblas.operators import canonical
from openpi_duquant.kernels.bitblas.operators import repack

BACKEND = Backend(matmul, can_run, load, repack, canonical, fused=True)
