"""python -m openpi_duquant, as `openpi-duquant`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main()
