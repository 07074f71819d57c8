"""What the zoo knows of an architecture: how it is built and called, and where its loss is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn

VOCABULARY = 48
CLASSES = 5


@dataclass(frozen=True)
class Architecture:
    """One row of the zoo.

    Attributes:
        name: As people call it; rows of the same name come from different libraries.
        library: Where it comes from.
        family: What it is for.
        tiny: Builds it with some thousand parameters.
        published: Builds it in a published size.
        size: The name of that size.
        batch: A batch for the tiny one.
    """

    name: str
    library: str
    family: str
    tiny: Callable[[], nn.Module]
    published: Callable[[], nn.Module]
    size: str
    batch: Callable[[], Any]

    @property
    def id(self) -> str:
        """The name and the library, for test names."""
        return f"{self.name} ({self.library})"

    def build(self, seed: int = 0) -> nn.Module:
        """The tiny model, in eval mode: the same weights for the same seed, the global random state left alone.

        What the libraries set to a constant (norms, biases, layer scales of 1e-6) is moved too, and batch norms have
        seen the batch, so that every layer acts on the output.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.tiny()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape), alpha=0.1)
                norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
                momenta = [norm.momentum for norm in norms]
                for norm in norms:
                    norm.momentum = 1.0
                if norms:
                    output_of(model.train(), self.batch())
                for norm, momentum in zip(norms, momenta, strict=True):
                    norm.momentum = momentum
        return model.eval()

    def build_published(self) -> nn.Module:
        """The published size, without memory for its weights."""
        with torch.device("meta"):
            return self.published()


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """What the tests compare: logits, whatever the library calls them."""
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    if isinstance(output, Tensor):
        return output
    return output.logits if "logits" in output else output.logits_per_image


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss where it has one, else the cross-entropy of fixed labels."""
    if isinstance(batch, Mapping):
        return model(**batch).loss
    return nn.functional.cross_entropy(model(batch), torch.arange(len(batch)) % CLASSES)


def tokens(count: int = 2, length: int = 10) -> Tensor:
    """Tokens that are none of the special ones of the tiny configurations."""
    return torch.arange(count * length).view(count, length) * 7 % (VOCABULARY - 4) + 4


def sentences() -> dict[str, Tensor]:
    return {
        "input_ids": tokens(),
        "attention_mask": torch.ones(2, 10, dtype=torch.long),
        "labels": torch.tensor([0, 1]),
    }


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def images(size: int = 16, count: int = 4) -> Tensor:
    return random(count, 3, size, size)


def labelled_images(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": images(size), "labels": torch.arange(4) % CLASSES}


def captions(size: int = 16) -> dict[str, Any]:
    ids = tokens(4)
    ids[:, -1] = 2  # CLIP reads the text where it ends
    return {"input_ids": ids, "pixel_values": images(size), "return_loss": True}


def speech() -> dict[str, Tensor]:
    return {"input_values": random(2, 400), "labels": torch.tensor([0, 1])}


def spectrogram() -> dict[str, Tensor]:
    return {"input_features": random(2, 8, 20), "labels": tokens(2, 6)}


def hf(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    """A builder for a class of transformers; the settings are those of its configuration."""

    def build() -> nn.Module:
        model = getattr(transformers, kind)
        return model(model.config_class(**settings))

    return build


def of_timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **settings)


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision.models, name)(weights=None)
