"""Which prehab makes the cut free, and does it pay in the end? A small GPT on tiny Shakespeare, with every control.

    python benchmarks/prehab_gpt.py input.txt                 # runs what is missing in prehab_gpt.jsonl
    python benchmarks/prehab_gpt.py --table                   # prints the tables of the stored results only

A character-level GPT (4 blocks, 128 wide) is trained for 1,000 steps, then all its linear layers but the head are
targets: 120 steps of prehab and 60 of rehab, batches of 12 x 64 characters, AdamW at 2e-3, then 1e-3. The first 80 % of
the text are for training, the next 10 % for tuning, the last 10 % for what is reported
(40,000 characters of each are measured). ``prehab_trial.py`` says what the rows are. The text is
tinyshakespeare/input.txt of https://github.com/karpathy/char-rnn (the ``datasets`` library has it as
``karpathy/tiny_shakespeare``).
"""

import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import torch
from prehab_trial import Record, Task, copied, main, parser, print_tables
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, BLOCKS, CONTEXT, BATCH = 128, 4, 4, 64, 12
PRETRAINING = 1000
MEASURED = 40_000  # characters of each split
DEFAULT_CACHE = Path(tempfile.gettempdir()) / "lightning-prehab-gpt"


class Block(nn.Module):
    """Attention and MLP, normalized before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm1(x)
        q, k, v = (layer(seen).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Next-character model."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Shakespeare(Task):
    keeps = (0.4, 0.2, 0.1)
    steps, prehab, rehab = 60, 2, 1
    lr = 1e-3
    targets = "model.blocks.*"
    results = Path(__file__).with_suffix(".jsonl")
    metrics: ClassVar = {"loss": "Cross-entropy per character"}

    pretraining, batch = PRETRAINING, BATCH

    def __init__(self, file: str | None, cache: str | Path = DEFAULT_CACHE, device: str = "cpu") -> None:
        self.cache, self.device = Path(cache), torch.device(device)
        if file is not None:
            text = Path(file).read_text(encoding="utf-8")
            self.characters = sorted(set(text))
            ids = {character: index for index, character in enumerate(self.characters)}
            data = torch.tensor([ids[character] for character in text], device=self.device)
            a, b = int(0.8 * len(data)), int(0.9 * len(data))
            self.train, self.validation, self.test = data[:a], data[a:b], data[b:]

    def model(self, seed: int) -> nn.Module:
        batch = "" if self.batch == BATCH else f"x{self.batch}"
        file = self.cache / f"gpt-{BLOCKS}x{WIDTH}-{self.pretraining}{batch}-seed{seed}.pt"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = GPT(len(self.characters)).to(self.device)
        if not file.exists():
            self.pretrain(model, seed)
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            torch.save(model.state_dict(), temporary)
            temporary.replace(file)
        model.load_state_dict(torch.load(file, map_location=self.device, weights_only=True))
        return copied(model)

    def pretrain(self, model: nn.Module, seed: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, self.pretraining)
        for batch in self.draw(seed, self.pretraining):
            self.loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def draw(self, seed: int, count: int, text: Tensor | None = None) -> list[Tensor]:
        """Batches of a text, of the training split by default."""
        text = self.train if text is None else text
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - CONTEXT - 1, (count, self.batch, 1), generator=generator)
        return list(text[(starts + torch.arange(CONTEXT + 1)).to(text.device)])

    def batches(self, seed: int, epoch: int) -> list[Any]:
        return self.draw(1000 * (seed + 1) + epoch, self.steps)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    @torch.inference_mode()
    def measure(self, model: nn.Module, split: str) -> Record:
        data = getattr(self, split)[:MEASURED]
        rows = data[: (len(data) - 1) // CONTEXT * CONTEXT + 1]
        windows = torch.stack([rows[i : i + CONTEXT + 1] for i in range(0, len(rows) - 1, CONTEXT)])
        parts = windows.split(64)
        return {"loss": sum(float(self.loss(model, part)) * len(part) for part in parts) / len(windows)}


if __name__ == "__main__":
    options = parser(__doc__.splitlines()[0], "input.txt of tiny Shakespeare")
    options.add_argument("--cache", default=DEFAULT_CACHE, help="folder for the pretrained models")
    arguments = options.parse_args()
    if arguments.data is None and not arguments.table:
        options.error("the file input.txt is missing")
    task = Shakespeare(None if arguments.table else arguments.data, arguments.cache)
    if not arguments.table:
        main(task, arguments)
    print_tables(task)
