"""Tiny models with a tokenizer, made in memory: for trying a machine or a method, not for use."""

from __future__ import annotations

from typing import Any

import torch

from veneer.bases.loading import default_device
from veneer.bases.pretrained import Pretrained

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def tiny_decoder(seed: int = 0) -> Pretrained:
    """A two-layer Llama of 60,000 random weights whose tokenizer knows the digits as words. Nothing is downloaded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return _made(LlamaForCausalLM, config, tokenizer, "tiny-decoder", seed)


def tiny_encoder(seed: int = 0) -> Pretrained:
    """A two-layer BERT classifier of a million random weights, wide enough for every method's own defaults, with the
    same tokenizer. All that a method may look for is there: biases, norms, attention, a head."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _made(BertForSequenceClassification, config, tokenizer, "tiny-encoder", seed)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *WORDS, "next", ":"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _made(architecture: Any, config: Any, tokenizer: Any, name: str, seed: int) -> Pretrained:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = architecture(config).eval()
    return Pretrained(model.to(default_device()), tokenizer, name=name)
