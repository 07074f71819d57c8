"""The benchmarks on the small GPT run from end to end, and go on where they were: one block, a few steps."""

import importlib
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.integration.test_benchmarks import ROOT

NAMES = ("prehab_gpt", "self_distillation", "optimizer_state", "factor_training")
FEW = {"STEPS": 4, "WARMUP": 2, "BEFORE": 2, "AFTER": 2, "CALIBRATION": 2, "MEASURED": 2}


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})
    for name, value in {"BLOCKS": 1, "HEADS": 2, "CONTEXT": 16, "MEASURED": 400}.items():
        monkeypatch.setattr(found.prehab_gpt, name, value)
    for name, value in {"steps": 2, "pretraining": 2, "batch": 8, "calibration_batches": 2}.items():
        monkeypatch.setattr(found.prehab_gpt.Shakespeare, name, value)
    for module in (found.optimizer_state, found.factor_training):
        for name, value in FEW.items():
            monkeypatch.setattr(module, name, value, raising=False)
    return found


@pytest.fixture
def files(tmp_path):
    """The text, the folder of what is pretrained, and the results."""
    generator = torch.Generator().manual_seed(0)
    text = tmp_path / "input.txt"
    text.write_text("".join(map(chr, torch.randint(97, 109, (6000,), generator=generator))))
    return text, tmp_path / "cache", tmp_path / "results.jsonl"


def run_prehab(module, files, monkeypatch):
    task = module.Shakespeare(*files[:2])
    task.results = files[2]
    module.main(task, module.parser("", "").parse_args(["--only", "cut first|not tuned", "--seeds", "0"]))
    module.print_tables(task)


def run_self_distillation(module, files, monkeypatch):
    monkeypatch.setattr(module, "RESULTS", files[2])
    monkeypatch.setattr(module.Trial, "results", files[2])
    run_main(module, files, monkeypatch)
    print()
    module.print_table([json.loads(line) for line in files[2].read_text().splitlines()])


def run_optimizer_state(module, files, monkeypatch):
    monkeypatch.setattr(module, "RESULTS", files[2])
    run_main(module, files, monkeypatch, "--only", "SGD")


def run_factor_training(module, files, monkeypatch):
    monkeypatch.setattr(module.Results, "path", files[2])
    module.run_missing(module.Trial(*files[:2], "cpu"), ["plain", "alternate=1"], [0])
    print(*module.table(module.Results().all()), sep="\n")


def run_main(module, files, monkeypatch, *options):
    text, cache, _ = map(str, files)
    monkeypatch.setattr(sys, "argv", [module.__name__, text, "--cache", cache, "--seeds", "0", *options])
    module.main()


RUNS = (run_prehab, run_self_distillation, run_optimizer_state, run_factor_training)


@pytest.mark.parametrize(("name", "run", "count"), [*zip(NAMES, RUNS, (7, 7, 6, 12), strict=True)])
def test_what_is_missing_is_measured_and_shown(modules, files, monkeypatch, capsys, name, run, count):
    module = getattr(modules, name)
    run(module, files, monkeypatch)
    stored = files[2].read_text()
    assert len(stored.splitlines()) == count
    assert "NaN" not in stored
    assert capsys.readouterr().out.count("\n| ") >= 2
    run(module, files, monkeypatch)
    assert files[2].read_text() == stored
