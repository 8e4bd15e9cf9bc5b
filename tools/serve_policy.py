"""As `openpi-duquant serve-policy`."""

from openpi_duquant.commands import main

if __name__ == "__main__":
    main("serve-policy")
