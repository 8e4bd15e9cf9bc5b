"""As `openpi-duquant tune-tiles`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("tune-tiles")
