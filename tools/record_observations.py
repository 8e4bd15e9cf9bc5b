"""As `openpi-duquant record-observations`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("record-observations")
