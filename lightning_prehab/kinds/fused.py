"""Which linear layers are several projections in one, and where one ends and the next begins.

Cutting row blocks apart is exact whatever they mean, so these rules by name can choose badly but not wrongly. A
projection that mixes queries, keys and values head by head (GPT-NeoX, Bloom, Falcon) has no such blocks and is one
matrix.
"""

from typing import Any

from torch import nn

#: Names under which libraries keep queries, keys and values, one below the other.
_ATTENTION = {"qkv", "qkv_proj", "c_attn", "Wqkv", "in_proj_qkv"}
#: Names of a gate and what it multiplies, one below the other.
_GATED = {"gate_up_proj", "Wi"}


def fused_blocks(key: str, rows: int, parent: nn.Module | None) -> dict[str, int] | None:
    """The row blocks of a fused projection, or None if the layer is one.

    Args:
        key: Name of the layer in its parent.
        rows: Output size of the layer.
        parent: The module that holds it; sizes of heads are read there.

    Returns:
        ``{part: rows}`` from the first row to the last.

    >>> fused_blocks("qkv", 192, None)
    {'q': 64, 'k': 64, 'v': 64}
    """
    if key in _GATED:
        return {"gate": rows // 2, "up": rows // 2} if rows % 2 == 0 else None
    if key not in _ATTENTION:
        return None
    if getattr(parent, "is_cross_attention", False):  # GPT-2: the queries have a layer of their own
        return {"k": rows // 2, "v": rows // 2} if rows % 2 == 0 else None
    config = getattr(parent, "config", None)
    heads = _size(parent, config, "num_heads", "num_attention_heads")
    groups = _size(parent, config, "num_key_value_heads", "num_kv_heads")
    if heads and groups and rows % (heads + 2 * groups) == 0:
        size = rows // (heads + 2 * groups)
        return {"q": heads * size, "k": groups * size, "v": groups * size}
    return {"q": rows // 3, "k": rows // 3, "v": rows // 3} if rows % 3 == 0 else None


def _size(parent: Any, config: Any, *names: str) -> int | None:
    """The first of some integer attributes of a module or its config."""
    for owner in (parent, config):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
