"""Does prehab pay on a real language model? SmolLM2-135M-Instruct on WikiText-2, with every control.

    python benchmarks/prehab_smollm2.py FOLDER                          # runs what is missing in prehab_smollm2.jsonl
    python benchmarks/prehab_smollm2.py FOLDER --device cuda --seeds 0  # other processes may run the other seeds
    python benchmarks/prehab_smollm2.py --table                         # prints the tables of the stored results only

The 210 matrices of the body are targets: 120 steps of prehab and 120 of rehab, batches of 4 x 512 tokens in bfloat16
(autocast), AdamW at 1e-4, gradients clipped at norm 1. The training text is the validation text of WikiText-2, gone
through in another order for each seed and round; what is reported are perplexities of the first 32 x 512 tokens of the
test text, and of a part of tiny Shakespeare, which nobody has trained on, as in ``smollm2.py``. Training on WikiText
helps a model that is not cut as well: the row "not cut" says how much. ``prehab_trial.py`` says what the other rows
are, ``smollm2_parts.py`` where the model comes from and what FOLDER holds. Nothing is tuned.
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from prehab_trial import CONTROL, CUT_FIRST, DEFAULT, PAPER, UNCUT, Record, Task, copied, main, parser, print_tables
from smollm2_parts import IN_A_STEP, LENGTH, Texts, perplexity, read_model
from torch import nn


class SmolLM2(Task):
    keeps: ClassVar = (0.6, 0.4)
    rows: ClassVar = (UNCUT, CUT_FIRST, CONTROL, PAPER, DEFAULT)
    steps, prehab, rehab = 60, 2, 2
    lr = 1e-4
    trainer: ClassVar = {"precision": "bf16-mixed", "gradient_clip_val": 1.0}
    targets = "model.model.layers.*"
    metrics: ClassVar = {"wikitext": "Perplexity, WikiText-2", "shakespeare": "Perplexity, tiny Shakespeare"}

    def __init__(self, folder: str | None, device: str, results: Path) -> None:
        self.device, self.results = torch.device(device), results
        if folder is not None:
            self.dense, tokenizer = read_model()
            self.texts = Texts(Path(folder), tokenizer)

    def model(self, seed: int) -> nn.Module:
        return copied(self.dense)

    def batches(self, seed: int, epoch: int) -> list[Any]:
        tokens = self.texts.given("wikitext")
        rows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
        source, needed = torch.Generator().manual_seed(seed), self.steps * IN_A_STEP
        rounds = (epoch + 1) * needed // len(rows) + 1
        order = torch.cat([torch.randperm(len(rows), generator=source) for _ in range(rounds)])
        drawn = rows[order[epoch * needed : (epoch + 1) * needed]]
        return [{"input_ids": batch, "labels": batch} for batch in drawn.split(IN_A_STEP)]

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(**batch).loss

    def measure(self, model: nn.Module, split: str) -> Record:
        return {name: perplexity(model, blocks) for name, blocks in self.texts.scored.items()}


if __name__ == "__main__":
    options = parser(__doc__.splitlines()[0], "folder of the texts; see smollm2_parts.py")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument(
        "--results", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="where they are kept"
    )
    arguments = options.parse_args()
    if arguments.data is None and not arguments.table:
        options.error("the folder of the texts is missing")
    task = SmolLM2(None if arguments.table else arguments.data, arguments.device, arguments.results)
    if not arguments.table:
        main(task, arguments)
    print_tables(task)
