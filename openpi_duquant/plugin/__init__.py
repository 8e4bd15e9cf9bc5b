"""openpi's configs, quantized: importing this registers a `<name>_duquant` beside every pi0 and pi0.5 config.

`get_config("pi05_libero_duquant")` and openpi's own scripts then work as with any other config.

Raises:
    MissingOpenpiError: On import, where openpi is not installed.
    DuQuantError: On import, on an OPENPI_DUQUANT_* variable that is unknown or malformed.
"""

from openpi_duquant.installation import require_openpi

require_openpi()

from openpi.training.config import get_config  # noqa: E402

from openpi_duquant.plugin import inference  # noqa: E402
from openpi_duquant.plugin.configs import SUFFIX  # noqa: E402
from openpi_duquant.plugin.configs import register  # noqa: E402
from openpi_duquant.plugin.configs import register_all  # noqa: E402
from openpi_duquant.plugin.policy import create_trained_policy  # noqa: E402
from openpi_duquant.plugin.quantization import Quantization  # noqa: E402

__all__ = ["SUFFIX", "Quantization", "create_trained_policy", "get_config", "register"]

register_all()
inference.install()
