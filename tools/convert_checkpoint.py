"""As `openpi-duquant convert-checkpoint`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("convert-checkpoint")
