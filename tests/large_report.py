"""A report about as many layers as a small LLaMA has, put together by hand: nothing is decomposed."""

from dataclasses import replace

import torch

import lightning_prehab as lp
from lightning_prehab.plan.layer_plan import LayerPlan
from lightning_prehab.report.compression_report import CompressionReport
from lightning_prehab.report.origin import Origin
from lightning_prehab.report.thinned_spectrum import LayerSpectrum

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
BLOCKS = 30
DENSE = "every rank below break-even costs more than it saves"


def large_report(**settings: object) -> CompressionReport:
    """Ranks grow with the block; ``o_proj`` of block 7 stays dense."""
    layers = [
        LayerPlan(f"model.layers.{block}.{kind}", *shape, rank=20 + block, relative_error=0.1 + block / 100)
        for block in range(BLOCKS)
        for kind, shape in SHAPES.items()
    ]
    layers = [replace(layer, loss_increase=0.001) for layer in layers]
    dense = next(place for place, layer in enumerate(layers) if layer.name == "model.layers.7.self_attn.o_proj")
    layers[dense] = replace(layers[dense], rank=None, reason=DENSE, relative_error=0.0, loss_increase=None)
    skipped = {"model.embed_tokens": "embeddings are looked up, not multiplied", "lm_head": "its weight is tied"}
    before = sum(layer.dense_parameters for layer in layers) + 28_000_000
    plan = lp.CompressionPlan(tuple(layers), lp.KroneckerSVD(), skipped, before)
    after = before - plan.dense_parameters + plan.parameters
    errors = {layer.name: 0.2 for layer in layers if layer.rank is not None}
    spectra = {
        layer.name: LayerSpectrum.of(torch.linspace(1, 0.1, min(layer.out_features, layer.in_features)), layer.rank)
        for layer in layers
    }
    origin = Origin("LlamaForCausalLM (small)", "2026-01-31T12:00:05Z", {"torch": "2.6.0"})
    facts = {"spectra": spectra, "origin": origin, **settings}
    return CompressionReport(plan, errors, before, after, **facts)
