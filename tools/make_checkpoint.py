"""As `openpi-duquant make-checkpoint`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("make-checkpoint")
