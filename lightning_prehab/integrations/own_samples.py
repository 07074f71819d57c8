"""Text that a language model writes by itself: calibration data where there is none."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prehab.documents.checks import check_real, check_seed, check_whole
from lightning_prehab.documents.settings import show
from lightning_prehab.errors import ArgumentError, NumericalError, UnsupportedError
from lightning_prehab.linalg.cumulated import running_sum
from lightning_prehab.linalg.modes import outside_inference_mode
from lightning_prehab.progress import shown, tell
from lightning_prehab.statistics.calibration import as_found

#: Sequences that are written side by side: their cache takes about as much memory as the model does.
SIDE_BY_SIDE = 32
#: Tokens along which a pair of temperatures goes from the first to the second.
TEMPERED = 10

First = int | Literal["bos", "any"]


@outside_inference_mode
def own_samples(
    model: nn.Module,
    tokenizer: Any,
    sequences: int = 64,
    length: int = 512,
    *,
    seed: int = 0,
    temperature: float | tuple[float, float] = 1.0,
    first: First | None = None,
    batch_size: int = 8,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """Calibration batches of text that the model itself writes, each token drawn from all that it thinks possible.

    What a cut is calibrated with is what survives it. A model's own text is close to all that it has learned from, and
    needs no data (for quantization: LLM-QAT, https://arxiv.org/abs/2305.17888; for pruning too: Self-calibration,
    https://arxiv.org/abs/2410.17170). Settings of generation that the model may bring, such as top-k or a repetition
    penalty, are left aside. Where a text ends, another begins in the same sequence, so there is no padding.

    The model is left as it was, and so is the global random state; the same seed gives the same text on the same kind
    of machine.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer: it knows the first token, and how many there are.
        sequences: How many.
        length: Tokens of each.
        seed: Of a generator of its own.
        temperature: Of the logits, positive: below 1 the text is more likely, above it more varied. A pair goes in even
            steps from the one to the other along the first ten tokens of a sequence, and stays there.
        first: Each text begins with this token: a number, ``"bos"`` (of the tokenizer, else of the model's config), or
            ``"any"``, drawn for each text from all tokens that are not special. None: ``"bos"`` if there is one.
        batch_size: Sequences of a batch.
        dtype: What the forward passes compute in (autocast). None takes bfloat16 where the machine is fast at it, and
            leaves a model as it is that is in half precision already.
        progress: Show how far it is on standard error; see :func:`~lightning_prehab.progress.shown`.

    Returns:
        ``{"input_ids", "attention_mask"}`` of shape ``(batch_size, length)``, int64, on the CPU; the last may be
        smaller.

    Raises:
        ArgumentError: If a setting cannot be used, or the length is more than the model has positions for.
        UnsupportedError: If the model does not write text by itself.
        NumericalError: If its logits are not finite.

    >>> batches = own_samples(model, tokenizer, sequences=64, length=512)  # doctest: +SKIP
    >>> report = lp.compress_(model, 0.6, batches)  # doctest: +SKIP
    """
    check_whole("sequences", sequences, 1)
    check_whole("length", length, 2)
    check_seed("seed", seed)
    check_whole("batch_size", batch_size, 1)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ArgumentError(f"dtype must be a floating-point dtype of torch or None, got {show(dtype)}.")
    check_writes(model, length)
    if not hasattr(tokenizer, "all_special_ids"):
        raise ArgumentError(f"own_samples needs the tokenizer of the model, got {show(tokenizer)}.")
    writer = _Writer(model, tokenizer, sequences, length, seed, _temperatures(temperature, length), first)
    with shown(progress), as_found(model), torch.no_grad(), _own_settings(model), _in_half(model, dtype):
        starts = range(0, sequences, SIDE_BY_SIDE)
        tokens = torch.cat([writer.write(start, min(start + SIDE_BY_SIDE, sequences)) for start in starts])
    parts = torch.split(tokens, batch_size)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]


def check_writes(model: nn.Module, length: int = 2) -> None:
    """Raises unless the model writes text by itself, sequences of so many tokens.

    Raises:
        ArgumentError: If it has fewer positions.
        UnsupportedError: If it writes none.
    """
    config = getattr(model, "config", None)
    if not callable(getattr(model, "generate", None)) or config is None:
        raise UnsupportedError(f"{type(model).__name__} is no model of transformers that writes text; give batches.")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{type(model).__name__} writes text about a given one only; give batches.")
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        raise ArgumentError(f"length must be at most {positions}, the positions of the model, got {length}.")


class _Writer:
    """Chooses the next tokens of several sequences; transformers calls it as a processor of logits.

    One number in ``[0, 1)`` for each place is drawn beforehand, and says how far to go in the cumulated probabilities.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        sequences: int,
        length: int,
        seed: int,
        temperatures: Tensor,
        first: First | None,
    ) -> None:
        self._model: Any = model
        self._device = next(model.parameters()).device
        self._size = _count(model, tokenizer)
        self._temperatures = temperatures
        source = torch.Generator().manual_seed(seed)
        self._drawn = torch.rand(sequences, length, dtype=torch.float64, generator=source).to(self._device)
        firsts, ends = tokens_of(model, tokenizer, first)
        self._firsts = torch.tensor(firsts, device=self._device)
        self._ends = torch.tensor(ends, dtype=torch.int64, device=self._device)
        self._rows = slice(0, 0)
        self._done = 0
        self._tell(0)

    def write(self, begin: int, end: int) -> Tensor:
        """The tokens of the sequences of these numbers, side by side."""
        self._rows = slice(begin, end)
        first = self._first(0)[:, None]
        tokens: Tensor = self._model.generate(
            first,
            attention_mask=torch.ones_like(first),
            generation_config=_settings(max_new_tokens=self._drawn.shape[1] - 1, do_sample=False, pad_token_id=0),
            logits_processor=[self],
        )
        self._done += tokens.numel()
        self._tell(0)
        return tokens.cpu()

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """Logits that leave one choice for each sequence."""
        rows, place = tokens.shape
        self._tell(rows * place)
        known = logits[:, : self._size].float() / self._temperatures[place]
        total = running_sum(known.softmax(-1).double())
        if not torch.isfinite(total[:, -1]).all():
            raise NumericalError("The model's logits are not finite; it cannot write text to calibrate with.")
        goal = self._drawn[self._rows, place, None] * total[:, -1:]
        chosen = torch.searchsorted(total, goal, right=True).clamp_(max=known.shape[1] - 1)[:, 0]
        last = tokens[:, -1]
        ended = torch.isin(last, self._ends) & ~torch.isin(last, self._firsts)  # GPT-2 begins a text as it ends one
        chosen = torch.where(ended, self._first(place), chosen)
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _first(self, place: int) -> Tensor:
        """The tokens that texts begin with which begin at this place."""
        return self._firsts[(self._drawn[self._rows, place] * len(self._firsts)).long()]

    def _tell(self, more: int) -> None:
        tell("sample", self._done + more, self._drawn.numel())


def tokens_of(model: Any, tokenizer: Any, first: First | None = None) -> tuple[list[int], list[int]]:
    """The tokens that texts may begin with, and those that end them."""
    return _first_tokens(model, tokenizer, first), _last_tokens(model, tokenizer)


def _count(model: Any, tokenizer: Any) -> int:
    """How many tokens both know: a tokenizer may have more than the model has embeddings for, or fewer."""
    return min(len(tokenizer), len(model.get_input_embeddings().weight))


def _first_tokens(model: Any, tokenizer: Any, first: First | None) -> list[int]:
    """Those to choose from."""
    count = _count(model, tokenizer)
    if isinstance(first, int) and not isinstance(first, bool) and 0 <= first < count:
        return [first]
    if first not in (None, "bos", "any"):
        raise ArgumentError(f"first must be 'bos', 'any' or a token below {count}, got {show(first)}.")
    if first != "any":
        holders = (tokenizer, getattr(model, "generation_config", None), model.config)
        found = [getattr(holder, "bos_token_id", None) for holder in holders]
        usable = [token for token in found if isinstance(token, int) and 0 <= token < count]
        if usable:
            return usable[:1]
        if first == "bos":
            raise ArgumentError("first='bos': neither the tokenizer nor the model knows such a token; give 'any'.")
    special = set(tokenizer.all_special_ids)
    return [token for token in range(count) if token not in special]


def _last_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Those that end a text."""
    found: set[int] = set()
    for holder in (tokenizer, getattr(model, "generation_config", None), model.config):
        token = getattr(holder, "eos_token_id", None)
        found |= {token} if isinstance(token, int) else set(token or ())
    return sorted(found)


def _temperatures(wish: object, length: int) -> Tensor:
    """Of each place."""
    if isinstance(wish, tuple | list) and len(wish) == 2:
        for value in wish:
            check_real("temperature", value, "(0, inf)")
    else:
        check_real("temperature", wish, "(0, inf)")
    begin, end = torch.tensor(wish if isinstance(wish, tuple | list) else (wish, wish), dtype=torch.float32)
    found: Tensor = begin + (end - begin) * (torch.arange(length) / TEMPERED).clamp_(max=1.0)
    return found


def _settings(**given: Any) -> Any:
    """Of generation."""
    import transformers  # a model of it is there

    made: Any = transformers.GenerationConfig  # untyped
    return made(**given)


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Inside, the model's own settings of generation are not there: transformers would mix them in."""
    before = model.generation_config
    model.generation_config = _settings()
    try:
        yield
    finally:
        model.generation_config = before


@contextmanager
def _in_half(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, forward passes compute in this type; None chooses.

    Autocast keeps the weights that it has made smaller only of trainable parameters, so all are trainable meanwhile.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    device = parameters[0].device.type
    single = all(parameter.dtype == torch.float32 for parameter in parameters)
    if dtype is None:
        dtype = torch.bfloat16 if single and _fast_at_bfloat16(device) else parameters[0].dtype
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.autocast(device, dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
            yield
    finally:
        for parameter, requires_grad in zip(parameters, flags, strict=True):
            parameter.requires_grad_(requires_grad)


def _fast_at_bfloat16(device: str) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and bool(torch.cpu._is_amx_tile_supported())
