"""How fast does a cut model come back, and which recipe ends best at equal steps? A small GPT, with every control.

    python benchmarks/rehab_gpt.py input.txt                      # runs what is missing in rehab_gpt.jsonl
    python benchmarks/rehab_gpt.py input.txt --device cuda        # the same command several times shares the work
    python benchmarks/rehab_gpt.py --table                        # prints the tables of the stored results only
    python benchmarks/rehab_gpt.py input.txt --short              # what a processor has the time for

The GPT of ``prehab_gpt.py``, trained for 3,000 steps of 32 x 64 characters of tiny Shakespeare; all linear layers but
the head are targets. Reported on 40,000 characters of the last 10 % of the text, tuned on as many of the 10 % before.
``--short`` is the setting of ``prehab_gpt.py``: a model trained for 1,000 steps of 12 x 64 characters, 300 steps of
recovery and 180 of a recipe.
``rehab_trial.py`` says what is run, ``rehab_rows.py`` what the rows are, ``prehab_gpt.py`` where to get the text.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from prehab_gpt import DEFAULT_CACHE, Shakespeare
from prehab_trial import Record
from rehab_rows import RehabTask
from rehab_tables import print_tables
from rehab_trial import main, parser
from torch import Tensor, nn


class Recovering(Shakespeare, RehabTask):
    parts: ClassVar = {"recovery": (0.3, 0.15), "recipe": (0.1, 0.05), "spike": (0.3, 0.15)}
    pretraining, batch = 3000, 32
    steps, recovery, equal, recipe = 25, 400, 200, 600
    calibration_batches = 25
    rates = (1.5e-3, 4.5e-3, 1.35e-2)
    results = Path(__file__).with_suffix(".jsonl")
    metrics: ClassVar = {"loss": "Cross-entropy per character"}

    def batches(self, seed: int, epoch: int, share: float = 1.0) -> list[Any]:
        size = round(share * len(self.train))
        generator = torch.Generator().manual_seed(seed)
        first = int(torch.randint(len(self.train) - size + 1, (), generator=generator))
        return self.draw(1000 * (seed + 1) + epoch, self.steps, self.train[first : first + size])

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(self.inputs(batch))

    def inputs(self, batch: Tensor) -> Tensor:
        return batch[:, :-1]

    def reached(self, now: Record, dense: Record) -> bool:
        return now["loss"] <= 1.02 * dense["loss"]


class Short(Recovering):
    pretraining, batch = 1000, 12
    steps, recovery, equal, recipe = 15, 300, 160, 180
    calibration_batches = 15
    rates = (5e-4, 1.5e-3, 4.5e-3, 1.35e-2, 4.05e-2)
    results = Path(__file__).with_name("rehab_gpt_short.jsonl")


if __name__ == "__main__":
    options = parser(__doc__.splitlines()[0], "input.txt of tiny Shakespeare")
    options.add_argument("--cache", default=DEFAULT_CACHE, help="folder for the pretrained models")
    options.add_argument("--short", action="store_true", help="less training, as in prehab_gpt.py")
    arguments = options.parse_args()
    if arguments.data is None and not arguments.table:
        options.error("the file input.txt is missing")
    kind = Short if arguments.short else Recovering
    task = kind(None if arguments.table else arguments.data, arguments.cache, arguments.device)
    task.results = arguments.results or task.results
    if not arguments.table:
        main(task, arguments)
    print_tables(task)
