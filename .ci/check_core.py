"""What a plain installation can do, in an environment that holds the wheel and its core dependencies only.

Every module is imported, every feature of an extra must say which extra it needs, and a training run with the three
callbacks, and all that needs no Trainer, must work. Usage: python .ci/check_core.py
"""

import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.demos.boring_classes import RandomDataset
from torch import nn

import lightning_prehab as lp

torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
EXTRAS = ("cli", "hf", "plot", "onnx", "vision", "examples")


def packages_of(extra: str) -> set[str]:
    """The distributions that an extra of the installed wheel asks for by itself."""
    found = set()
    for requirement in importlib.metadata.requires("lightning-prehab") or []:
        name, _, marker = requirement.partition(";")
        if re.search(rf"extra == ['\"]{extra}['\"]", marker):
            found.add(re.split(r"[^\w.-]", name.strip())[0])
    return found - {"lightning-prehab"}


def check_the_environment() -> None:
    """The wheel, not a working tree; and none of the extras' packages."""
    assert "site-packages" in lp.__file__, lp.__file__
    assert (Path(lp.__file__).parent / "py.typed").is_file()
    assert importlib.metadata.version("lightning-prehab") == lp.__about__.__version__
    wanted = {name for extra in EXTRAS for name in packages_of(extra)}
    assert {"jsonargparse", "rich", "transformers", "safetensors", "timm", "matplotlib", "onnx"} <= wanted, wanted
    present = wanted & {distribution.name for distribution in importlib.metadata.distributions()}
    assert not present, f"not a core-only environment: {present}"


def refused(call: Callable[[], object]) -> str:
    """The text of the PrehabError that the call raises."""
    try:
        call()
    except lp.PrehabError as error:
        return str(error)
    raise AssertionError("works without the extra")


def check_the_command_line(folder: Path) -> None:
    """It needs no extra to say what it is; one that reads or writes models names the extra for these."""
    report = lp.compress_(nn.Sequential(nn.Linear(16, 16)), keep=0.5, factorization=lp.SVD())
    report.save_json(folder / "report.json")
    program = str(Path(sys.executable).with_name("lightning-prehab"))
    for words in (["--help"], ["--version"], ["plan", "--help"], ["report", "."], ["plan", "."]):
        run = subprocess.run([program, *words], capture_output=True, text=True, check=False, cwd=folder)
        assert "Traceback" not in run.stderr, run.stderr
        assert run.returncode == (words == ["plan", "."]), (words, run)
    assert "pip install 'lightning-prehab[hf]'" in run.stderr, run


def check_modules() -> None:
    """All can be imported, but for the bridge to transformers."""
    for module in pkgutil.walk_packages(lp.__path__, "lightning_prehab."):
        if module.name == "lightning_prehab.integrations.huggingface":
            assert "lightning-prehab[hf]" in refused(lambda: importlib.import_module(module.name))  # noqa: B023
        elif module.name != "lightning_prehab.__main__":
            importlib.import_module(module.name)


def check_missing_extras(folder: Path) -> None:
    """Each feature of an extra names it, and the package it names comes with that extra."""
    from lightning_prehab.cli.inputs import load_model, read_batches

    for name in ("config.json", "batches.safetensors", "lines.txt"):
        (folder / name).write_text("{}")
    report = lp.compress_(nn.Sequential(nn.Linear(16, 16)), keep=0.5)
    calls: dict[str, tuple[str, Callable[[], object]]] = {
        "save_compressed": ("hf", lambda: lp.save_compressed(nn.Linear(4, 4), folder / "saved")),
        "load_compressed": ("hf", lambda: lp.load_compressed(folder, nn.Linear(4, 4))),
        "a Hugging Face folder": ("hf", lambda: load_model(str(folder), None)),
        "batches in safetensors": ("hf", lambda: read_batches(str(folder / "batches.safetensors"), "", 8, 8)),
        "batches of text": ("hf", lambda: read_batches(str(folder / "lines.txt"), str(folder), 8, 8)),
        "figure": ("plot", lambda: report.figure("ranks")),
        "save_html": ("plot", lambda: report.save_html(folder / "report.html")),
    }
    texts = {name: (extra, refused(call)) for name, (extra, call) in calls.items()}
    for name, (extra, text) in texts.items():
        assert f"pip install 'lightning-prehab[{extra}]'" in text, (name, text)
        assert any(package in text for package in packages_of(extra)), (name, text)
        print(f"{name}: {text.strip()}")
    assert not (folder / "saved").exists()
    assert not (folder / "report.html").exists()


class Regressor(L.LightningModule):
    """A user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh(), nn.Linear(32, 4))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        """Regression to a fixed function of the input."""
        return nn.functional.mse_loss(self.net(batch), batch[:, :4].sin())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def trainer(**settings: object) -> L.Trainer:
    """A quiet one, on the CPU."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{**quiet, "enable_model_summary": False, **settings})


def check_training(folder: Path) -> None:
    """Prehab, surgery and rehab; a checkpoint of it loads without a Trainer and resumes."""
    data = torch.utils.data.DataLoader(RandomDataset(32, 256), batch_size=16)

    def callbacks() -> list[L.Callback]:
        return [lp.PrehabCallback(), lp.CompressionCallback(epoch=1, keep=0.4), lp.RehabSchedule(warmup_steps=8)]

    acts = callbacks()
    model, run = Regressor(), trainer(max_epochs=3, callbacks=acts)
    run.fit(model, data)
    report = acts[1].report
    assert report is not None
    assert 0 < report.keep <= 0.4, report
    assert any(isinstance(module, lp.LowRankLinear) for module in model.modules())
    run.save_checkpoint(folder / "last.ckpt")
    again = lp.load_from_checkpoint(Regressor, folder / "last.ckpt")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    x = torch.randn(8, 32)
    torch.testing.assert_close(again.net(x), model.net(x))
    trainer(max_epochs=4, callbacks=callbacks()).fit(fresh := Regressor(), data, ckpt_path=folder / "last.ckpt")
    assert {name for name, _ in fresh.named_parameters()} == {name for name, _ in model.named_parameters()}
    lp.to_dense_(model)
    torch.testing.assert_close(model.net(x), again.net(x))
    print(report)


def check_without_a_trainer() -> None:
    """Every factorization, every policy; a plan goes through YAML, a report through JSON."""
    batches = [torch.randn(64, 32) for _ in range(2)]
    for factorization in (lp.SVD(), lp.ActivationSVD(), lp.FisherSVD(), lp.WhitenedSVD(), lp.KroneckerSVD()):
        report = lp.compress_(Regressor().net, 0.5, batches, factorization=factorization)
        assert 0 < report.keep <= 0.5, report
    policies = (lp.RankRatio(0.4), lp.ParameterBudget(0.4), lp.EnergyThreshold(0.5), lp.ProbeBudget(0.4))
    for policy in policies:
        assert lp.compress_(Regressor().net, batches=batches, policy=policy).keep < 1
    plan = lp.make_plan(lp.find_targets(Regressor().net), 0.5, factorization=lp.SVD())
    assert lp.CompressionPlan.from_yaml(plan.to_yaml()).ranks == plan.ranks
    metric = lp.StableRankMetric()
    metric.update(torch.eye(5))
    assert abs(float(metric.compute()) - 5) < 1e-4


def main() -> None:
    """All checks, in order."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning", "torchmetrics")
    )
    print(f"Python {sys.version.split()[0]}, {versions}")
    torch.manual_seed(0)
    check_the_environment()
    check_modules()
    with tempfile.TemporaryDirectory() as folder:
        check_missing_extras(Path(folder))
        check_the_command_line(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        check_training(Path(folder))
    check_without_a_trainer()


if __name__ == "__main__":
    main()
