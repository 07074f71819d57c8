"""Tables fit where they are shown, and lose nothing on the way."""

import io

import hypothesis.strategies as st
import pytest
from hypothesis import given
from rich.console import Console

from lightning_prehab.documents.folding import WIDEST, WIDTH, fold_name, visible, wrap
from lightning_prehab.documents.numbers import format_count
from lightning_prehab.documents.tables import Table

NAMES = st.text(st.characters(codec="utf-8"), max_size=300) | st.from_regex(r"([a-z]{1,40}\.){0,12}[a-z]{1,60}")
COLUMNS = ["layer", "shape", "rank", "parameters", "error (metric)", "predicted loss increase", "error (weight)", "ms"]
NUMBERS = ["12288x12288", "12000", "150,994,944 -> 120,000,000", "0.123", "+1.23e-05", "<0.001", "12.345 -> 10.123"]


def table(names, notes=(), spare=("ms", "error (weight)", "shape")):
    rows = [dict(zip(COLUMNS, [name, *NUMBERS], strict=True)) for name in names]
    return Table("Title", COLUMNS, rows, {}, ["a summary"], notes, spare)


def in_rich(shown, width):
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue().splitlines()


@given(st.lists(NAMES, min_size=1, max_size=5), NAMES)
def test_plain_text_is_never_wider_than_the_limit(names, note):
    lines = str(table(names, [f"3 left: {note}: {note}"])).splitlines()
    assert max(map(len, lines)) <= WIDEST
    assert all(line.isprintable() for line in lines)


@given(NAMES, st.integers(8, 60))
def test_folding_loses_nothing(name, width):
    lines = fold_name(visible(name), width)
    assert "".join(lines) == visible(name)
    assert max(map(len, lines)) <= width


@given(st.lists(NAMES.filter(str.isascii), min_size=1, max_size=4))
@pytest.mark.parametrize("width", [50, 80, 100, 200])
def test_rich_breaks_no_number(width, names):
    lines = in_rich(table(names), width)
    assert max(map(len, lines)) <= width
    shown = [number for number in NUMBERS if any(number in line for line in lines)]
    whole = next(line for line in lines if "0.123" in line or "150,994,944" in line)
    assert all(number in whole for number in shown)  # in one line, with as many as there is place for
    assert len(shown) >= {50: 2, 80: 3, 100: 3, 200: 7}[width]


def test_columns_go_in_the_order_that_is_asked_for():
    texts = {width: "\n".join(in_rich(table(["layers.*.mlp.up_proj"]), width)) for width in (140, 110, 90)}
    assert ["12.345" in text for text in texts.values()] == [True, False, False]
    assert ["<0.001" in text for text in texts.values()] == [True, True, False]


def test_names_are_folded_at_their_dots():
    name = "encoder.layer.*.attention.self.query_projection_of_a_model"
    lines = str(table([name])).splitlines()
    start = next(place for place, line in enumerate(lines) if "0.123" in line)
    assert lines[start].startswith("encoder.layer.*.")
    parts = [lines[start].split()[0], *(line.strip() for line in lines[start + 1 :])]
    assert "".join(parts) == name
    assert all(part.endswith(".") for part in parts[:1])


def test_the_summary_stands_first_and_notes_last():
    lines = str(table(["fc"], ["a note"])).splitlines()
    assert (lines[0], lines[1], lines[-2], lines[-1]) == ("a summary", "", "", "a note")
    assert in_rich(table(["fc"]), 100)[0] == "Title"
    assert str(Table("t", ["layer"], [], {}, ["nothing"])) == "nothing"


def test_remarks_are_for_other_tables():
    rows = [{"layer": "fc", "why": "tied"}]
    assert "tied" not in str(Table("t", ["layer", "rank"], rows, {}))


def test_wrapped_lines_hang():
    assert wrap("one two three four five six", 10, "  ") == ["one two", "  three", "  four", "  five six"]
    assert len(str(table(["fc"], ["word " * 60])).splitlines()[-1]) <= WIDTH


@given(st.integers(0, 10**12 - 1))
def test_counts_are_short_and_near(count):
    text = format_count(count)
    assert len(text) <= 5
    value = float(text.rstrip("KMB")) * {"K": 1e3, "M": 1e6, "B": 1e9}.get(text[-1], 1.0)
    assert value == pytest.approx(count, rel=0.051)
