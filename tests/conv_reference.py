"""A convolution as numpy loops over positions, and hypothesis strategies for its settings."""

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

_PAD = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class Case(NamedTuple):
    """Settings of a convolution and the sizes of its input."""

    dims: int
    channels: tuple[int, int]
    size: tuple[int, ...]
    settings: dict[str, Any]

    def conv(self, dtype=torch.float64):
        kind = nn.Conv2d if self.dims == 2 else nn.Conv1d
        return kind(*self.channels, **self.settings, dtype=dtype)

    def input(self, batch=2):
        return torch.randn(batch, self.channels[0], *self.size, dtype=torch.float64)


@st.composite
def cases(draw, dims=(1, 2), groups=(1, 2, 3)):
    """Every kernel size, stride, padding, dilation, number of groups and padding mode that torch accepts."""
    d, g = draw(st.sampled_from(dims)), draw(st.sampled_from(groups))
    channels = (g * draw(st.integers(1, 3)), g * draw(st.integers(1, 3)))
    kernel = tuple(draw(st.sampled_from([1, 3, 5, 7, 2])) for _ in range(d))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(d))
    mode = draw(st.sampled_from(list(_PAD)))
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * d
    if padding != "same":
        stride = tuple(draw(st.integers(1, 3)) for _ in range(d))
    if padding == "numbers":
        padding = tuple(draw(st.integers(0, 3)) for _ in range(d))
    spans = [s * (k - 1) + 1 for k, s in zip(kernel, dilation, strict=True)]
    size = tuple(draw(st.integers(max(span, 4), span + 3)) for span in spans)  # reflection needs more than the padding
    settings = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": g,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    return Case(d, channels, size, settings)


def patches(conv, x):
    """What the kernel is multiplied with: float64 array ``(B, L, groups, n)``; ``x`` is ``(B, C, *size)``."""
    x = x.detach().double().numpy()
    sides = [(0, 0), (0, 0)]
    for axis, kernel in enumerate(conv.kernel_size):
        if conv.padding == "valid":
            sides.append((0, 0))
        elif conv.padding == "same":
            total = conv.dilation[axis] * (kernel - 1)
            sides.append((total // 2, total - total // 2))
        else:
            sides.append((conv.padding[axis], conv.padding[axis]))
    x = np.pad(x, sides, mode=_PAD[conv.padding_mode])
    places = [
        range(0, size - dilation * (kernel - 1), stride)
        for size, kernel, stride, dilation in zip(
            x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
        )
    ]
    each = conv.in_channels // conv.groups
    found = []
    for start in np.ndindex(*(len(p) for p in places)):
        at = [p[i] for p, i in zip(places, start, strict=True)]
        taps = [
            slice(first, first + d * (k - 1) + 1, d)
            for first, k, d in zip(at, conv.kernel_size, conv.dilation, strict=True)
        ]
        window = x[(slice(None), slice(None), *taps)]
        found.append(
            np.stack([window[:, g * each : (g + 1) * each].reshape(len(x), -1) for g in range(conv.groups)], 1)
        )
    return np.stack(found, 1)


def convolve(conv, x, kernel):
    """``(B, out, L)``: the kernel (any array of the shape of the weight) at every position, bias added."""
    tokens = patches(conv, x)
    rows = np.asarray(kernel.detach().double()).reshape(conv.groups, conv.out_channels // conv.groups, -1)
    y = np.einsum("blgn,gmn->bgml", tokens, rows).reshape(len(tokens), conv.out_channels, -1)
    return y if conv.bias is None else y + conv.bias.detach().double().numpy()[None, :, None]
