import json
import math

import pytest

import lightning_prehab as lp
from lightning_prehab.errors import CheckpointError
from lightning_prehab.report.scores import Score, Scores, show_number

TEXT = Scores(
    Score(math.log(25.4), 8000, "tokens", data="34 held-back rows"),
    Score(math.log(33.3), 8000, "tokens", data="34 held-back rows"),
)
IMAGES = Scores(Score(0.31, 500, "labels", 0.912), Score(0.33, 500, "labels", 0.908))
FEATURES = Scores(Score(None, 64, "rows", output_error=0.0), Score(None, 64, "rows", output_error=0.0312))
RUIN = Scores(Score(3.2, 80, "tokens"), Score(900.0, 80, "tokens"))
CASES = {
    "perplexity 25.4 -> 33.3 on 34 held-back rows": TEXT,
    "accuracy 91.2 % -> 90.8 %, loss 0.310 -> 0.330": IMAGES,
    "outputs differ by 3.1 %": FEATURES,
    "perplexity 24.5 -> inf": RUIN,
}


@pytest.mark.parametrize("text", CASES)
def test_one_line(text):
    assert CASES[text].summary() == text


@pytest.mark.parametrize("text", CASES)
def test_there_and_back(text, mlp, tmp_path):
    """Through JSON as the standard has it (no infinities), alone and in the file of a report."""
    scores = CASES[text]
    assert Scores.from_dict(json.loads(json.dumps(scores.to_dict(), allow_nan=False))) == scores
    report = lp.compress_(mlp, 0.5).with_scores(scores)
    report.save_json(tmp_path / "report.json")
    found = lp.CompressionReport.load_json(tmp_path / "report.json")
    assert found == report
    assert found.scores == scores
    assert text in str(found)


def test_reports_without_scores(mlp):
    report = lp.compress_(mlp, 0.5)
    assert report.scores is None
    assert report.to_dict()["scores"] is None
    old = {key: value for key, value in report.to_dict().items() if key != "scores"}
    assert lp.CompressionReport.from_dict(old, lp.SVD()) == report
    assert report.with_scores(TEXT).with_scores(None) == report


def test_perplexity_is_of_language_models():
    assert TEXT.before.perplexity == pytest.approx(25.4)
    assert TEXT.to_dict()["after"]["perplexity"] == pytest.approx(33.3)
    assert IMAGES.before.perplexity is None
    assert FEATURES.after.perplexity is None
    assert RUIN.after.perplexity == math.inf
    assert RUIN.to_dict()["after"]["perplexity"] is None


@pytest.mark.parametrize(
    "broken",
    [
        7,
        [],
        {},
        {"before": {}, "after": {}},
        {**TEXT.to_dict(), "after": None},
        {**TEXT.to_dict(), "after": {"count": 3, "unit": "rows", "loss": "much"}},
        {**TEXT.to_dict(), "after": {"count": "x", "unit": "rows", "loss": 1.0}},
    ],
)
def test_what_is_no_scores(broken):
    with pytest.raises(CheckpointError, match="These are not"):
        Scores.from_dict(broken)


def test_numbers_for_people():
    shown = {0.99951: "1.000", -0.5: "-0.500", 999999.4: "999,999", 1e6: "1.00e6", 1e-5: "1.00e-5", math.nan: "nan"}
    assert {number: show_number(number) for number in shown} == shown
