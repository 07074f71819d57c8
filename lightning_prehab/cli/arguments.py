"""What the command line understands. Nothing large is imported here: ``--help`` answers at once."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from lightning_prehab.__about__ import __version__

PROGRAM = "lightning-prehab"
#: Short names; what they stand for is in :mod:`lightning_prehab.cli.recipes`.
METHODS = ("svd", "activation", "fisher", "whitened", "kronecker")
POLICIES = ("budget", "ratio", "probe", "zero-sum")
#: Those of :data:`lightning_prehab.linalg.storage.Layout`.
LAYOUTS = ("factors", "pivot")
#: Those of :mod:`lightning_prehab.report.figures`.
FIGURES = ("ranks", "errors", "parameters", "spectra", "latency")

_EPILOG = """the usual way:
  %(prog)s plan my-model --data lines.txt --keep 0.4 0.6 --output plan.yaml
  %(prog)s compress my-model --plan plan-0.6.yaml --output small
  %(prog)s report small
  %(prog)s bench my-model --compressed small

"%(prog)s COMMAND --help" lists the options of a command."""


class Parser(argparse.ArgumentParser):
    """A parser that says in one sentence what is wrong, without listing everything that there is."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit code 2."""
        message = re.sub(r"^argument ([^:]+): ", r"\1 ", message)
        missing = message.partition("the following arguments are required: ")[2]
        if missing:
            message = "missing: " + "; ".join(self._described(name) for name in missing.split(", "))
        end = "" if message.endswith(("?", ".")) else "."
        self.exit(2, f'error: {message}{end}\n"{self.prog} --help" says what can be given.\n')

    def _described(self, name: str) -> str:
        for action in self._actions:
            if name in (*action.option_strings, action.metavar):
                return f"{name} ({action.help})"
        return name

    def check_options(self, words: Sequence[str]) -> None:
        """Ends the program if there is an unknown option; the nearest known one is named."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in words:
            option = word.partition("=")[0]
            if word == "--":
                return
            if re.match("--?[a-zA-Z]", word) and option not in known:
                short = [name for name in known if name.startswith(f"-{option}")]  # -o for --output
                near = short or get_close_matches(option, [name for name in known if len(name) > 2], 1, 0.5)
                self.error(f"there is no option {option}" + (f"; did you mean {near[0]}?" if near else ""))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options that were given; ``command`` among them.

    Args:
        words: Of the command line; None takes those of the process.

    Raises:
        SystemExit: If something is wrong (2), or help or the version were asked for (0).
    """
    words = sys.argv[1:] if words is None else list(words)
    parser, commands = build_parser()
    first = words[0] if words else ""
    if first in commands:
        commands[first].check_options(words[1:])
    elif not first:
        parser.error(f"give a command: {', '.join(commands)}")
    elif not first.startswith("-"):
        near = get_close_matches(first, commands, 1, 0.5)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
        parser.error(f"there is no command {first!r}; {meant}")
    elif first not in ("-h", "--help", "--version"):
        parser.error(f"give the command before its options: {', '.join(commands)}")
    settings, more = parser.parse_known_args(words)
    if more:
        commands[first].error(f"{more[0]!r} is one word too many")
    return settings


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of all commands, and that of each."""
    parser = Parser(
        prog=PROGRAM,
        description="SVD compression of neural networks: Hugging Face folders and Lightning checkpoints.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    adding = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    commands: dict[str, Parser] = {}

    def command(name: str, usage: str, text: str) -> Parser:
        usage = f"{PROGRAM} {name} {usage} [options]"
        commands[name] = adding.add_parser(name, usage=usage, help=text, description=text)
        return commands[name]

    planning = command("plan", "SOURCE", "Show what a budget would do to each layer; the model is not changed.")
    compressing = command("compress", "SOURCE --output FOLDER", "Write a compressed model and its report.")
    reporting = command("report", "FOLDER", "Show a report that compress has written.")
    measuring = command("bench", "SOURCE --compressed FOLDER", "Measure the dense against the compressed model here.")
    for made in (planning, compressing, measuring):
        made.add_argument("source", metavar="SOURCE", help="Hugging Face folder, or a Lightning checkpoint (.ckpt)")
    planning.add_argument(
        "--keep", type=share, nargs="+", metavar="SHARE", help="of the targets' parameters; one or several (0.5)"
    )
    planning.add_argument("--output", metavar="FILE", help="write the plan as YAML, what calibration saw beside it")
    planning.add_argument("--force", action="store_true", help="replace a plan that is there")
    compressing.add_argument("--output", metavar="FOLDER", required=True, help="the folder to write")
    compressing.add_argument("--keep", type=share, metavar="SHARE", help="of the targets' parameters (0.5)")
    compressing.add_argument(
        "--plan", type=file, metavar="FILE", help="carry out what plan --output has written, edited or not"
    )
    compressing.add_argument(
        "--refine",
        type=count,
        nargs="?",
        const=True,
        metavar="STEPS",
        help="train the cut model, without labels, toward the dense one (128 steps; --offload: 32 a block)",
    )
    compressing.add_argument("--force", action="store_true", help="replace a compressed model that is there")
    compressing.add_argument(
        "--offload", action="store_true", help="one block in memory at a time: for folders larger than memory"
    )
    compressing.add_argument("--memory", metavar="SIZE", help="what --offload may take, such as 3GB")
    measuring.add_argument("--compressed", metavar="FOLDER", required=True, help="the folder that compress has written")
    measuring.add_argument(
        "--batch-sizes", type=count, nargs="+", metavar="N", default=[1, 8], help="rows of the measured batches (1 8)"
    )
    for made in (planning, compressing, measuring):
        made.add_argument("--model", metavar="CLASS", help="class of the checkpoint: some.module.ClassName (imported)")
        _add_data(made, own=made is not measuring)
        if made is not measuring:
            made.add_argument(
                "--evaluate",
                type=evaluation,
                metavar="SHARE",
                help="of the data, held back to say what the model is worth; or a file, or 0 (0.1 of 30 rows and more)",
            )
        made.add_argument("--batch-size", type=count, metavar="N", default=8, help="rows of a batch of the data (8)")
        made.add_argument("--max-length", type=count, metavar="N", default=128, help="tokens of a line of text (128)")
        made.add_argument("--device", type=device, default="cpu", help="where to compute (cpu)")
    for made in (planning, compressing):
        _add_recipe(made)
    reporting.add_argument("path", metavar="FOLDER", help="what compress has written, or a report.json")
    reporting.add_argument("--html", metavar="FILE", help="write a page with figures too (extra plot)")
    reporting.add_argument(
        "--png", type=figure, metavar="NAME=FILE", nargs="+", help=f"write figures: {', '.join(FIGURES)}"
    )
    reporting.add_argument("--bench", type=file, metavar="FILE", help="what bench --json has printed, for latencies")
    reporting.add_argument(
        "--metrics", type=file, metavar="FILE", help="metrics.csv of the run: a timeline in the page"
    )
    for made in (planning, compressing, reporting):
        made.add_argument("--all", action="store_true", help="print a row for each layer, however many there are")
    for made in commands.values():
        made.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser, commands


def _add_recipe(parser: Parser) -> None:
    """How a model is to be cut."""
    group = parser.add_argument_group("how to cut")
    group.add_argument("--method", **_one_of(METHODS), help="default: kronecker with data, svd without")
    group.add_argument("--policy", **_one_of(POLICIES), help="default: budget for kronecker, ratio for others")
    group.add_argument(
        "--trials", type=count, metavar="N", help="try so many whole cuts on held-back data, and take the best"
    )
    group.add_argument("--target-modules", metavar="NAME", nargs="+", help="names or patterns to take")
    group.add_argument("--exclude-modules", metavar="NAME", nargs="+", help="names or patterns to leave")
    group.add_argument(
        "--rank-override",
        metavar="PATTERN=RANK",
        type=override,
        nargs="+",
        help="a rank, a share of the layer's parameters below 1, or dense",
    )
    group.add_argument("--rank-multiple-of", type=count, metavar="N", help="ranks are multiples of this (1)")
    group.add_argument("--layout", **_one_of(LAYOUTS), help="how a cut matrix is stored; pivot needs less (factors)")
    group.add_argument("--split-fused", action="store_true", help="cut queries, keys and values each for itself")
    group.add_argument("--layers-at-once", type=count, metavar="N", help="calibrate so many at a time, in less memory")
    group.add_argument("--recipe", type=file, metavar="FILE", help="YAML of all this; options given beside it win")


def _add_data(parser: Parser, *, own: bool) -> None:
    """What is looked at: the user's data, and, if so said, what the model writes."""
    text = "lines of text, or batches as .pt or .safetensors"
    if not own:
        parser.add_argument("--data", type=file, metavar="FILE", help=text)
        return
    words = "lines of text, batches (.pt, .safetensors), none, or self: the model writes it (default, if it can)"
    parser.add_argument("--data", type=data, metavar="FILE", help=words)
    parser.add_argument(
        "--self-share", type=mixture, metavar="SHARE", help="of all tokens, written by the model beside --data FILE"
    )
    parser.add_argument("--self-sequences", type=count, metavar="N", help="of --data self, of 512 tokens each (64)")


def share(word: str) -> float:
    """A share to keep, in ``(0, 1]``.

    >>> share("0.5")
    0.5
    """
    try:
        value = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1], such as 0.5, got {word}") from None
    if not 0.0 < value <= 1.0:
        hint = f"; {value:g} % is {value / 100:g}" if 1.0 < value <= 100.0 else ""
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {word}{hint}")
    return value


def count(word: str) -> int:
    """A whole number from 1."""
    if not re.fullmatch("[0-9]+", word) or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {word}")
    return int(word)


def file(word: str) -> str:
    """A file that is there."""
    path = Path(word)
    if not path.is_file():
        raise argparse.ArgumentTypeError(
            f"{word} is a folder, give a file" if path.is_dir() else f"{word} does not exist"
        )
    return word


def data(word: str) -> str:
    """A file that is there, ``self`` or ``none``; a file of that name is ``./self``."""
    return word if word in ("self", "none") else file(word)


def mixture(word: str) -> float:
    """A share between 0 and 1."""
    try:
        value = float(word)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"must be a number in (0, 1), such as 0.5, got {word}; alone: --data self")
    return value


def evaluation(word: str) -> float | str:
    """A share below 1, or a file that is there."""
    try:
        value = float(word)
    except ValueError:
        return file(word)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be a share in [0, 1) or a file, got {word}")
    return value


def figure(word: str) -> tuple[str, str]:
    """``NAME=FILE``."""
    name, _, path = word.partition("=")
    if name not in FIGURES or not path:
        raise argparse.ArgumentTypeError(f"takes NAME=FILE with a NAME of {', '.join(FIGURES)}, got {word!r}")
    return name, path


def device(word: str) -> str:
    """A device whose tensors have values."""
    if word.partition(":")[0] == "meta":
        raise argparse.ArgumentTypeError("cannot be meta: it holds no values")
    return word


def override(word: str) -> tuple[str, int | float | str]:
    """``PATTERN=RANK``.

    >>> override("a.*=4"), override("b=0.3"), override("c=d=dense")
    (('a.*', 4), ('b', 0.3), ('c=d', 'dense'))
    """
    pattern, _, rank = word.rpartition("=")
    if not pattern:
        raise argparse.ArgumentTypeError(f"takes PATTERN=RANK, got {word!r}")
    if rank == "dense":
        return pattern, rank
    try:
        return pattern, int(rank) if rank.lstrip("+-").isdigit() else float(rank)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{word!r}: give a rank, a share of the parameters such as 0.3, or dense"
        ) from None


def _one_of(names: Sequence[str]) -> dict[str, Any]:
    def known(word: str) -> str:
        if word not in names:
            near = get_close_matches(word, names, 1, 0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(names)}, got {word!r}{hint}")
        return word

    chosen: Callable[[str], str] = known
    return {"type": chosen, "metavar": "{" + ",".join(names) + "}"}
