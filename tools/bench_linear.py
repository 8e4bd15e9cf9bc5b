"""As `openpi-duquant bench-linear`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("bench-linear")
