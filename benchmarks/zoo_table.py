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
COLUMNS = ["architecture", "from", "published size", "parameters", "can be cut", "matrices", "left alone, and why"]
LIBRARIES = ["transformers", "timm", "torchvision"]
INTRODUCTION = """\
# Models

{count} architectures at random weights: `tests/zoo` plans, cuts, runs, differentiates, saves and loads each in a tiny
configuration, with `SVD` and with `KroneckerSVD`; layers of full rank give the same output to 1e-4. This table is about
their published sizes, with {versions}.
*Can be cut* is the share of all parameters that lies in matrices that `find_targets` finds, *matrices* their number. In
the last column `*` stands for a number in a name, and a number before a name says how many layers it stands for. A head
that is tied to the embedding is left. `python benchmarks/zoo_table.py` writes this page.
"""


def describe_left(skipped: dict[str, str]) -> str:
    """The layers that are left, grouped by reason; numbers in names and sizes in reasons left out."""
    groups: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, reason in skipped.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)
        groups[re.sub(r" \(\d+x\d+\)|: \d+(x\d+)+", "", reason)][pattern] += 1
    cells = []
    for reason, patterns in groups.items():
        names = [f"{count} `{name}`" if count > 1 else f"`{name}`" for name, count in patterns.items()]
        rest = [f"{sum(list(patterns.values())[3:])} more"] if len(names) > 3 else []
        cells.append(f"{reason}: {', '.join(names[:3] + rest)}")
    return "; ".join(cells) or "nothing"


def format_count(count: int) -> str:
    """Three digits and a unit: 109 M, 46.7 B."""
    size, unit = (count / 1e9, "B") if count >= 1e9 else (count / 1e6, "M")
    return f"{size:.3g} {unit}"


def row(architecture: Architecture) -> str:
    """One line of the table."""
    model = architecture.build_published()
    try:
        targets = lp.find_targets(model)
    except lp.PrehabError as error:
        raise SystemExit(f"{architecture.id}: {error}") from error
    total = targets.model_parameters
    cut = sum(view_of(target).weight.numel() for target in targets.values())
    cells = [architecture.name, architecture.library, f"`{architecture.size}`", format_count(total)]
    cells += [f"{cut / total:.1%}", str(len(targets)), describe_left(targets.skipped)]
    return f"| {' | '.join(cells)} |"


def installed() -> str:
    """The versions that the table depends on, as the page names them."""
    return ", ".join(f"{library} {version(library).partition('+')[0]}" for library in LIBRARIES)


def page() -> str:
    """The whole page."""
    text = INTRODUCTION.format(count=len(ARCHITECTURES), versions=installed())
    for family in dict.fromkeys(architecture.family for architecture in ARCHITECTURES):
        text += f"\n## {family.capitalize()}\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
        members = [one for one in ARCHITECTURES if one.family == family]
        with shown():
            text += "".join(f"{row(one)}\n" for one in counted(members, "run"))
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
