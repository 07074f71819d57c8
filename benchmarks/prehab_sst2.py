"""Which prehab makes the cut free, and does it pay in the end? MiniLM on SST-2, with every control.

    python benchmarks/prehab_sst2.py DATA_FOLDER                 # runs what is missing in prehab_sst2.jsonl
    python benchmarks/prehab_sst2.py DATA_FOLDER --tune --only TailShrinkage
    python benchmarks/prehab_sst2.py --table                     # prints the tables of the stored results only
    python benchmarks/prehab_sst2.py DATA_FOLDER --long          # control and default after 200 steps of 32, one seed

All 36 linear layers of the encoder are targets, the head stays dense, the embeddings are frozen. 150 steps of prehab
and 50 of rehab, batches of 16 sentences, AdamW at 3e-5. Reported on 1,000 sentences of dev + test (one standard error
of a single run is about 1 point, but all rows see the same ones); tuned on 692 sentences held out of the training
file. ``--long`` is the setting in which TailShrinkage was first tried, before this package: 200 steps of 32 sentences
at 5e-5 before the cut, keep 0.1 and 0.05, reported on all of dev and test. ``prehab_trial.py`` says what the rows are,
``sst2.py`` where to get the data and the model; needs the ``hf`` extra.
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from prehab_trial import CONTROL, DEFAULT, Record, Task, copied, main, parser, print_tables
from sst2 import DEFAULT_CACHE, TARGETS, SentenceClassifier, dense_model, evaluate, load_data


class MiniLM(Task):
    keeps: ClassVar = (0.2, 0.1)
    steps, prehab, rehab = 50, 3, 1
    lr, batch = 3e-5, 16
    reported = 1000  # sentences of dev and test
    targets = f"model.{TARGETS}"
    results = Path(__file__).with_suffix(".jsonl")
    metrics: ClassVar = {"accuracy": "Accuracy in %", "loss": "Cross-entropy"}

    def __init__(self, folder: str | None, cache: str | Path = DEFAULT_CACHE, source: str | None = None) -> None:
        self.cache, self.source = cache, source
        self.data = None if folder is None else load_data(folder, source)
        self.test = None if self.data is None else self.data.test.sample(self.reported, seed=0)
        self.dense: dict[int, SentenceClassifier] = {}

    def model(self, seed: int) -> torch.nn.Module:
        if seed not in self.dense:
            self.dense[seed] = dense_model(seed, self.data, self.cache, self.source)
        model = copied(self.dense[seed])
        model.encoder.embeddings.requires_grad_(False)
        return model

    def batches(self, seed: int, epoch: int) -> list[Any]:
        return self.data.train.shuffled_batches(torch.Generator().manual_seed(1000 * (seed + 1) + epoch), self.batch)

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return model(**batch).loss

    def measure(self, model: torch.nn.Module, split: str) -> Record:
        accuracy, loss = evaluate(model, self.test if split == "test" else self.data.validation)
        return {"accuracy": accuracy, "loss": loss}


class Long(MiniLM):
    keeps: ClassVar = (0.1, 0.05)
    prehab = 4
    lr, batch = 5e-5, 32
    reported = 2693  # all
    results = Path(__file__).with_name("prehab_sst2_long.jsonl")


if __name__ == "__main__":
    options = parser(__doc__.splitlines()[0], "folder with train.tsv, dev.tsv and test.tsv; see sst2.py")
    options.add_argument("--cache", default=DEFAULT_CACHE, help="folder for the fine-tuned models")
    options.add_argument("--model", help="folder or hub name of all-MiniLM-L6-v2; see sst2.py")
    options.add_argument("--long", action="store_true", help="control and default in the setting of the first trial")
    arguments = options.parse_args()
    if arguments.data is None and not arguments.table:
        options.error("DATA_FOLDER is missing; sst2.py says where to get the data")
    if arguments.long:
        arguments.seeds, arguments.only = (0,), f"^({CONTROL}|{re.escape(DEFAULT)})$"
    task = (Long if arguments.long else MiniLM)(
        None if arguments.table else arguments.data, arguments.cache, arguments.model
    )
    if not arguments.table:
        main(task, arguments)
    print_tables(task)
