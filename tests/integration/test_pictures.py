"""The picture of the README is made by its script, and is what pages can show."""

import runpy
import struct
import sys
from pathlib import Path

import pytest

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SCRIPTS = sorted(IMAGES.glob("*.py"))


def size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG file, out of its head."""
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", picture[16:24])


def test_every_picture_has_a_script_or_is_the_tutorial_s():
    own = {path.stem for path in SCRIPTS}
    assert own
    assert {path.stem for path in IMAGES.glob("*.png") if not path.stem.startswith("tutorial-")} == own


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.png")), ids=lambda path: path.stem)
def test_pictures_are_small(path):
    picture = path.read_bytes()
    width, height = size(picture)
    assert len(picture) <= 60_000
    assert 500 <= width <= 1000
    assert 250 <= height <= 500


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_draws_a_picture_of_the_same_size(script, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script.name, "--fast", "--output", str(tmp_path / "new.png")])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets it; undone after the test
    runpy.run_path(str(script), run_name="__main__")
    sys.modules.pop("vit_digits", None)
    assert size((tmp_path / "new.png").read_bytes()) == size(script.with_suffix(".png").read_bytes())
