"""As `openpi-duquant doctor`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("doctor")
