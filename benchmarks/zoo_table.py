"""How much of each architecture of the zoo can be cut, and which layers are left alone, why?

    python benchmarks/zoo_table.py            # writes docs/models.md
    python benchmarks/zoo_table.py --print    # prints it only

The models have their published sizes and no memory: they are built on the meta device.
"""

import argparse
import re
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "zoo"))
from architecture import Architecture
from architectures import ARCHITECTURES

import lightning_prehab as lp
from lightning_prehab.kinds import view_of
from lightning_prehab.progress import counted, shown

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
COLUMNS = ["model", "can be cut", "left"]
#: Why a layer is left: a letter, what is said of it, and how the reason that find_targets gives is known.
REASONS = {
    "E": ("an embedding: it is looked up, not multiplied", "embeddings are looked up"),
    "T": ("its weight is tied to another layer", "its weight is tied"),
    "V": (
        "many features, as a vocabulary has: its Gram matrix is large; name it to cut it",
        "the Gram matrix of",
    ),
    "S": ("it holds stacked matrices, which are not cut", "it holds stacked matrices"),
    "R": ("so small that no rank saves parameters", "no rank saves parameters"),
    "P": ("its weight is parametrized; remove the parametrization first", "its weight is parametrized"),
    "K": ("of a kind that is not known, so it may multiply in a way of its own", "is not a layer kind"),
}
LIBRARIES = ["transformers", "timm", "torchvision"]
INTRODUCTION = """\
# Models

How much of {count} architectures can be cut, in their published sizes. *Can be cut* is the share of all parameters that
lies in matrices that `find_targets` finds, and their number. The letters say which other layers with weights there are:

| | left alone, because |
|---|---|
{legend}

Below each table the layers that are left are listed by name: `*` stands for a number in a name, and a number before a
name says how many layers it stands for.

`tests/zoo` plans, cuts, runs, differentiates, saves and loads each architecture in a tiny configuration at random
weights, with `SVD` and with `KroneckerSVD`; layers of full rank give the same output to 1e-4. This page is about
{versions}; `python benchmarks/zoo_table.py` writes it.
"""
#: The names of a family: read by those who look for one.
FOLDED = """
<details markdown="1">
<summary>Names of the layers that are left</summary>

{}

</details>
"""


def letter_of(reason: str) -> str:
    """The letter of the legend for a reason."""
    for letter, (_, known) in REASONS.items():
        if known in reason:
            return letter
    raise SystemExit(f"give this reason a letter in REASONS: {reason}")


def group_left(skipped: dict[str, str]) -> dict[str, str]:
    """``{letter: names}`` of the layers that are left; numbers in names left out."""
    groups: dict[str, dict[str, int]] = {letter: defaultdict(int) for letter in REASONS}
    details: dict[str, dict[str, None]] = defaultdict(dict)
    for name, reason in skipped.items():
        letter = letter_of(reason)
        groups[letter][re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)] += 1
        if detail := re.search(r"(?<=stacked matrices \().*?(?=\))|[\d.]+ GB", reason):
            details[letter][re.sub(r": \d+(x\d+)+", "", detail[0])] = None
    found = {}
    for letter, patterns in groups.items():
        names = [f"{count} `{name}`" if count > 1 else f"`{name}`" for name, count in patterns.items()]
        rest = [f"{sum(list(patterns.values())[3:])} more"] if len(names) > 3 else []
        said = f" ({', '.join(details[letter])})" if details[letter] else ""
        if names:
            found[letter] = f"{', '.join(names[:3] + rest)}{said}"
    return found


def format_count(count: int) -> str:
    """Three digits and a unit: 109 M, 46.7 B."""
    size, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{size:.3g} {unit}"


def lines(architecture: Architecture) -> tuple[str, str]:
    """Its line of the table, and its line of the list of layers that are left (empty if none is)."""
    model = architecture.build_published()
    try:
        targets = lp.find_targets(model)
    except lp.PrehabError as error:
        raise SystemExit(f"{architecture.id}: {error}") from error
    total = targets.model_parameters
    cut = sum(view_of(target).weight.numel() for target in targets.values())
    left = group_left(targets.skipped)
    cells = [f"{architecture.name}<br>`{architecture.size}`, {architecture.library}"]
    cells += [f"{cut / total:.1%} of {format_count(total)}<br>{len(targets)} matrices", " ".join(left) or "nothing"]
    listed = "; ".join(f"{letter} {names}" for letter, names in left.items())
    return f"| {' | '.join(cells)} |", f"- {architecture.id}: {listed}" if listed else ""


def installed() -> str:
    """The versions that the table depends on, as the page names them."""
    return ", ".join(f"{library} {version(library).partition('+')[0]}" for library in LIBRARIES)


def page() -> str:
    """The whole page."""
    legend = "\n".join(f"| {letter} | {text} |" for letter, (text, _) in REASONS.items())
    text = INTRODUCTION.format(count=len(ARCHITECTURES), versions=installed(), legend=legend)
    for family in dict.fromkeys(architecture.family for architecture in ARCHITECTURES):
        members = [one for one in ARCHITECTURES if one.family == family]
        with shown():
            rows, names = zip(*(lines(one) for one in counted(members, "run")), strict=True)
        text += f"\n## {family.capitalize()}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        text += "".join(f"{row}\n" for row in rows)
        if listed := "\n".join(filter(None, names)):
            text += FOLDED.format(listed)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--print", action="store_true", help="print the page, write nothing")
    if parser.parse_args().print:
        print(page())
        return
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
