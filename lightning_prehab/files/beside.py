"""What makes a Hugging Face folder usable beside its weights and ``config.json``."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

#: Of a folder that ``compress`` has written.
REPORT = "report.json"
#: Tokenizers, templates, settings of processors and generation, code, licenses, the parts of a sentence transformer.
_BESIDE = (
    "*_config.json",
    "config_*.json",
    "*token*.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*chat_template*",
    "*.py",
    "modules.json",
    "[0-9]_*",
    "LICENSE*",
    "NOTICE*",
)


def copy_beside(source: Path, folder: Path) -> None:
    """Copies all that from one folder into the other."""
    for pattern in _BESIDE:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copy(file, folder / file.name)  # with its permissions
            elif file.is_dir():
                shutil.copytree(file, folder / file.name, dirs_exist_ok=True)


def write_index(folder: Path, files: Mapping[str, str], total_size: int) -> None:
    """Writes the JSON that tells ``from_pretrained`` in which file each tensor lies.

    Args:
        folder: Where the files lie.
        files: ``{name of the tensor: name of the file}``.
        total_size: Bytes of all parameters.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
