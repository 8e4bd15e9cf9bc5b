"""As `openpi-duquant inspect-checkpoint`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("inspect-checkpoint")
