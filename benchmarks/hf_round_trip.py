"""Real weights through ``save_pretrained`` and ``from_pretrained``: MiniLM, compressed, loaded by a fresh process.

    python benchmarks/hf_round_trip.py            # writes hf_round_trip.json
    python benchmarks/hf_round_trip.py --table    # prints the stored results only

The model is that of ``sst2.py`` (which says where to get it); the lines of the README are the calibration text. Asked:
are the weights of the loaded model those of the saved one bit by bit, how far are its outputs from those, and how large
are the files? Outputs are compared after the weights have moved from their places in the file to aligned ones: where
they lie in the file, products may be rounded otherwise (by 1e-9). Needs the extra ``hf``.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from sst2 import model_source

import lightning_prehab as lp

RESULTS = Path(__file__).with_suffix(".json")
TEXT = Path(__file__).parents[1] / "README.md"
KEEPS = (0.6, 0.4, 0.2)
LOAD = """
import sys
import lightning_prehab, torch, transformers
torch.set_num_threads(1)
folder = sys.argv[1]
model = transformers.AutoModel.from_pretrained(folder)
for tensor in model.parameters():  # from the places in a file to aligned ones: kernels round by alignment
    tensor.data = tensor.data.clone()
expected = torch.load(f"{folder}/expected.pt")
with torch.no_grad():
    output = model(**expected["batch"]).last_hidden_state
state = model.state_dict()
same = all(torch.equal(state[name], tensor) for name, tensor in expected["state"].items())
print((output - expected["output"]).abs().max().item(), same)
"""


def run(keep: float, source: str | Path) -> dict[str, object]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source)
    lines = [line for line in TEXT.read_text().splitlines() if len(line) > 40]
    batches = [
        dict(tokenizer(lines[i : i + 16], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(lines), 16)
    ]
    report = lp.compress_(
        model, batches=batches, policy=lp.RankRatio(keep), factorization=lp.WhitenedSVD(), exclude_modules="pooler*"
    )
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.eval().save_pretrained(folder, max_shard_size="20MB")
        files = sorted(Path(folder).glob("*.safetensors"))
        expected = {"batch": batches[0], "output": model(**batches[0]).last_hidden_state, "state": model.state_dict()}
        torch.save(expected, f"{folder}/expected.pt")
        loaded = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", LOAD, folder], capture_output=True, text=True, check=True
        )
        difference, same = loaded.stdout.split()[-2:]
        return {
            "keep": keep,
            "achieved_keep": report.keep,
            "parameters": report.parameters_after,
            "shards": len(files),
            "megabytes": round(sum(file.stat().st_size for file in files) / 1e6, 1),
            "same_weights": same == "True",
            "largest_difference_of_outputs": float(difference),
        }


def table(rows: list[dict[str, object]]) -> str:
    lines = [f"| {' | '.join(rows[0])} |", "|" + "---|" * len(rows[0])]
    return "\n".join(lines + [f"| {' | '.join(map(str, row.values()))} |" for row in rows])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print the stored results only")
    parser.add_argument("--model", help="folder or hub name of all-MiniLM-L6-v2; see sst2.py")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(1)
        found = [run(keep, arguments.model or model_source()) for keep in KEEPS]
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))
