"""Loads every model of a folder in a process of its own: ``hf_worker.py FOLDER with|without``."""

import importlib
import json
import sys
from pathlib import Path


def main(folder: Path, mode: str) -> None:
    result = {}
    if mode == "with":  # before transformers, as import sorters put it
        lp = importlib.import_module("lightning_prehab")
        result["imported too early"] = "transformers.quantizers.auto" in sys.modules
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    transformers = importlib.import_module("transformers")

    for path in sorted(folder.iterdir()):
        expected = torch.load(path / "expected.pt")
        try:
            model = getattr(transformers, expected["class"]).from_pretrained(path, **expected["arguments"])
        except Exception as error:
            result[path.name] = f"{type(error).__name__}: {error}"
            continue
        with torch.no_grad():
            for tensor in model.parameters():  # from the places in a file to aligned ones: kernels round by alignment
                tensor.data = tensor.data.clone()
            output = model(**expected["inputs"]).logits
        difference = (output - expected["logits"]).abs().max().item()
        if "tokens" in expected:
            tokens = model.generate(**expected["inputs"], max_new_tokens=4, do_sample=False)
            difference += float((tokens != expected["tokens"]).sum())
        weights = model.state_dict()
        result[path.name] = {
            "difference": difference,
            "same weights": weights.keys() == expected["weights"].keys()
            and all(torch.equal(weights[key], value) for key, value in expected["weights"].items()),
            "ranks": {
                n: m.rank for n, m in model.named_modules() if mode == "with" and isinstance(m, lp.LowRankLinear)
            },
            "left behind": [n for n in ("hf_quantizer", "is_quantized", "quantization_method") if n in vars(model)],
            "dtype": str(model.dtype),
            "shards": len(list(path.glob("*.safetensors"))),
        }
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
