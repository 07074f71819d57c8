"""Digits from a YAML file: ``python main.py fit --config config.yaml``, or with ``--trainer.devices 2`` on two."""

import torch
from digits import Classifier, Digits
from lightning.pytorch.cli import LightningCLI

import lightning_prehab  # noqa: F401 (its classes can then be named without their module)

if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: threads would only wait for each other
    LightningCLI(
        Classifier,
        Digits,
        seed_everything_default=0,
        save_config_kwargs={"config_filename": "used.yaml", "overwrite": True},
    )
