"""How fast does a cut model come back, and which recipe ends best at equal steps? MiniLM on SST-2, with every control.

    python benchmarks/rehab_sst2.py DATA_FOLDER                   # runs what is missing in rehab_sst2.jsonl
    python benchmarks/rehab_sst2.py DATA_FOLDER --device cuda     # the same command several times shares the work
    python benchmarks/rehab_sst2.py DATA_FOLDER --part recovery --only plain --seeds 0
    python benchmarks/rehab_sst2.py --table                       # prints the tables of the stored results only

All 36 linear layers of the encoder are targets, the head stays dense, the embeddings are frozen. Batches of 32
sentences; reported on all 2,693 sentences of dev and test, tuned on 692 that are held out of the training file.
``rehab_trial.py`` says what is run, ``rehab_rows.py`` what the rows are, ``sst2.py`` where to get the data and the
model; needs the ``hf`` extra.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from prehab_sst2 import MiniLM
from prehab_trial import Record, copied
from rehab_rows import RehabTask
from rehab_tables import print_tables
from rehab_trial import main, parser
from sst2 import DEFAULT_CACHE, SST2, Sentences, dense_model, load_data
from torch import Tensor


class Resident(Sentences):
    """Sentences that lie on a device, padded once."""

    def __init__(self, sentences: Sentences, device: torch.device) -> None:
        super().__init__(sentences.tokens, sentences.labels)
        whole = sentences.batch(range(len(sentences)))
        object.__setattr__(self, "_whole", {name: part.to(device) for name, part in whole.items()})

    def subset(self, indices: Any) -> Sentences:
        return Resident(super().subset(indices), self._whole["labels"].device)

    def batch(self, indices: Any, labels: bool = True) -> dict[str, Tensor]:
        length = max(len(self.tokens[i]) for i in indices)
        taken = torch.tensor(indices, device=self._whole["labels"].device)
        found = {name: self._whole[name][taken, :length] for name in ("input_ids", "attention_mask")}
        return {**found, "labels": self._whole["labels"][taken]} if labels else found


class Recovering(MiniLM, RehabTask):
    parts: ClassVar = {"recovery": (0.3, 0.15), "recipe": (0.1, 0.05), "spike": (0.3, 0.15)}
    steps, recovery, recipe = 25, 200, 300
    batch, calibration_batches = 32, 25
    rates = (3e-5, 1e-4, 3e-4)
    equal, sparse = 100, 3
    results = Path(__file__).with_suffix(".jsonl")
    metrics: ClassVar = {"accuracy": "Accuracy in %", "loss": "Cross-entropy"}

    def __init__(self, folder: str | None, cache: str | Path, source: str | None, device: str) -> None:
        self.cache, self.source, self.device = Path(cache), source, torch.device(device)
        self.dense: dict[int, torch.nn.Module] = {}
        if folder is not None:
            data = load_data(folder, source)
            self.data = SST2(*(Resident(part, self.device) for part in (data.train, data.validation, data.test)))
            splits = {"validation": self.data.validation, "test": self.data.test}
            size = 256 if self.device.type == "cuda" else 16  # what is quick there
            self.measured = {name: part.sorted_batches(size) for name, part in splits.items()}

    def model(self, seed: int) -> torch.nn.Module:
        if seed not in self.dense:
            self.dense[seed] = dense_model(seed, self.data, self.cache, self.source, self.device)
        model = copied(self.dense[seed])
        model.encoder.embeddings.requires_grad_(False)
        return model

    def batches(self, seed: int, epoch: int, share: float = 1.0) -> list[Any]:
        train = self.data.train if share == 1 else self.data.train.sample(round(share * len(self.data.train)), seed)
        generator = torch.Generator().manual_seed(1000 * (seed + 1) + epoch)
        found: list[Any] = []
        while len(found) < self.steps:
            found += train.shuffled_batches(generator, self.batch)
        return found[: self.steps]

    def logits(self, model: torch.nn.Module, batch: Any) -> Tensor:
        return model(**self.inputs(batch)).logits

    def inputs(self, batch: Any) -> Any:
        return {name: part for name, part in batch.items() if name != "labels"}

    def reached(self, now: Record, dense: Record) -> bool:
        return now["accuracy"] >= 0.99 * dense["accuracy"]

    @torch.no_grad()
    def measure(self, model: torch.nn.Module, split: str) -> Record:
        training = model.training
        model.eval()
        sums = torch.zeros(3, device=self.device)  # right, loss, sentences
        for batch in self.measured[split]:
            output, count = model(**batch), len(batch["labels"])
            right = (output.logits.argmax(-1) == batch["labels"]).sum()
            sums += torch.stack([right, output.loss * count, torch.full_like(output.loss, count)])
        model.train(training)
        right, loss, count = sums.tolist()
        return {"accuracy": right / count, "loss": loss / count}


if __name__ == "__main__":
    options = parser(__doc__.splitlines()[0], "folder with train.tsv, dev.tsv and test.tsv; see sst2.py")
    options.add_argument("--cache", default=DEFAULT_CACHE, help="folder for the fine-tuned models")
    options.add_argument("--model", help="folder or hub name of all-MiniLM-L6-v2; see sst2.py")
    arguments = options.parse_args()
    if arguments.data is None and not arguments.table:
        options.error("DATA_FOLDER is missing; sst2.py says where to get the data")
    task = Recovering(None if arguments.table else arguments.data, arguments.cache, arguments.model, arguments.device)
    task.results = arguments.results or task.results
    if not arguments.table:
        main(task, arguments)
    print_tables(task)
