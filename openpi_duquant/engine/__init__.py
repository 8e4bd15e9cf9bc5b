"""pi0 and pi0.5 in plain torch, written for inference: needs neither openpi nor transformers nor jax."""

from openpi_duquant.engine.load import assemble
from openpi_duquant.engine.load import layers_run
from openpi_duquant.engine.load import load_policy
from openpi_duquant.engine.observation import Observation
from openpi_duquant.engine.observation import preprocess
from openpi_duquant.engine.policies import build_policy
from openpi_duquant.engine.policy import Policy

__all__ = ["Observation", "Policy", "assemble", "build_policy", "layers_run", "load_policy", "preprocess"]
