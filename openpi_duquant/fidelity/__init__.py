"""What a conversion changed: original and converted policies on the same observations and noise."""

from openpi_duquant.fidelity.measure import measure
from openpi_duquant.fidelity.settings import Settings

__all__ = ["Settings", "measure"]
