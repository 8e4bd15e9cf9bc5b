"""As `openpi-duquant build-kernels`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("build-kernels")
