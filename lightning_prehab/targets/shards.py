"""Models whose parameters lie in shards are not for every function."""

from torch import nn

from lightning_prehab.errors import UnsupportedError
from lightning_prehab.linalg.sharding import is_distributed


def check_not_in_shards(model: nn.Module, who: str) -> None:
    """Raises :class:`UnsupportedError` if a parameter of a model is a ``DTensor``.

    Args:
        model: Any module.
        who: What the user has called.
    """
    found = next((name for name, one in model.named_parameters() if is_distributed(one)), None)
    if found is not None:
        raise UnsupportedError(
            f"{who} works on a whole model, and parameters of this one lie in shards on several processes (the first: "
            f"{found!r}). Call it before fully_shard or parallelize_module, or on a model that is loaded from a "
            "consolidated checkpoint; in training, CompressionCallback cuts sharded models."
        )
