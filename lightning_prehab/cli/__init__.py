"""The command line: commands, what they understand, what they read."""

from lightning_prehab.cli.commands import main

__all__ = ["main"]
