"""As `openpi-duquant accuracy-report`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("accuracy-report")
