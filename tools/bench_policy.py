"""As `openpi-duquant bench-policy`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("bench-policy")
