"""Where the command line begins. What a command works with is imported once its words have been understood."""

import re
import sys
from collections.abc import Sequence
from typing import Any

from lightning_prehab.cli.arguments import parse
from lightning_prehab.cli.warned import plainly
from lightning_prehab.errors import PrehabError, is_out_of_memory, reason

#: Names of arguments that messages begin with, and those of their options.
_OPTIONS = {
    "exclude_modules": "exclude_modules",
    "memory": "memory",
    "rank_overrides": "rank_override",
    "target_modules": "target_modules",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Results go to standard output, progress and errors to standard error.

    Args:
        arguments: Words of the command line; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 refused (the reason is one sentence), 130 interrupted.

    Raises:
        SystemExit: With 2 if the arguments are wrong (one sentence says how), with 0 after help or the version.
    """
    settings = parse(arguments)
    try:
        from lightning_prehab.cli.commands import COMMANDS

        with plainly():
            COMMANDS[settings.command](settings)
    except PrehabError as error:
        print(f"error: {_with_option(str(error), settings)}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {reason(error)}. A smaller --batch-size or --max-length takes less.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _with_option(message: str, settings: Any) -> str:
    """A message that begins with the name of an argument, with the option that it was given with instead."""
    argument = re.split("[: ]", message, maxsplit=1)[0]
    name = _OPTIONS.get(argument)
    if name is None or getattr(settings, name, None) is None:
        return message
    return f"--{name.replace('_', '-')}{message.removeprefix(argument)}"
