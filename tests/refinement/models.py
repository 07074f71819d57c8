"""Dense models with something to lose, and the same ones cut."""

import copy

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig

import lightning_prehab as lp
from tests.tiny_llama import llama

Batches = list[dict[str, Tensor]] | list[Tensor] | list[list[Tensor]]


def decisive_(model: nn.Module) -> nn.Module:
    """Weights with a spectrum that falls, large enough that answers differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                m, n = module.weight.shape
                u, _ = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator))
                v, _ = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator))
                module.weight.copy_((u * 3.0 * torch.exp(-torch.arange(min(m, n)) / 6)) @ v.mT)
    return model.eval()


def language() -> tuple[nn.Module, Batches]:
    return decisive_(llama()), [{"input_ids": torch.randint(1, 48, (32, 16))} for _ in range(8)]


def encoder() -> tuple[nn.Module, Batches]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.BertModel(BertConfig(vocab_size=48, **sizes), add_pooling_layer=False)
    mask = torch.ones(32, 16, dtype=torch.long)
    mask[:20, 10:] = 0
    return decisive_(model), [{"input_ids": torch.randint(48, (32, 16)), "attention_mask": mask} for _ in range(8)]


def vision() -> tuple[nn.Module, Batches]:
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=32, num_classes=5)
    return decisive_(model), [torch.randn(32, 3, 32, 32) for _ in range(8)]


def mlp() -> tuple[nn.Module, Batches]:
    net = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 6))
    return decisive_(net), [torch.randn(128, 24) for _ in range(8)]


MODELS = {"language": language, "encoder": encoder, "vision": vision, "mlp": mlp}
#: What is measured of each.
MEASURES = {"language": "divergence", "encoder": "squared", "vision": "divergence", "mlp": "squared"}


def cut(name: str, layout: str = "factors", keep: float = 0.4) -> tuple[nn.Module, nn.Module, Batches]:
    """A cut model, by plain SVD so that much can be won back, the dense one, and batches: the fifth is held back."""
    dense, batches = MODELS[name]()
    model = copy.deepcopy(dense)
    lp.compress_(model, keep, factorization=lp.SVD(), layout=layout, progress=False)
    return model, dense, batches
