"""As `openpi-duquant evaluate-libero`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("evaluate-libero")
