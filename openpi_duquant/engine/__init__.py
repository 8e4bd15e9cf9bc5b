"""pi0 and pi0.5 in plain torch, written for inference: needs neither openpi nor transformers nor jax."""

from openpi_duquant.engine.architecture import Architecture
from openpi_duquant.engine.observation import Observation
from openpi_duquant.engine.observation import preprocess
from openpi_duquant.engine.policy import Policy
from openpi_duquant.engine.policy import build_policy

__all__ = ["Architecture", "Observation", "Policy", "build_policy", "preprocess"]
