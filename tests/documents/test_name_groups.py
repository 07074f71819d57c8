import re

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lightning_prehab.documents.name_groups import common_prefix, group_names

PARTS = st.sampled_from(["layers", "0", "1", "12", "fc1", "fc2", "conv", "block3", "é٣", ""])
NAMES = st.lists(PARTS, min_size=1, max_size=6).map(".".join)


@given(st.lists(NAMES, unique=True, max_size=12))
def test_every_name_is_in_one_group_and_fits_its_pattern(names):
    groups = group_names(dict.fromkeys(names))
    assert sorted(name for _, found in groups for name in found) == sorted(names)
    for pattern, found in groups:
        fits = re.compile("[0-9]+".join(map(re.escape, pattern.split("*"))))
        assert all(fits.fullmatch(name) for name in found)
        assert len(found) > 1 or pattern == found[0]


def test_kinds_are_kept_apart():
    names = {f"layers.{i}.{fc}": fc == "b" and i == 2 for i in range(3) for fc in ("a", "b")}
    assert [pattern for pattern, _ in group_names(names)] == ["layers.*.a", "layers.*.b", "layers.2.b"]


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["h.0.e.0.w1", "h.0.e.1.w1", "h.1.e.0.w1"], "h.*.e.*.w1"),
        (["h.0.e.0.w1", "h.0.e.1.w1"], "h.0.e.*.w1"),
        (["net.0", "net.2"], "net.*"),
        (["denseblock1.layer2.conv1", "denseblock1.layer3.conv1"], "denseblock1.layer*.conv1"),
    ],
)
def test_only_what_differs_is_a_star(names, pattern):
    assert group_names(dict.fromkeys(names)) == [(pattern, names)]


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["model.layers.*.a.q", "model.layers.*.a.k"], "model."),
        (["model.decoder.layers.0.q", "model.decoder.layers.1.q"], "model.decoder."),
        (["net.0", "net.2"], ""),
        (["a.b.fc1", "a.b.fc2"], "a.b."),
        (["a.b", "a.b.c"], "a."),
        (["fc"], ""),
        ([], ""),
    ],
)
def test_prefix(names, prefix):
    assert common_prefix(names) == prefix
