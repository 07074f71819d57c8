"""The command line: commands, what they understand, what they read."""

from lightning_prehab.cli.entry import main

__all__ = ["main"]
