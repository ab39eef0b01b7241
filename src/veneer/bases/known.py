"""Well-known architectures: what their public configs say, and how many parameters each is published with.

Facts for planning, so that a model can be planned for that is not on this machine: no weights, no tokenizers. Names are
those the models are known by; a hub id counts as its last part, in lower case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Known:
    """An architecture by its sizes.

    Attributes:
        name: what it is called.
        parameters: how many it is published with (shared ones once; encoders without a head).
        model_type: transformers' name of the architecture.
        settings: what of its config differs from the defaults of that.
        dtype: its weights are published in.
        also: other names.
        own_head: whether its output projection is not the embedding, though the architecture ties them.
    """

    name: str
    parameters: int
    model_type: str
    settings: Mapping[str, Any]
    dtype: str = "bfloat16"
    also: tuple[str, ...] = ()
    own_head: bool = False

    @property
    def auto_class(self) -> str:
        """The transformers auto class that has the parameters counted."""
        return _CLASSES.get(self.model_type, "AutoModelForCausalLM")


_ENCODERS = ("bert", "roberta", "electra", "albert", "deberta-v2", "distilbert", "xlnet")
_CLASSES = {**dict.fromkeys(_ENCODERS, "AutoModel"), **dict.fromkeys(("t5", "bart"), "AutoModelForSeq2SeqLM")}
_LLAMA = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SIZES: dict[str, tuple[str, ...]] = {
    "bert": _LLAMA,
    "roberta": _LLAMA,
    "electra": _LLAMA,
    "albert": (*_LLAMA, "embedding_size"),
    "deberta-v2": _LLAMA,
    "distilbert": ("vocab_size", "dim", "hidden_dim", "n_layers", "n_heads"),
    "xlnet": ("vocab_size", "d_model", "d_inner", "n_layer", "n_head"),
    "gpt2": ("n_embd", "n_layer", "n_head"),
    "opt": ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads"),
    "gpt_neox": _LLAMA,
    "phi": _LLAMA,
    "t5": ("vocab_size", "d_model", "d_ff", "num_layers", "num_heads", "d_kv"),
    "bart": ("vocab_size", "d_model", "encoder_ffn_dim", "encoder_layers", "encoder_attention_heads"),
}
_GROUPED = (*_LLAMA, "num_key_value_heads")
_HEADED = (*_GROUPED, "head_dim")
_SIZES |= dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "phi3"), _GROUPED)
_SIZES |= dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen3", "qwen3_moe"), _HEADED)
"""What the numbers of a row stand for."""


def _row(name: str, parameters: int, model_type: str, *sizes: int, also: str = "", **settings: Any) -> Known:
    dtype = settings.pop("dtype", "bfloat16")
    if model_type == "bart":
        width = dict(zip(_SIZES[model_type], sizes, strict=True))
        settings |= {name.replace("encoder", "decoder"): value for name, value in width.items() if "encoder" in name}
    if model_type == "t5":
        settings["decoder_start_token_id"] = 0  # as published; transformers' own config has none
    own_head = settings.pop("own_head", False)
    named = dict(zip(_SIZES[model_type], sizes, strict=True)) | settings
    return Known(name, parameters, model_type, named, dtype, tuple(also.split()), own_head)


_32: dict[str, Any] = {"dtype": "float32"}
_16: dict[str, Any] = {"dtype": "float16"}
_PREPARED: Mapping[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROBERTA: dict[str, Any] = {"max_position_embeddings": 514, "type_vocab_size": 1, **_PREPARED, **_32}
_DEBERTA: dict[str, Any] = {
    "relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0, **_32,
}  # fmt: skip
_FLAN: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "own_head": True, **_32}
_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_PYTHIA: dict[str, Any] = {"rotary_pct": 0.25, **_16}
_ROWS = (
    # encoders, without a head
    _row("bert-base", 109_482_240, "bert", 30522, 768, 3072, 12, 12, also="bert-base-uncased", **_32),
    _row("bert-large", 335_141_888, "bert", 30522, 1024, 4096, 24, 16, also="bert-large-uncased", **_32),
    _row("roberta-base", 124_645_632, "roberta", 50265, 768, 3072, 12, 12, **_ROBERTA),
    _row("roberta-large", 355_359_744, "roberta", 50265, 1024, 4096, 24, 16, **_ROBERTA),
    _row("distilbert-base", 66_362_880, "distilbert", 30522, 768, 3072, 6, 12, also="distilbert-base-uncased", **_32),
    _row("albert-base", 11_683_584, "albert", 30000, 768, 3072, 12, 12, 128, also="albert-base-v2", **_32),
    _row("electra-base", 108_891_648, "electra", 30522, 768, 3072, 12, 12, embedding_size=768,
         also="electra-base-discriminator", **_32),
    _row("deberta-v3-base", 183_831_552, "deberta-v2", 128100, 768, 3072, 12, 12, **_DEBERTA),
    _row("deberta-v3-large", 434_012_160, "deberta-v2", 128100, 1024, 4096, 24, 16, **_DEBERTA),
    _row("xlnet-base", 116_718_336, "xlnet", 32000, 768, 3072, 12, 12, also="xlnet-base-cased", **_32),
    _row("minilm-l6", 22_713_216, "bert", 30522, 384, 1536, 6, 12, also="all-minilm-l6-v2", **_32),
    # encoder-decoders
    _row("t5-small", 60_506_624, "t5", 32128, 512, 2048, 6, 8, 64, **_32),
    _row("t5-base", 222_903_552, "t5", 32128, 768, 3072, 12, 12, 64, **_32),
    _row("t5-large", 737_668_096, "t5", 32128, 1024, 4096, 24, 16, 64, **_32),
    _row("t5-3b", 2_851_598_336, "t5", 32128, 1024, 16384, 24, 32, 128, **_32),
    _row("t5-11b", 11_307_321_344, "t5", 32128, 1024, 65536, 24, 128, 128, **_32),
    _row("flan-t5-small", 76_961_152, "t5", 32128, 512, 1024, 8, 6, 64, **_FLAN),
    _row("flan-t5-base", 247_577_856, "t5", 32128, 768, 2048, 12, 12, 64, **_FLAN),
    _row("flan-t5-large", 783_150_080, "t5", 32128, 1024, 2816, 24, 16, 64, **_FLAN),
    _row("flan-t5-xl", 2_849_757_184, "t5", 32128, 2048, 5120, 24, 32, 64, **_FLAN),
    _row("flan-t5-xxl", 11_135_332_352, "t5", 32128, 4096, 10240, 24, 64, 64, **_FLAN),
    _row("bart-base", 139_420_416, "bart", 50265, 768, 3072, 6, 12, **_32),
    _row("bart-large", 406_291_456, "bart", 50265, 1024, 4096, 12, 16, **_32),
    # decoders
    _row("gpt2", 124_439_808, "gpt2", 768, 12, 12, **_32),
    _row("gpt2-medium", 354_823_168, "gpt2", 1024, 24, 16, **_32),
    _row("gpt2-large", 774_030_080, "gpt2", 1280, 36, 20, **_32),
    _row("gpt2-xl", 1_557_611_200, "gpt2", 1600, 48, 25, **_32),
    _row("opt-1.3b", 1_315_758_080, "opt", 2048, 8192, 24, 32, **_16),
    _row("opt-6.7b", 6_658_473_984, "opt", 4096, 16384, 32, 32, **_16),
    _row("pythia-1.4b", 1_414_647_808, "gpt_neox", 50304, 2048, 8192, 24, 16, **_PYTHIA),
    _row("pythia-6.9b", 6_857_302_016, "gpt_neox", 50432, 4096, 16384, 32, 32, **_PYTHIA),
    _row("phi-2", 2_779_683_840, "phi", 51200, 2560, 10240, 32, 32, partial_rotary_factor=0.4, **_16),
    _row("phi-3-mini", 3_821_079_552, "phi3", 32064, 3072, 8192, 32, 32, 32, also="phi-3-mini-4k-instruct"),
    _row("smollm2-135m", 134_515_008, "llama", 49152, 576, 1536, 30, 9, 3, also="smollm2-135m-instruct", **_TIED),
    _row("smollm2-360m", 361_821_120, "llama", 49152, 960, 2560, 32, 15, 5, also="smollm2-360m-instruct", **_TIED),
    _row("smollm2-1.7b", 1_711_376_384, "llama", 49152, 2048, 8192, 24, 32, 32, also="smollm2-1.7b-instruct", **_TIED),
    _row("tinyllama-1.1b", 1_100_048_384, "llama", 32000, 2048, 5632, 22, 32, 4),
    _row("llama-7b", 6_738_415_616, "llama", 32000, 4096, 11008, 32, 32, 32, **_16),
    _row("llama-13b", 13_015_864_320, "llama", 32000, 5120, 13824, 40, 40, 40, **_16),
    _row("llama-30b", 32_528_943_616, "llama", 32000, 6656, 17920, 60, 52, 52, also="llama-33b", **_16),
    _row("llama-65b", 65_285_660_672, "llama", 32000, 8192, 22016, 80, 64, 64, **_16),
    _row("llama-2-7b", 6_738_415_616, "llama", 32000, 4096, 11008, 32, 32, 32, also="llama-2-7b-hf llama-2-7b-chat-hf"),
    _row("llama-2-13b", 13_015_864_320, "llama", 32000, 5120, 13824, 40, 40, 40, also="llama-2-13b-hf"),
    _row("llama-2-70b", 68_976_648_192, "llama", 32000, 8192, 28672, 80, 64, 8, also="llama-2-70b-hf"),
    _row("llama-3-8b", 8_030_261_248, "llama", 128256, 4096, 14336, 32, 32, 8,
         also="llama-3.1-8b meta-llama-3-8b llama-3.1-8b-instruct"),
    _row("llama-3-70b", 70_553_706_496, "llama", 128256, 8192, 28672, 80, 64, 8,
         also="llama-3.1-70b llama-3.3-70b meta-llama-3-70b llama-3.1-70b-instruct llama-3.3-70b-instruct"),
    _row("llama-3.1-405b", 405_853_388_800, "llama", 128256, 16384, 53248, 126, 128, 8,
         also="llama-3-405b llama-3.1-405b-instruct"),
    _row("llama-3.2-1b", 1_235_814_400, "llama", 128256, 2048, 8192, 16, 32, 8, head_dim=64,
         also="llama-3.2-1b-instruct", **_TIED),
    _row("llama-3.2-3b", 3_212_749_824, "llama", 128256, 3072, 8192, 28, 24, 8, head_dim=128,
         also="llama-3.2-3b-instruct", **_TIED),
    _row("mistral-7b", 7_241_732_096, "mistral", 32000, 4096, 14336, 32, 32, 8, also="mistral-7b-v0.1"),
    _row("mistral-7b-v0.3", 7_248_023_552, "mistral", 32768, 4096, 14336, 32, 32, 8, also="mistral-7b-instruct-v0.3"),
    _row("mixtral-8x7b", 46_702_792_704, "mixtral", 32000, 4096, 14336, 32, 32, 8,
         also="mixtral-8x7b-v0.1 mixtral-8x7b-instruct-v0.1"),
    _row("mixtral-8x22b", 140_620_634_112, "mixtral", 32000, 6144, 16384, 56, 48, 8, also="mixtral-8x22b-v0.1"),
    _row("qwen2.5-0.5b", 494_032_768, "qwen2", 151936, 896, 4864, 24, 14, 2, also="qwen2.5-0.5b-instruct", **_TIED),
    _row("qwen2.5-1.5b", 1_543_714_304, "qwen2", 151936, 1536, 8960, 28, 12, 2, also="qwen2.5-1.5b-instruct", **_TIED),
    _row("qwen2.5-3b", 3_085_938_688, "qwen2", 151936, 2048, 11008, 36, 16, 2, also="qwen2.5-3b-instruct", **_TIED),
    _row("qwen2.5-7b", 7_615_616_512, "qwen2", 152064, 3584, 18944, 28, 28, 4, also="qwen2.5-7b-instruct"),
    _row("qwen2.5-14b", 14_770_033_664, "qwen2", 152064, 5120, 13824, 48, 40, 8, also="qwen2.5-14b-instruct"),
    _row("qwen2.5-32b", 32_763_876_352, "qwen2", 152064, 5120, 27648, 64, 40, 8, also="qwen2.5-32b-instruct"),
    _row("qwen2.5-72b", 72_706_203_648, "qwen2", 152064, 8192, 29568, 80, 64, 8, also="qwen2.5-72b-instruct"),
    _row("qwen3-0.6b", 596_049_920, "qwen3", 151936, 1024, 3072, 28, 16, 8, 128, **_TIED),
    _row("qwen3-1.7b", 1_720_574_976, "qwen3", 151936, 2048, 6144, 28, 16, 8, 128, **_TIED),
    _row("qwen3-4b", 4_022_468_096, "qwen3", 151936, 2560, 9728, 36, 32, 8, 128, **_TIED),
    _row("qwen3-8b", 8_190_735_360, "qwen3", 151936, 4096, 12288, 36, 32, 8, 128),
    _row("qwen3-14b", 14_768_307_200, "qwen3", 151936, 5120, 17408, 40, 40, 8, 128),
    _row("qwen3-32b", 32_762_123_264, "qwen3", 151936, 5120, 25600, 64, 64, 8, 128),
    _row("qwen3-30b-a3b", 30_532_122_624, "qwen3_moe", 151936, 2048, 6144, 48, 32, 4, 128,
         moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
    _row("gemma-2b", 2_506_172_416, "gemma", 256000, 2048, 16384, 18, 8, 1, 256),
    _row("gemma-7b", 8_537_680_896, "gemma", 256000, 3072, 24576, 28, 16, 16, 256),
    _row("gemma-2-2b", 2_614_341_888, "gemma2", 256000, 2304, 9216, 26, 8, 4, 256),
    _row("gemma-2-9b", 9_241_705_984, "gemma2", 256000, 3584, 14336, 42, 16, 8, 256),
    _row("gemma-2-27b", 27_227_128_320, "gemma2", 256000, 4608, 36864, 46, 32, 16, 128),
    _row("gemma-3-1b", 999_885_952, "gemma3_text", 262144, 1152, 6912, 26, 4, 1, 256, also="gemma-3-1b-it"),
)  # fmt: skip
KNOWN: Mapping[str, Known] = {name: row for row in _ROWS for name in (row.name, *row.also)}
"""By name; several names may stand for one."""
