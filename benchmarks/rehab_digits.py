"""Which recipe ends best at equal steps? A small Vision Transformer on the digits of scikit-learn, in a few minutes.

    python benchmarks/rehab_digits.py             # runs what is missing in rehab_digits.jsonl
    python benchmarks/rehab_digits.py --table     # prints the tables of the stored results only

The model of ``examples/vit_digits.py``, trained for 2,000 steps; 300 more steps of 16 images, with the cut somewhere
among them. Each seed has its own split of the 1,797 images: 1,000 to train on, 297 to choose rates, 500 to report.
All linear layers of the blocks are targets. ``rehab_trial.py`` says what is run, ``rehab_rows.py`` what the rows are;
needs the ``examples`` extra.
"""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from prehab_trial import Record, copied
from rehab_rows import RehabTask
from rehab_tables import print_tables
from rehab_trial import main, parser
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from vit_digits import DigitsViT

DEFAULT_CACHE = Path(tempfile.gettempdir()) / "lightning-prehab-digits"
PRETRAINING = 2000
SIZES = {"train": 1000, "validation": 297, "test": 500}
Images = tuple[Tensor, Tensor]


class Digits(RehabTask):
    parts: ClassVar = {"recipe": (0.1, 0.05)}
    steps, recovery, equal, recipe = 25, 300, 300, 300
    batch, calibration_batches = 16, 25
    lr = 2e-3
    rates = (5e-4, 1.5e-3, 4.5e-3, 1.35e-2)
    targets = "model.blocks.*"
    results = Path(__file__).with_suffix(".jsonl")
    metrics: ClassVar = {"accuracy": "Accuracy in %", "loss": "Cross-entropy"}

    def __init__(self, cache: str | Path, device: str) -> None:
        self.cache, self.device = Path(cache), torch.device(device)
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32, device=self.device)
        self.images, self.labels = images[:, None] / 8 - 1, torch.tensor(digits.target, device=self.device)
        self.dense: dict[int, nn.Module] = {}
        self.seed = 0  # of the split that measures

    def split(self, seed: int, name: str) -> Images:
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        part = dict(zip(SIZES, order.split(list(SIZES.values())), strict=True))[name].to(self.device)
        return self.images[part], self.labels[part]

    def model(self, seed: int) -> nn.Module:
        self.seed = seed
        if seed not in self.dense:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = DigitsViT(steps=0).model.to(self.device)
                optimizer = torch.optim.AdamW(model.parameters(), self.lr, weight_decay=0.01)
                schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, PRETRAINING)
                for batch in self.draw(seed, 0, PRETRAINING):
                    self.loss(model, batch).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
            self.dense[seed] = model
        return copied(copy.deepcopy(self.dense[seed]))

    def batches(self, seed: int, epoch: int, share: float = 1.0) -> list[Any]:
        return self.draw(seed, epoch + 1, self.steps, share)

    def draw(self, seed: int, part: int, count: int, share: float = 1.0) -> list[Any]:
        images, labels = self.split(seed, "train")
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + part)
        rows = torch.randint(round(share * len(labels)), (count, self.batch), generator=generator).to(self.device)
        return [[images[row], labels[row]] for row in rows]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def inputs(self, batch: Any) -> Any:
        return batch[0]

    def reached(self, now: Record, dense: Record) -> bool:
        return now["accuracy"] >= 0.99 * dense["accuracy"]

    @torch.no_grad()
    def measure(self, model: nn.Module, split: str) -> Record:
        training = model.training
        model.eval()
        images, labels = self.split(self.seed, split)
        logits = model(images)
        model.train(training)
        return {
            "accuracy": float((logits.argmax(-1) == labels).float().mean()),
            "loss": float(F.cross_entropy(logits, labels)),
        }


if __name__ == "__main__":
    options = parser(__doc__.splitlines()[0], "nothing is needed")
    options.add_argument("--cache", default=DEFAULT_CACHE, help="folder of the locks that processes share")
    arguments = options.parse_args()
    task = Digits(arguments.cache, arguments.device)
    task.results = arguments.results or task.results
    if not arguments.table:
        main(task, arguments)
    print_tables(task)
