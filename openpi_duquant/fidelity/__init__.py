"""What a conversion changed: original and converted policies on the same observations and noise."""

from openpi_duquant.fidelity.measure import Settings
from openpi_duquant.fidelity.measure import measure

__all__ = ["Settings", "measure"]
