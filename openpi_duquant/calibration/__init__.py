"""Calibration of a policy: each decoder layer reads what its quantized predecessors make of recorded observations.

The original runs once, to record what enters its two Gemmas: the embedded prefix, and the embedded suffix of every
denoising step. After that, one decoder layer of each is in memory at a time, and the hidden states before it.
"""

from openpi_duquant.calibration.calibrator import Calibrator
from openpi_duquant.calibration.states import record_states

__all__ = ["Calibrator", "record_states"]
