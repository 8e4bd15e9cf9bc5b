"""Installed as the top-level module `_openpi_duquant_hook`, which a .pth file imports when the interpreter starts.

It waits for `openpi.training.config` to be imported, and registers the quantized configs right after it, unless
OPENPI_DUQUANT_AUTO=0. Until then it costs a look at every module's name; it imports nothing of ours before.
"""

import sys

TARGET = "openpi.training.config"


class Finder:
    """Finds nothing; wraps the loader that another finder has for openpi's configs."""

    asking = False

    def find_spec(self, name: str, path: object = None, target: object = None) -> object:
        """The spec of openpi's configs, whose loader registers ours afterwards; None for any other module."""
        if name != TARGET or self.asking:  # of two such finders, each asks the other
            return None
        self.asking = True
        try:
            others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, others), None)
        finally:
            self.asking = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: object) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    from openpi_duquant.environment import read_environment  # noqa: PLC0415

    if read_environment().auto:
        import openpi_duquant.plugin  # noqa: F401, PLC0415


sys.meta_path.insert(0, Finder())
