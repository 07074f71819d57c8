"""The three callbacks from a LightningCLI YAML: in a process of its own once, then as if it was one."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_prehab as lp

MAIN = """
import lightning_prehab
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, RandomDataset
import torch

class Lit(BoringModel):
    def __init__(self, width: int = 32):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(32, width), torch.nn.Linear(width, 16))

if __name__ == "__main__":
    LightningCLI(Lit, save_config_callback=None)
"""
CONFIG = """
trainer:
  max_epochs: 3
  limit_train_batches: 8
  limit_val_batches: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_prehab.PrehabCallback
      init_args:
        regularizer: {class_path: lightning_prehab.TailEnergy, init_args: {refresh: 5}}
        strength: 0.1
        space: loss
    - class_path: lightning_prehab.CompressionCallback
      init_args:
        epoch: 1
        policy: {class_path: lightning_prehab.ParameterBudget, init_args: {keep: 0.4}}
        factorization: {class_path: lightning_prehab.KroneckerSVD, init_args: {gradient_shrinkage: 0.01}}
        rank_overrides: {"layer.*": 5}
        layout: pivot
    - class_path: RehabSchedule
      init_args:
        warmup_steps: 4
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the program in this process, where all is imported already; what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the program sets it; undone after the test

    def start(config: str, *arguments: str) -> str:
        write(tmp_path, config)
        monkeypatch.setattr(sys, "argv", [*COMMAND, *arguments])
        runpy.run_path("main.py", run_name="__main__")
        return capsys.readouterr().out

    yield start
    sys.modules.pop("own", None)


def write(folder: Path, config: str) -> None:
    (folder / "main.py").write_text(MAIN)
    (folder / "config.yaml").write_text(config)


COMMAND = ["main.py", "fit", "--config", "config.yaml"]


def test_a_run_from_yaml(tmp_path):
    write(tmp_path, CONFIG)
    done = subprocess.run(
        [sys.executable, *COMMAND],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "layer.0  32x32     5" in done.stdout
    assert "KroneckerSVD(gradient_shrinkage=0.01" in done.stdout
    assert "in the pivot layout" in done.stdout


def test_a_wrong_value_is_named(run, capsys):
    wrong = ("--trainer.callbacks+=lightning_prehab.RehabSchedule", "--trainer.callbacks.shape=square")
    with pytest.raises(SystemExit, match="2"):
        run(CONFIG, *wrong)
    assert "square" in capsys.readouterr().err


DISTILLED = """
    - class_path: RehabDistillation
      init_args:
        strength: 0.5
        task_strength: 0.1
        temperature: 2.0
        FADE
        shape: cosine
        precision: half
        device: cpu
        ITS
"""


@pytest.mark.parametrize(
    "its",
    ["form: features, feature_modules: ['layer.*']", "module: layer", "forward: own.logits", "teacher: dense.pt"],
)
def test_every_setting_of_the_distillation(its, run, tmp_path):
    (tmp_path / "own.py").write_text("def logits(module, batch):\n    return module.layer(batch)\n")
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 16))
    torch.save({f"layer.{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "dense.pt")
    fade = "fade_epochs: 1.5" if "module" in its else "fade_steps: 10"
    run(CONFIG + DISTILLED.replace("ITS", its.replace(", f", "\n        f")).replace("FADE", fade))


SCHEDULED = """
        warmup_epochs: 0.5
        start_factor: 0.2
        peak_factor: 1.5
        shape: cosine
        end_factor: 0.1
        group_factors: {0: 0.5}
        DECAY
"""


@pytest.mark.parametrize("decay", ["decay_steps: 3", "decay_epochs: 0.5", ""])
def test_every_setting_of_the_schedule(decay, run, monkeypatch):
    factors, end = [], lp.RehabSchedule.on_train_end

    def noted(self, *args):
        factors.append((self.factor(), self.group_factors))
        end(self, *args)

    monkeypatch.setattr(lp.RehabSchedule, "on_train_end", noted)
    run(CONFIG.replace("        warmup_steps: 4\n", SCHEDULED.replace("DECAY", decay)))
    assert factors == [(pytest.approx(0.1), {0: 0.5})]


OWN = """
from dataclasses import dataclass

import torch

from lightning_prehab.factorizations import Factorization, Factors
from lightning_prehab.rank_policies import RankPolicy
from lightning_prehab.regularizers import Shrinkage


@dataclass(frozen=True)
class LeadingColumns(Factorization):
    scale: float = 1.0

    def __call__(self, weight, rank, statistics=None):
        return Factors(torch.eye(weight.shape[1])[:rank] * self.scale, weight[:, :rank] / self.scale)


@dataclass(frozen=True)
class Fixed(RankPolicy):
    rank: int

    def __call__(self, layers):
        return {layer.name: self.rank for layer in layers}


@dataclass(frozen=True)
class Smaller(Shrinkage):
    factor: float

    def __call__(self, weight, rank=None, memory=None, progress=1.0, lr=0.0, metric=None):
        return weight * self.factor
"""
START = CONFIG[: CONFIG.index("    - class_path")]
OWN_CONFIG = f"""{START}
    - class_path: lightning_prehab.PrehabCallback
      init_args: {{regularizer: {{class_path: own.Smaller, init_args: {{factor: 0.99}}}}}}
    - class_path: lightning_prehab.CompressionCallback
      init_args:
        epoch: 1
        factorization: {{class_path: own.LeadingColumns, init_args: {{scale: 2.0}}}}
        policy: {{class_path: own.Fixed, init_args: {{rank: 3}}}}
"""
NESTED_CONFIG = f"""{START}
    - class_path: lightning_prehab.PrehabCallback
      init_args: {{regularizer: lightning_prehab.TailShrinkage, space: loss, forecast_every_n_steps: 2}}
    - class_path: lightning_prehab.CompressionCallback
      init_args:
        epoch: auto
        forecast_below: 0.5
        factorization:
          class_path: lightning_prehab.LowRankPlusSparse
          init_args:
            density: 0.1
            base: {{class_path: lightning_prehab.KroneckerSVD, init_args: {{input_shrinkage: auto}}}}
        policy: {{class_path: lightning_prehab.ProbeBudget, init_args: {{keep: 0.5, scope: model}}}}
"""


def test_classes_of_the_user(run, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    said = run(OWN_CONFIG)
    assert "layer.0  32x32     3" in said
    assert "LeadingColumns(scale=2.0)" in said


def test_a_factorization_inside_of_another_and_an_automatic_surgery(run):
    said = run(NESTED_CONFIG)
    assert "LowRankPlusSparse(density=0.1, base=KroneckerSVD(" in said
    assert "input_shrinkage='auto'" in said


FACTORS = """
    - class_path: lightning_prehab.FactorTraining
      init_args:
        product_decay: 0.01
        decay_form: gradient
        rebalance_every: 4
        rate_A: 0.5
        rate_B: 2
        alternate: 2
        train: factors_norms_biases
"""


def test_factor_training_from_yaml(run, capsys):
    assert "32x32     5" in run(CONFIG.rstrip() + FACTORS)
    with pytest.raises(SystemExit, match="2"):
        run(CONFIG.rstrip() + FACTORS, "--trainer.callbacks+=FactorTraining", "--trainer.callbacks.train=norms")
    assert "norms" in capsys.readouterr().err
