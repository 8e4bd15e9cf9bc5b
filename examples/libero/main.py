"""Evaluate a policy in LIBERO; as `openpi-duquant evaluate-libero`, see docs/libero.md."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("evaluate-libero")
