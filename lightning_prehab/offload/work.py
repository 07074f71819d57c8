"""The unfinished work of one wish, on disk: what is done stays done, whenever the process is killed.

A stage is done when its note lies in the folder. Notes and data are written beside their place, to the disk, and moved
there in one step of the file system; data first.
"""

import contextlib
import glob
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lightning_prehab.documents.folders import missing_around, remove_empty
from lightning_prehab.errors import ArgumentError
from lightning_prehab.offload.tensors import to_disk

_WISH = "wish.json"
_DIGEST = "[0-9a-f]" * 12
#: Behind the name of a folder that is being removed.
_GONE = ".gone"
#: The stage before the work: what has been chosen to fit into memory.
FIT = "fit"


class Work:
    """A folder beside the output, for one wish: what is wished for is a part of its name, so wishes never mix.

    Args:
        output: The folder that is going to be written.
        wish: Everything that the result depends on, as JSON.

    Attributes:
        folder: The folder.
        resumed: Whether there was something in it.

    Raises:
        ArgumentError: If another process works on the same wish.
    """

    def __init__(self, output: Path, wish: Mapping[str, Any]) -> None:
        text = json.dumps(wish, indent=1, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self._output = output
        self.folder = output.parent / f".{output.name}.{digest}"
        self._missing = missing_around(output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        self.resumed = (self.folder / _WISH).is_file()
        for left in self.folder.rglob("*.part"):
            left.unlink()
        for over in output.parent.glob(f".{glob.escape(output.name)}.{_DIGEST}{_GONE}"):
            shutil.rmtree(over, ignore_errors=True)
        if self.resumed:
            return
        try:
            with self.writing(_WISH) as path:
                path.write_text(text + "\n", encoding="utf-8")
        except BaseException:
            self.close()
            raise

    def others(self) -> list[Path]:
        """Folders with the unfinished work of other wishes for the same output."""
        found = self._output.parent.glob(f".{glob.escape(self._output.name)}.{_DIGEST}")
        return sorted(path for path in found if path != self.folder and (path / _WISH).is_file())

    def done(self, stage: str) -> Any:
        """The note of a stage, or None if it is not done."""
        path = self._note(stage)
        return json.loads(path.read_bytes()) if path.is_file() else None

    def finish(self, stage: str, note: Any = True) -> None:
        """Notes that a stage is done, its data being on the disk."""
        with self.writing(self._note(stage).name) as path, path.open("w", encoding="utf-8") as file:
            json.dump(note, file)
            to_disk(file)

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A place to write a file to, which has its name afterwards; whoever writes sees that it is on the disk."""
        path = self.folder / name
        part = path.with_name(f"{path.name}.part")
        yield part
        part.replace(path)

    def path(self, name: str) -> Path:
        """Of a file or a folder in the folder; names may hold anything."""
        return self.folder / quote(name, safe="")

    def remove(self, name: str) -> None:
        """A file or a folder in the folder, if it is there."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def close(self) -> None:
        """Lets another process go on with it; a folder in which nothing is done goes."""
        if self._lock is None and not self.folder.exists():
            return
        if not any(note != self._note(FIT) for note in self.folder.glob("*.done")):
            shutil.rmtree(self.folder, ignore_errors=True)
            remove_empty(self._missing)
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Removes the folder, in one step for whoever looks for it: half of it would be no work at all."""
        self.close()
        if self.folder.exists():
            gone = self.folder.with_name(f"{self.folder.name}{_GONE}")
            shutil.rmtree(gone, ignore_errors=True)
            self.folder.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _note(self, stage: str) -> Path:
        return self.path(f"{stage}.done")


def _locked(folder: Path) -> Any:
    """A lock that ends with the process, however that ends; None where the system has none of that kind."""
    try:
        import fcntl
    except ImportError:
        return None
    file = (folder / "lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ArgumentError(
            f"Another process works on this very wish, in {folder}; wait for it, or end it and call again."
        ) from None
    return file
