"""What the two benchmarks of the steps after the cut rest on: jobs, claims, rates, courses, tables. A tiny GPT."""

import importlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("rehab_gpt", "rehab_trial", "rehab_rows", "rehab_tables", "prehab_gpt")
    found = SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    for name, value in {"WIDTH": 16, "BLOCKS": 1, "HEADS": 2, "CONTEXT": 16, "MEASURED": 400}.items():
        monkeypatch.setattr(found.prehab_gpt, name, value)
    return found


@pytest.fixture
def task(modules, tmp_path):
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "input.txt").write_text("".join(map(chr, torch.randint(97, 109, (6000,), generator=generator))))
    made = modules.rehab_gpt.Recovering(str(tmp_path / "input.txt"), tmp_path / "cache", "cpu")
    made.pretraining, made.batch, made.steps, made.recovery, made.recipe = 2, 4, 2, 6, 12
    made.calibration_batches, made.results = 2, tmp_path / "results.jsonl"
    made.rates = (1e-3, 1e-2, 3e-2)
    return made


def work(modules, task, *options: str) -> list[dict]:
    arguments = modules.rehab_trial.parser("", "").parse_args(options)
    modules.rehab_trial.work(task, modules.rehab_trial.jobs_of(task, arguments), math.inf)
    return [json.loads(line) for line in task.results.read_text().splitlines()]


def test_what_is_there_is_not_run_again_and_the_rate_is_the_best_one(modules, task, capsys):
    wish = ("--part", "recovery", "--only", "^plain", "--seeds", "0", "--shares", "1.0")
    first = work(modules, task, *wish)
    assert work(modules, task, *wish) == first
    kinds = [record["job"]["kind"] for record in first]
    assert [kinds.count(kind) for kind in ("dense", "tuning", "run")] == [2, 3, 2]
    tuned = {r["job"]["rate"]: modules.rehab_rows.loss_over(r, "recovery") for r in first if r["job"]["keep"] == 0.15}
    runs = [record for record in first if record["job"]["kind"] == "run"]
    best = min({rate: tuned[rate] for rate in task.rates}, key=tuned.get)
    assert {record["job"]["rate"] for record in runs} == {best}
    for record in runs:
        assert record["keeps"][0] <= record["job"]["keep"]
        assert [step for step, _ in record["course"]] == [0, 5, 6]
        assert record["before"][0] == first[1]["end"]
        assert record["course"][-1][1] == record["end"]
    modules.rehab_tables.print_tables(task)
    assert capsys.readouterr().out.count("| plain training |") == 3  # two keeps, and the tuning


def test_what_another_process_has_in_hand_is_left_to_it(modules, tmp_path):
    with modules.rehab_trial.claimed(tmp_path, "a") as mine:
        assert mine
        with modules.rehab_trial.claimed(tmp_path, "a") as again, modules.rehab_trial.claimed(tmp_path, "b") as other:
            assert (again, other) == (False, True)
    with modules.rehab_trial.claimed(tmp_path, "a") as free:
        assert free


def test_what_fails_is_told_and_the_rest_goes_on(modules, task, monkeypatch, capsys):
    rows = {"broken": lambda trial: 1 / 0, "plain training": modules.rehab_rows.RECOVERY["plain training"]}
    monkeypatch.setitem(modules.rehab_rows.ROWS, "recovery", rows)
    found = work(modules, task, "--part", "recovery", "--seeds", "0", "--shares", "1.0")
    assert {r["job"]["row"] for r in found if r["job"]["kind"] == "run"} == {"plain training"}
    assert capsys.readouterr().out.count("ZeroDivisionError") == len(task.rates)


@pytest.mark.parametrize("row", ["LoRA of rank 8 on the factors", "SVD-LLM's update, B then A"])
def test_rivals_train_what_they_say(modules, task, row, monkeypatch):
    rows, seen = modules.rehab_rows, {}

    class Spy(modules.rehab_trial.L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, index):
            if not seen:
                seen.update({name: value.detach().clone() for name, value in pl_module.named_parameters()})

        def on_train_end(self, trainer, pl_module):
            self.changed = {n for n, value in pl_module.named_parameters() if not torch.equal(value, seen[n])}

    spy = Spy()
    monkeypatch.setitem(rows.RECOVERY, row, lambda trial, made=rows.RECOVERY[row]: [*made(trial), spy])
    modules.rehab_trial.run(task, rows.Job("run", 0, "recovery", row, 0.3, 1.0, 1e-2))
    if "LoRA" in row:
        assert {name.split(".")[-1] for name in spy.changed} == {"up", "down"}
        assert len(spy.changed) == 2 * 2 * 6  # of both factors of six layers
    else:
        assert {name.split(".", 3)[-1].split(".", 1)[-1] for name in spy.changed} <= {"A.weight", "B.weight"}
        assert len(spy.changed) == 2 * 6


def test_digits_are_a_task(modules, tmp_path, monkeypatch):
    digits = importlib.import_module("rehab_digits")
    monkeypatch.setattr(digits, "PRETRAINING", 2)
    task = digits.Digits(tmp_path, "cpu")
    task.labels = torch.arange(1797)  # to tell the images apart
    parts = [task.split(3, name)[1].tolist() for name in ("train", "validation", "test")]
    assert list(map(len, parts)) == [1000, 297, 500]
    assert len(set().union(*parts)) == 1797
    task.labels %= 10
    task.steps, task.recipe, task.calibration_batches = 2, 12, 2
    job = modules.rehab_rows.Job("run", 3, "recipe", "three cuts, distillation alone", 0.1, 1.0, 1e-3)
    found = modules.rehab_trial.run(task, job)
    assert len(found["keeps"]) == 3
    assert all(math.isfinite(loss) for loss in found["end"].values())


def test_an_interval_is_that_of_student(modules):
    scipy = pytest.importorskip("scipy.stats")
    values = [0.3, 0.1, 0.4, 0.25]
    low, high = scipy.t.interval(0.95, 3, loc=sum(values) / 4, scale=scipy.sem(values))
    said = modules.rehab_tables.interval(values, 4)
    assert said == f"{(low + high) / 2:+.4f} ± {(high - low) / 2:.4f}"


def every_row() -> list[tuple[str, str]]:
    source = (ROOT / "benchmarks" / "rehab_rows.py").read_text()
    return [(part, row) for part in ("recovery", "recipe", "spike") for row in rows_in(source, part)]


def rows_in(source: str, part: str) -> list[str]:
    """The names, without importing what is only on the path within a test."""
    block = source.partition(f"\n{part.upper()}: dict")[2].partition("\n}\n")[0]
    return [line.split('": ')[0].strip()[1:] for line in block.splitlines() if line.startswith('    "')]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "row"), every_row())
def test_every_row_runs(modules, task, part, row):
    found = modules.rehab_trial.run(task, modules.rehab_rows.Job("run", 0, part, row, 0.1, 1.0, 1e-3))
    assert len(found["keeps"]) == len(found["after"]) >= 1
    assert found["keeps"][-1] <= 0.1
    assert all(math.isfinite(loss) for loss in found["end"].values())
