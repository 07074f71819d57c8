"""Three fresh processes for the price of little more than one: ``hf_worker.py FOLDER``.

Importing torch and lightning takes longest. So this process forks twice on the way, each time before the import that
its child has to do without, and loads every model of the folder itself in the end.
"""

import importlib
import json
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a copy of this process."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def load_all(folder: Path) -> dict[str, Any]:
    """What ``from_pretrained`` makes of each model, or its error."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    lp = sys.modules.get("lightning_prehab")
    result: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        expected = torch.load(path / "expected.pt")
        try:
            model = getattr(transformers, expected["class"]).from_pretrained(path, **expected["arguments"])
        except Exception as error:
            result[path.name] = f"{type(error).__name__}: {error}"
            continue
        with torch.no_grad():
            difference = model(**expected["inputs"]).logits - expected["logits"]
        tokens = None
        if "tokens" in expected:
            tokens = model.generate(**expected["inputs"], max_new_tokens=4, do_sample=False)
        weights = model.state_dict()
        result[path.name] = {
            "relative difference": (difference.abs().max() / expected["logits"].abs().max()).item(),
            "same tokens": tokens is None or torch.equal(tokens, expected["tokens"]),
            "same weights": weights.keys() == expected["weights"].keys()
            and all(torch.equal(weights[key], value) for key, value in expected["weights"].items()),
            "ranks": {
                n: m.rank for n, m in model.named_modules() if lp is not None and isinstance(m, lp.LowRankLinear)
            },
            "left behind": [n for n in ("hf_quantizer", "is_quantized", "quantization_method") if n in vars(model)],
            "dtype": str(model.dtype),
            "shards": len(list(path.glob("*.safetensors"))),
        }
    return result


def load_without_this_package(folder: Path) -> dict[str, Any]:
    result = load_all(folder)
    assert not any(name.split(".")[0] == "lightning_prehab" for name in sys.modules)
    return result


def compress_without_transformers() -> str:
    """The error of the integration where transformers cannot be imported; the rest of the package works."""
    for name in list(sys.modules):  # torchmetrics has imported it, being told by the metadata that it is there
        if name.split(".")[0] == "transformers":
            del sys.modules[name]
    sys.modules["transformers"] = None  # type: ignore[assignment]
    torch = importlib.import_module("torch")
    lp = importlib.import_module("lightning_prehab")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    lp.compress_(model, keep=0.5)
    assert isinstance(model[0], lp.LowRankLinear)
    try:
        importlib.import_module("lightning_prehab.integrations.huggingface")
    except lp.PrehabError as error:
        return str(error)
    return "no error"


def main(folder: Path) -> None:
    importlib.import_module("torch").set_num_threads(1)
    result = {"without this package": fork(load_without_this_package, folder)}
    importlib.import_module("lightning")
    result["without transformers"] = fork(compress_without_transformers)
    importlib.import_module("lightning_prehab")  # before transformers, as import sorters put it
    result["imported too early"] = "transformers.quantizers.auto" in sys.modules
    result["with both"] = load_all(folder)
    print("RESULT" + json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
