"""What the version before has written is read, and a run goes on from it."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_prehab as lp
from lightning_prehab.cli import main
from tests.before_the_house.comparison import (
    FILES,
    assert_same_data,
    assert_same_weights,
    cuts,
    expected,
    in_shares,
    ranks,
    same_machine,
)
from tests.before_the_house.make import (
    BATCHES,
    CHECKPOINTS,
    EPOCHS,
    FOLDER,
    ROWS,
    RUN,
    Lit,
    batches,
    calibrated,
    carried_out,
    logits_of,
    run,
    state_of,
    trainer_of,
    undisturbed,
)

STEPS = EPOCHS * BATCHES


def checkpoint(name):
    return torch.load(FILES / name, weights_only=True)


def assert_same_bits(found, stored):
    assert list(found) == list(stored)
    assert all(torch.equal(found[name], value) for name, value in stored.items())


def assert_same_logits(found, stored):
    assert len(stored.argmax(-1).unique()) > 1
    exact = {"rtol": 0, "atol": 0} if same_machine() else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found, stored, **exact)


def test_the_files_are_there():
    names = sorted(path.name for path in FILES.iterdir())
    assert names == ["calibrating.ckpt", "compressed.ckpt", "folder", "plan.yaml", "report.json", "weights.ckpt"]
    weights, *others = sorted(path.name for path in (FILES / "folder").iterdir())[::-1]
    assert others == ["structure.json", "report.json"]
    assert weights.endswith(".safetensors")


def test_the_checkpoints_are_of_the_moments_that_count():
    calibrating, compressed = (checkpoint(name) for name in CHECKPOINTS.values())
    states = [found["callbacks"] for found in (calibrating, compressed)]
    assert all(state.keys() == {"PrehabCallback", "CompressionCallback", "RehabSchedule"} for state in states)
    assert [found["global_step"] for found in (calibrating, compressed)] == list(CHECKPOINTS) == [13, 26]
    assert (calibrating["epoch"], compressed["epoch"], STEPS) == (1, 3, 32)
    assert cuts(calibrating["state_dict"]) == {}
    assert cuts(compressed["state_dict"]) == ranks(expected()["run"]["plan"])
    sums = states[0]["CompressionCallback"]["statistics"]
    assert sums.keys() >= ranks(expected()["run"]["plan"]).keys()
    assert {int(layer["samples"]) for layer in sums.values()} == {96}  # three batches of six
    assert states[0]["PrehabCallback"]["layers"]
    assert states[0]["CompressionCallback"]["report"] is None
    assert states[1]["CompressionCallback"]["report"] is not None
    assert "callbacks" not in checkpoint("weights.ckpt")


@pytest.mark.parametrize("name", CHECKPOINTS.values())
def test_a_run_goes_on(name, tmp_path):
    stored = expected()["run"]
    trainer, lit, report = run(tmp_path, FILES / name)
    assert trainer.global_step == STEPS
    assert ranks(report.plan.to_dict()) == ranks(stored["plan"])
    assert_same_data(in_shares(report.plan.to_dict()), in_shares(stored["plan"]))
    assert_same_weights(state_of(lit), stored["end"])
    assert_same_logits(logits_of(lit, RUN), stored["logits"])
    before = checkpoint(name)["state_dict"]
    assert all(not torch.equal(value, before[key]) for key, value in state_of(lit).items() if key in before)


@pytest.mark.parametrize("name", ["compressed.ckpt", "weights.ckpt"])
def test_a_compressed_checkpoint_is_loaded(name):
    lit = lp.load_from_checkpoint(Lit, FILES / name)
    assert_same_bits(state_of(lit), checkpoint(name)["state_dict"])
    assert cuts(state_of(lit)) == ranks(expected()["run"]["plan"])


def test_the_last_weights_are_those_of_the_run(tmp_path):
    stored = expected()["run"]
    lit = lp.load_from_checkpoint(Lit, FILES / "weights.ckpt")
    assert_same_bits(state_of(lit), stored["end"])
    assert_same_logits(logits_of(lit, RUN), stored["logits"])


def test_a_trainer_predicts_with_old_weights(tmp_path):
    trainer = trainer_of(tmp_path, callbacks=[lp.CompressionCallback(2)])
    lit = Lit(RUN)
    with undisturbed():
        (found,) = trainer.predict(lit, DataLoader(batches(RUN)[0][0], ROWS), ckpt_path=FILES / "weights.ckpt")
    assert_same_bits(state_of(lit), expected()["run"]["end"])
    assert_same_logits(found, expected()["run"]["logits"])


def test_a_folder_is_loaded():
    model, method = FOLDER
    stored = expected()["results"][model][method]["command line"]
    lit = lp.load_compressed(FILES / "folder", Lit(model))
    assert_same_bits(state_of(lit), stored["states"]["surgery"])
    assert cuts(state_of(lit)) == ranks(stored["plan"])


def test_the_report_of_a_folder_is_shown(capsys):
    model, method = FOLDER
    plan = expected()["results"][model][method]["command line"]["plan"]
    stored = json.loads((FILES / "folder" / "report.json").read_text())
    assert {layer["name"]: layer["rank"] for layer in stored["layers"] if layer["rank"]} == ranks(plan)
    assert main(["report", str(FILES / "folder"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    del stored["method"]
    assert_same_data(shown, stored, more=True)
    found = lp.CompressionReport.load_json(FILES / "folder" / "report.json")
    assert isinstance(found.plan.factorization, lp.KroneckerSVD)
    assert ranks(found.plan.to_dict()) == ranks(plan)


def test_a_report_is_read_and_written_again(tmp_path):
    found = lp.CompressionReport.load_json(FILES / "report.json")
    assert_same_data(found.plan.to_dict(), expected()["run"]["plan"])
    assert found.spectra.keys() >= ranks(expected()["run"]["plan"]).keys()
    found.save_json(tmp_path / "again.json")
    stored, again = (json.loads(path.read_text()) for path in (FILES / "report.json", tmp_path / "again.json"))
    assert_same_data(again, stored, more=True)


def test_a_plan_is_read_and_carried_out():
    stored = expected()["planned"]
    plan = lp.CompressionPlan.from_yaml(FILES / "plan.yaml")
    assert plan.to_dict() == stored["plan"]
    module, statistics, made = calibrated()
    assert_same_data(made.to_dict(), stored["plan"])
    state = carried_out(module, statistics, plan)
    assert cuts(state) == ranks(stored["plan"]) != {}
    assert_same_weights(state, stored["state"])
