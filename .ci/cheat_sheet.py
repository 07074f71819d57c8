"""All options on one page: python .ci/cheat_sheet.py writes docs/cheat-sheet.md from signatures and docstrings.

A new parameter is on the page as soon as this is run again; ``tests/integration/test_docs.py`` says when it has to be.
"""

import argparse
import dataclasses
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning_prehab as lp
from lightning_prehab.cli.arguments import build_parser

PAGE = Path(__file__).parents[1] / "docs" / "cheat-sheet.md"
CALLBACKS = [lp.PrehabCallback, lp.CompressionCallback, lp.RehabSchedule, lp.FactorTraining, lp.PaperPrehab]
FUNCTIONS = [
    lp.compress_,
    lp.compress_folder,
    lp.find_targets,
    lp.collect_statistics,
    lp.make_plan,
    lp.apply_plan_,
    lp.refine_,
    lp.Refinement,
    lp.own_samples,
    lp.to_pivot_,
    lp.to_factors_,
    lp.to_dense_,
    lp.print_compression,
]
FILES = [lp.save_compressed, lp.load_compressed, lp.load_from_checkpoint]
METHODS = {
    "Regularizers": ("PrehabCallback(regularizer)", "regularizers"),
    "Factorizations": ("factorization=", "factorizations"),
    "Rank policies": ("policy=", "rank_policies"),
}
RECIPE = lp.Recipe(
    0.4,
    policy=lp.ParameterBudget(0.4),
    factorization=lp.KroneckerSVD(),
    target_modules=["blocks.*"],
    exclude_modules="*.head",
    rank_overrides={"blocks.0.*": 32, "blocks.1.*": 0.5, "blocks.2.fc1": "dense"},
    rank_multiple_of=8,
    split_fused=True,
    layout="pivot",
)
HEAD = """\
# All options

Every option as `name=default`, with a sentence. Headings lead to the whole description. A bold option has no default:
it must be given. `python .ci/cheat_sheet.py` writes this page from the signatures.
"""
FILE = """
## A recipe as a file

Each key of a recipe, here with a value that is not its default. What is left out has its default. Python reads it with
`Recipe.from_yaml`, the command line with `--recipe`; LightningCLI takes the same keys in the place of `keep`.

```python
import lightning_prehab as lp

recipe = lp.Recipe.from_yaml(\"\"\"
{recipe}\"\"\")
```

```yaml
trainer:
  callbacks:
    - class_path: lightning_prehab.PrehabCallback
      init_args:
        regularizer:
          class_path: lightning_prehab.TailShrinkage
          init_args: {{anneal: 0.8}}
    - class_path: lightning_prehab.CompressionCallback
      init_args:
        epoch: 6
        keep: {{keep: 0.4, rank_multiple_of: 8}}
    - class_path: lightning_prehab.RehabSchedule
      init_args: {{warmup_steps: 200}}
```
"""


def options(thing: Any) -> dict[str, str | None]:
    """``{name: default}`` as in a call; None where a value must be given."""
    parameters = inspect.signature(thing).parameters.values()
    named = [one for one in parameters if one.name != "self" and one.kind is not one.VAR_KEYWORD]
    missing = inspect.Parameter.empty
    found = {one.name: None if one.default is missing else repr(one.default) for one in named}
    for field in dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ():
        if field.default_factory is not dataclasses.MISSING:
            found[field.name] = f"{field.default_factory.__name__}()"
    return found


def described(thing: Any) -> dict[str, str]:
    """``{name: first sentence}`` of the section Args of a docstring."""
    text = inspect.getdoc(thing) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    found = re.findall(
        r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section[1] if section else "", flags=re.MULTILINE | re.DOTALL
    )
    return {name: first_sentence(sentence) for name, sentence in found}


def first_sentence(text: str) -> str:
    """The first sentence, and the next where that is only a few words."""
    sentences = re.split(r"(?<=\.) (?=[A-Z`\"(])", plain(text))
    said = sentences.pop(0)
    while sentences and len(said) < 40:
        said += f" {sentences.pop(0)}"
    return said.removesuffix(".")


def plain(text: str) -> str:
    """On one line of a table of Markdown: roles and literals of reStructuredText become code."""
    flat = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(text.split())).replace("``", "`")
    return flat.replace("|", "\\|")


def table(rows: Iterator[tuple[str, str]], head: str) -> str:
    """Two columns, which fit a telephone."""
    return f"| {head} | meaning |\n|---|---|\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def rows_of(thing: Any) -> Iterator[tuple[str, str]]:
    """A line for each option of a class or function."""
    meanings = described(thing)
    for name, default in options(thing).items():
        if name not in meanings:
            raise SystemExit(f"the docstring of {thing.__name__} does not describe {name}")
        yield (f"**`{name}`**" if default is None else f"`{name}={default}`", meanings[name])


def section(thing: Any) -> str:
    """A heading that leads to the reference, what it is, its options."""
    page = "callbacks" if thing in CALLBACKS else "plan-and-report" if thing is lp.Recipe else "functions"
    link = f"[{thing.__name__}](reference/{page}.md#lightning_prehab.{thing.__name__})"
    return f"\n### {link}\n\n{summary(thing)}\n\n{table(rows_of(thing), 'option')}"


def summary(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return plain((inspect.getdoc(thing) or "").split("\n\n")[0])


def methods(title: str) -> str:
    """The public methods of a shelf, each with its settings as in a call."""
    place, module = METHODS[title]
    found = [getattr(lp, name) for name in lp.__all__ if inspect.isclass(getattr(lp, name))]
    on_shelf = [
        one
        for one in found
        if one.__module__.startswith(f"lightning_prehab.{module}.") and dataclasses.is_dataclass(one)
    ]
    link = f"[{title}](methods/{module.replace('_', '-')}.md)"
    return f"\n### {link}\n\nFor `{place}`.\n\n{table(map(method, on_shelf), 'method, settings')}"


def method(kind: Any) -> tuple[str, str]:
    """A line for a method: its settings, and what it is."""
    given = (name if default is None else f"{name}={default}" for name, default in options(kind).items())
    return (f"`{kind.__name__}`<br>{' '.join(f'`{setting}`' for setting in given)}", summary(kind).removesuffix("."))


def arguments(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """A line for each word of a command; what must be given comes first."""
    actions = [one for one in parser._actions if one.help != argparse.SUPPRESS and one.dest not in ("help", "version")]
    for action in sorted(actions, key=lambda one: bool(one.option_strings and not one.required)):
        name = action.option_strings[-1] if action.option_strings else action.dest.upper()
        default = action.default if isinstance(action.default, list) else [action.default]
        known = [str(one) for one in default if one not in (None, False, argparse.SUPPRESS)]
        listed = str(action.metavar or "")
        choices = (
            map(str, action.choices) if action.choices else re.findall(r"[^{},]+", listed) if "{" in listed else ()
        )
        words = f" ({', '.join(choices)})" if choices else ""
        given = action.option_strings and not action.required
        yield f"`{' '.join([name, *known])}`" if given else f"**`{name}`**", plain(action.help or "") + words


def page() -> str:
    """The whole page."""
    parts = [HEAD, "\n## Callbacks\n", *map(section, CALLBACKS), "\n## In Python\n", section(lp.Recipe)]
    parts += [
        *map(section, FUNCTIONS),
        *map(section, FILES),
        "\n## Methods\n",
        *map(methods, METHODS),
        "\n## Command line\n",
    ]
    for name, parser in build_parser()[1].items():
        words = f"lightning-prehab {name}"
        parts.append(f"\n### {name}\n\n`{words}`: {parser.description}\n\n{table(arguments(parser), 'word')}")
    written = "\n".join(line for line in RECIPE.to_yaml().splitlines() if not line.startswith("#"))
    parts.append(FILE.format(recipe=written.strip() + "\n"))
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
