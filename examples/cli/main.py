"""Digits from a YAML file: ``python main.py fit --config config.yaml``, or with ``--trainer.devices 2`` on two."""

import logging
import warnings

import lightning as L
import torch
from digits import Classifier, Digits
from lightning.pytorch.cli import LightningCLI

from lightning_prehab import CompressionReport  # and with it the classes that the YAML names without their module


class Gain(L.Callback):
    """What was gained, once the run is over."""

    before: torch.Tensor | None = None
    text = ""

    def on_surgery(self, trainer: L.Trainer, pl_module: Classifier, report: CompressionReport) -> None:
        self.fewer = report.parameters_before / report.parameters_after
        self.before = trainer.callback_metrics.get("val_accuracy")

    def on_fit_end(self, trainer: L.Trainer, pl_module: Classifier) -> None:
        end = trainer.callback_metrics.get("val_accuracy")
        if trainer.is_global_zero and self.before is not None and end is not None:
            accuracies = f"{self.before:.1%} before the cut, {end:.1%} at the end"
            self.text = f"\n{self.fewer:.1f} times fewer parameters: validation accuracy {accuracies}."


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no hints
    warnings.filterwarnings("ignore", module=r"lightning\.")
    gain = Gain()
    LightningCLI(
        Classifier,
        Digits,
        seed_everything_default=0,
        save_config_kwargs={"config_filename": "used.yaml", "overwrite": True},
        trainer_defaults={"callbacks": [gain]},
    )
    print(gain.text, end="\n" if gain.text else "")
