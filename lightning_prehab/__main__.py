"""``python -m lightning_prehab``."""

import sys

from lightning_prehab.cli import main

if __name__ == "__main__":
    sys.exit(main())
