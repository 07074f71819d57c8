"""``compress --refine``."""

import json

import pytest

from lightning_prehab.cli import main
from tests.cli.test_commands import bert  # noqa: F401


@pytest.mark.parametrize("planned", [False, True])
def test_the_report_says_what_refining_has_brought(planned, bert, tmp_path, capsys):  # noqa: F811
    text = ["--data", str(bert / "text.txt"), "--evaluate", "0"]
    wish = ["--keep", "0.5"]
    if planned:
        assert main(["plan", str(bert), *text, "--keep", "0.5", "--output", str(tmp_path / "plan.yaml")]) == 0
        wish = ["--plan", str(tmp_path / "plan.yaml")]
    capsys.readouterr()
    output = str(tmp_path / "small")
    assert main(["compress", str(bert), *text, *wish, "--refine", "3", "--output", output, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["report"]["refinement"]
    assert (found["measure"], found["steps"]) == ("divergence", 3)
    assert found["after"] <= found["before"]
    assert main(["report", output]) == 0
    assert "divergence from the dense model" in capsys.readouterr().out


def test_without_data_it_is_refused_before_any_work(bert, tmp_path, capsys):  # noqa: F811
    assert main(["compress", str(bert), "--refine", "--output", str(tmp_path / "small")]) == 1
    assert (
        "--refine trains on text or batches; give --data FILE, or self where the model writes text."
        in capsys.readouterr().err
    )
    assert not (tmp_path / "small").exists()
