"""Can a folder with a 1B LLaMA be compressed in 3 GiB of memory, killed three times on the way?

    python benchmarks/folder_1b.py            # measures, and keeps the result in folder_1b.json
    python benchmarks/folder_1b.py --table    # prints it

Makes a folder of random weights in the shape of Llama-3.2-1B (bfloat16, two files, 2.5 GB), and compresses it with
``compress_folder`` in a process of its own, which is killed (SIGKILL) on the way forward, on the way back and while it
writes, and started again each time. Reported are the peak of the resident memory of all four processes, what was said
beforehand, and the time. With ``--blocks N`` (16) all matrices of the first N blocks are cut, and the keys of all
others: a block takes about a minute on two cores. That the result is the one of the cut in memory is looked at on a
twin of 4 small blocks.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

import lightning_prehab as lp

RESULTS = Path(__file__).with_suffix(".json")
SIZES = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
TWIN = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TOKENS = (4, 128)
#: A file or a folder whose appearance in the work folder is answered with a kill.
KILLS = ("states-9", "statistics-block-9-0.done", "shard-model.layers.7.done")


def make_folder(folder: Path, sizes: dict) -> int:
    """A folder of random weights, one tensor in memory at a time; the answer is the number of parameters."""
    import transformers

    from lightning_prehab.offload.tensors import Written, write_tensors

    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(**sizes)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    generator = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        found = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
        return found.mul_(shape[1] ** -0.5)

    names = [name for name in state if name != "lm_head.weight"]
    half = len(names) // 2
    where = {}
    for number, part in enumerate((names[:half], names[half:])):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        tensors = {
            name: Written(tuple(state[name].shape), torch.bfloat16, partial(values, tuple(state[name].shape)))
            for name in part
        }
        write_tensors(folder / file, tensors)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(state[name].numel() for name in names)


def batches(vocabulary: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(vocabulary, TOKENS, generator=generator)}]


def recipe(blocks: int) -> lp.Recipe:
    """Everything in the first blocks, keys in all."""
    return lp.Recipe(0.5, target_modules=["*.k_proj", *(f"model.layers.{n}.*" for n in range(blocks))])


def child(source: str, output: str, blocks: int) -> None:
    """One process: compresses, and says how much memory it had."""
    report = lp.compress_folder(source, output, recipe(blocks), batches(SIZES["vocab_size"]))
    print(json.dumps({"peak": peak(os.getpid()), "keep": report.keep, "parameters": report.parameters_after}))


def peak(process: int) -> int:
    """The largest resident memory of a process so far, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def run(source: Path, output: Path, blocks: int) -> dict:
    """Compresses in processes that are killed."""
    command = [sys.executable, __file__, "--child", str(source), str(output), "--blocks", str(blocks)]
    began, peaks, said = time.monotonic(), [], []
    for kill in (*KILLS, None):
        log = output.parent / f"log-{len(peaks)}.txt"
        with log.open("w") as errors:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
            highest = 0
            while process.poll() is None:
                try:
                    highest = max(highest, peak(process.pid))
                except (OSError, StopIteration):
                    break
                if kill is not None and any(output.parent.glob(f".{output.name}.*/{kill}")):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    break
                time.sleep(0.05)
            out, _ = process.communicate()
        print(f"{kill or 'to the end'}: {highest / 2**30:.2f} GiB, {time.monotonic() - began:.0f} s", flush=True)
        peaks.append(highest)
        said += [line for line in log.read_text().splitlines() if "of memory" in line][:1]
        if kill is not None and process.returncode != -signal.SIGKILL:
            raise RuntimeError(f"{kill}: it was over before ({process.returncode}):\n{log.read_text()[-3000:]}")
    if process.returncode:
        raise RuntimeError(log.read_text()[-3000:])
    found = json.loads(out)
    return {"peaks": peaks, "seconds": time.monotonic() - began, "said": said, **found}


def twin(folder: Path) -> float:
    """The largest relative difference of a weight to the cut in memory, of a small model."""
    import transformers

    make_folder(folder / "dense", TWIN)
    data = batches(TWIN["vocab_size"])
    load = transformers.AutoModelForCausalLM.from_pretrained
    reference = load(folder / "dense", dtype="auto")
    lp.compress_(reference, 0.5, data, progress=False)
    lp.compress_folder(folder / "dense", folder / "small", 0.5, data, progress=False)
    ours, theirs = load(folder / "small", dtype="auto").state_dict(), reference.state_dict()
    assert list(ours) == list(theirs)
    differences = [(ours[name].float() - theirs[name].float()).norm() / theirs[name].float().norm() for name in ours]
    return float(max(differences))


def table(result: dict) -> str:
    """The result in words."""
    peaks = [
        f"| {place} | {peak:.2f} GiB |"
        for place, peak in zip((*result["killed_at"], "the end"), result["peak_gib"], strict=False)
    ]
    said = f"{result['parameters']:,} parameters. Said: {result['said'][0]}"
    last = f"{result['seconds']:,} s in all; twin: largest relative difference {result['twin_difference']:.1e}"
    return "\n".join([said, "", "| killed at | peak |", "|---|---|", *peaks, "", last])


def main() -> None:
    """Everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the models go, and are deleted (a temporary one)")
    parser.add_argument("--blocks", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--child", nargs=2)
    settings = parser.parse_args()
    if settings.child:
        child(*settings.child, settings.blocks)
        return
    if settings.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    folder = Path(tempfile.mkdtemp(dir=settings.folder))
    try:
        difference = twin(folder / "twin")
        parameters = make_folder(folder / "dense", SIZES)
        print(f"{parameters:,} parameters; twin: {difference:.1e}", flush=True)
        found = run(folder / "dense", folder / "small", settings.blocks)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        "parameters": parameters,
        "sizes": SIZES,
        "tokens": TOKENS,
        "whole_blocks": settings.blocks,
        "killed_at": KILLS,
        "peak_gib": [round(one / 2**30, 3) for one in found["peaks"]],
        "said": found["said"],
        "seconds": round(found["seconds"]),
        "keep": found["keep"],
        "twin_difference": difference,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
