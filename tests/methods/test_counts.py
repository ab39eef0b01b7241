"""Trainable numbers as published. All models on the meta device: nothing is allocated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T

import veneer
from veneer.methods import method_class


def count(model: Any, config: Any, name: str, **settings: Any) -> int:
    with torch.device("meta"):
        base = veneer.Base(model(config))
    return base.attach(method_class(name)(**settings)).trainable


BERT_LARGE = T.BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
ROBERTA_LARGE = T.RobertaConfig(
    vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
DEBERTA_XXL = T.DebertaV2Config(
    vocab_size=1000, hidden_size=1536, num_hidden_layers=48, num_attention_heads=24, intermediate_size=6144
)
LLAMA_7B = T.LlamaConfig()
T5_BASE = T.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
T0_3B = T.T5Config(d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, feed_forward_proj="gated-gelu")
T0_11B = T.T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
BART_LARGE = T.BartConfig()


@pytest.mark.parametrize(
    ("model", "config", "name", "settings", "published"),
    [
        (T.RobertaModel, T.RobertaConfig(vocab_size=50265), "lora", {"rank": 8, "targets": ["q", "v"]}, 294_912),
        (T.RobertaModel, ROBERTA_LARGE, "lora", {"rank": 8, "targets": ["q", "v"]}, 786_432),
        (T.DebertaV2Model, DEBERTA_XXL, "lora", {"rank": 16, "targets": ["q", "v"]}, 4_718_592),
        (T.LlamaModel, LLAMA_7B, "lora", {"rank": 32, "targets": ["q", "k", "v", "up", "down"]}, 56_098_816),
        (T.LlamaModel, LLAMA_7B, "lora", {"rank": 64}, 159_907_840),
        (T.BertModel, BERT_LARGE, "houlsby", {"bottleneck": 64}, 6_343_680),
        # with m = 24, reduction 32; the published 1,855,104 less its 47,616 trained norm weights
        (T.T5ForConditionalGeneration, T5_BASE, "houlsby", {"bottleneck": 24}, 1_855_104 - 47_616),
        (T.T5ForConditionalGeneration, T5_BASE, "pfeiffer", {"reduction": 32}, 951_360 - 47_616),
        (T.T5ForConditionalGeneration, T5_BASE, "compacter", {}, 161_728 - 47_616),
        (T.T5ForConditionalGeneration, T5_BASE, "compacter", {"places": "mlp"}, 104_704 - 47_616),
        (T.LlamaModel, LLAMA_7B, "dora", {"rank": 32, "targets": ["q", "k", "v", "up", "down"]}, 56_975_360),
        (T.RobertaModel, T.RobertaConfig(vocab_size=50265), "vera", {"rank": 1024, "targets": ["q", "v"]}, 43_008),
        (T.RobertaModel, ROBERTA_LARGE, "vera", {"rank": 256, "targets": ["q", "v"]}, 61_440),
        (T.T5ForConditionalGeneration, T0_3B, "norm", {}, 249_856),
        (T.BertModel, T.BertConfig(), "bitfit", {}, 102_144),
        (T.BertModel, BERT_LARGE, "bitfit", {}, 271_360),
        (T.T5ForConditionalGeneration, T0_3B, "ia3", {}, 540_672),
        (T.T5ForConditionalGeneration, T0_11B, "ia3", {}, 1_081_344),
        (T.BartModel, BART_LARGE, "prefix", {"length": 200}, 14_745_600),
        (T.BartModel, BART_LARGE, "mam", {"mlp": False}, 27_414_528),
        # the published numbers of the three, and four gates a layer
        (T.BertModel, T.BertConfig(), "unipelt", {}, 894_528 + 294_912 + 184_320 + 12 * 4 * 769),
        (T.T5ForConditionalGeneration, T5_BASE, "prompt", {"length": 100, "init": "random"}, 76_800),
    ],
)
def test_published(model: Any, config: Any, name: str, settings: dict[str, Any], published: int) -> None:
    assert count(model, config, name, **settings) == published


def test_formulas() -> None:
    """On Llama-7B: SHiRA has as many as LoRA; OFT in · (β − 1)/2 a map; LoKr by its factors."""
    lora = count(T.LlamaModel, LLAMA_7B, "lora", rank=4, targets=["q", "down"])
    assert count(T.LlamaModel, LLAMA_7B, "shira", rank=4, targets=["q", "down"]) == lora
    assert count(T.LlamaModel, LLAMA_7B, "oft", block_size=32, targets=["q"]) == 32 * 4096 * 31 // 2
    assert count(T.LlamaModel, LLAMA_7B, "lokr", rank=8, targets=["q"]) == 32 * (64 * 64 + 2 * 64 * 8)


def test_other_names() -> None:
    assert method_class("adapter-bert").name == "houlsby"
    assert method_class("adapter-comet").name == "compacter"
