"""What is known of the parts of a model that have been observed and decomposed, on disk."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prehab.factorizations import Decomposition, Factors
from lightning_prehab.linalg.matrices import working_dtype
from lightning_prehab.offload.tensors import Written, entries_in, write_tensors
from lightning_prehab.offload.work import Work
from lightning_prehab.plan.spectra import Solution, Spectrum
from lightning_prehab.statistics.sums import LayerStatistics, Wanted

#: Relative difference up to which the factors of a rank are the first ones of those of a higher rank.
SAME = 1e-4


class Remembered(LayerStatistics):
    """What is left of the statistics of a layer when its decomposition is on disk: whether they were enough.

    Args:
        reason: What :meth:`missing` has said.
        tokens: How many were seen.
        in_features: Of the layer.
    """

    def __init__(self, reason: str | None, tokens: int, in_features: int) -> None:
        super().__init__(1, 1, device="cpu")
        self.in_features = in_features
        self.tokens += tokens
        self._reason = reason

    @classmethod
    def of(cls, work: Work, key: str) -> dict[str, LayerStatistics]:
        """Of statistics that :meth:`Seen.write` has written."""
        layers = work.done(key) or {}
        return {name: cls(one["missing"], one["tokens"], one["shape"][1]) for name, one in layers.items()}

    def missing(self, wanted: Wanted) -> str | None:
        """The reason."""
        return self._reason


class Seen(Mapping[str, LayerStatistics]):
    """Statistics on disk, each read when it is asked for.

    Args:
        work: Where they lie.
        key: Under which name.
    """

    def __init__(self, work: Work, key: str) -> None:
        self._path = work.path(f"{key}.safetensors")
        self._layers: dict[str, dict[str, Any]] = work.done(key)

    @staticmethod
    def write(work: Work, key: str, statistics: Mapping[str, LayerStatistics], wanted: Wanted) -> None:
        """Writes some; sums that layers share are written once."""
        stored: dict[str, Written] = {}
        names: dict[int, str] = {}
        layers = {}
        for layer, one in statistics.items():
            sums = {}
            for sum_name, tensor in one.tensors():
                if id(tensor) not in names:
                    names[id(tensor)] = f"{layer}/{sum_name}"
                    stored[names[id(tensor)]] = Written.of(tensor)
                sums[sum_name] = names[id(tensor)]
            facts = {"missing": one.missing(wanted), "tokens": int(one.tokens)}
            layers[layer] = {"shape": [one.out_features, one.in_features], "sums": sums, **facts}
        with work.writing(work.path(f"{key}.safetensors").name) as path:
            write_tensors(path, stored)
        work.finish(key, layers)

    def __getitem__(self, name: str) -> LayerStatistics:
        (m, n), sums = self._layers[name]["shape"], self._layers[name]["sums"]
        entries = entries_in(self._path)
        found = LayerStatistics(
            n,
            m,
            gradients="gradient_gram" in sums,
            weight_gradients="weight_gradient" in sums,
            halves="half.tokens" in sums,
            magnitudes="input_absolute_sum" in sums,
            device="meta",
        )
        for key in [key for key, _ in found.tensors()]:
            holder = found.half if key.startswith("half.") else found
            setattr(holder, key.removeprefix("half."), entries[sums[key]].read())
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


class Decompositions:
    """Decompositions on disk: the factors up to the highest rank that anybody can ask for.

    Of a method whose factors of a rank are not the first ones of a higher rank (a sparse part, a bias that moves with
    the rank) nothing can be kept so; it is decomposed again when its rank is known.

    Args:
        work: Where they lie.
    """

    def __init__(self, work: Work) -> None:
        self._work = work

    def note(self, form: str) -> dict[str, Any] | None:
        """What is known of a target: its spectrum, and whether its factors are kept; None: it is not decomposed yet."""
        found: dict[str, Any] | None = self._work.done(f"decomposed-{form}")
        return found

    def spectrum(self, form: str) -> Spectrum:
        """Of a decomposed target."""
        note = self.note(form)
        assert note is not None
        return Spectrum.of_lists(*note["spectrum"])

    def keep(self, form: str, solution: Solution, highest: int, dtype: torch.dtype, part: str) -> None:
        """Writes a decomposition.

        Args:
            form: Name of the target in its form.
            solution: Of the target.
            highest: The highest rank that can be chosen.
            dtype: Of the weight; factors are kept in float32 at least.
            part: Where its statistics lie.
        """
        factors = solution.decomposition.factors(highest)
        kept = _are_nested(factors, solution.decomposition.factors(max(highest // 2, 1)))
        if kept:
            wide = working_dtype(dtype)
            parts = {"A": Written.of(factors.A.detach().to(wide)), "B": Written.of(factors.B.detach().to(wide))}
            with self._work.writing(self._file(form)) as path:
                write_tensors(path, parts)
        self._work.finish(f"decomposed-{form}", {"spectrum": solution.spectrum.to_lists(), "kept": kept, "part": part})

    def decomposition(self, form: str, again: Callable[[], Decomposition]) -> Decomposition:
        """For factors of any rank.

        Args:
            form: Name of the target in its form.
            again: Decomposes it anew.
        """
        note = self.note(form)
        assert note is not None
        values = Spectrum.of_lists(*note["spectrum"]).singular_values
        return Decomposition(values, self._read(form) if note["kept"] else lambda rank: again().factors(rank))

    def _read(self, form: str) -> Callable[[int], Factors]:
        def factors(rank: int) -> Factors:
            entries = entries_in(self._work.folder / self._file(form))
            a, b = entries["A"].read(), entries["B"].read()
            return Factors(a[:rank], b[:, :rank])

        return factors

    def _file(self, form: str) -> str:
        return self._work.path(f"factors-{form}.safetensors").name


def _are_nested(many: Factors, few: Factors) -> bool:
    """Whether the factors of a rank are the first ones of those of a higher rank, and nothing else."""
    if any(part is not None for found in (many, few) for part in found.parts()[2:]):
        return False
    rank = few.B.shape[1]
    if few.A.shape[0] != rank:
        return False  # of several groups, one below the other
    return _alike(many.A[:rank], few.A) and _alike(many.B[:, :rank], few.B)


def _alike(one: Tensor, other: Tensor) -> bool:
    return bool(torch.linalg.matrix_norm(one - other) <= SAME * torch.linalg.matrix_norm(other))
