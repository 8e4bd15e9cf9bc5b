"""As `openpi-duquant bench-convert`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("bench-convert")
