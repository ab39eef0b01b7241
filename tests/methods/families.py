"""One small random model of each family, with inputs for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as T

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "initializer_range": 0.2,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {**SMALL, **TEXT, "num_key_value_heads": 2}
MARKER = 50
IDS = torch.arange(2 * 7).view(2, 7) + 5
IDS[:, 2] = MARKER  # where virtual tokens may stand
OWN_NORMS: dict[type, Callable[..., torch.Tensor]] = {}
IMAGE = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)


@dataclass(frozen=True)
class Family:
    """How to make a model and call it."""

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: dict[str, torch.Tensor]
    generates: bool = False
    checkpoints: bool = True

    def model(self, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
        """The same weights every time; biases and norms are not left at their initial zeros and ones."""
        torch.manual_seed(0)
        model = self.make().to(dtype).eval()
        for kind in {type(module) for module in model.modules()} - set(OWN_NORMS):
            if kind.__name__.endswith(("RMSNorm", "T5LayerNorm")):
                OWN_NORMS[kind], kind.forward = kind.forward, exact_norm
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or name.endswith("bias"):
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype) * 0.2)
        return model


def run(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's main output."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    output = model(**cast)
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return output[name]
    return output if isinstance(output, torch.Tensor) else output[0]


class Plain(torch.nn.Module):
    """No transformers model at all."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(99, 32)
        self.conv = torch.nn.Conv1d(32, 24, 3, padding=1)
        self.up = torch.nn.Linear(24, 48)
        self.down = torch.nn.Linear(48, 24, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.table(input_ids).mT).mT
        return self.down(torch.tanh(self.up(x)))


def _causal(name: str, config: Any) -> Family:
    return Family(
        name, lambda: T.AutoModelForCausalLM.from_config(copy.deepcopy(config)), {"input_ids": IDS}, generates=True
    )


def _encoder(name: str, config: Any, **more: Any) -> Family:
    def make() -> Any:
        config.num_labels = 3
        return T.AutoModelForSequenceClassification.from_config(copy.deepcopy(config))

    return Family(name, make, {"input_ids": IDS}, **more)


BERT = {**SMALL, **TEXT}
ENCODER_DECODER: dict[str, Any] = {
    "encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 99, "init_std": 0.2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
VISION = {**SMALL, "image_size": 16, "patch_size": 8}

FAMILIES = {
    family.name: family
    for family in (
        _causal("llama", T.LlamaConfig(**LLAMA)),
        _causal("mistral", T.MistralConfig(**LLAMA, sliding_window=None)),
        _causal("qwen2", T.Qwen2Config(**LLAMA)),
        _causal("qwen3", T.Qwen3Config(**LLAMA, head_dim=8)),
        _causal("gemma", T.GemmaConfig(**LLAMA, head_dim=8)),
        _causal("phi", T.PhiConfig(**SMALL, **TEXT)),
        _causal("phi3", T.Phi3Config(**LLAMA)),
        _causal("mixtral", T.MixtralConfig(**LLAMA, num_local_experts=4, sliding_window=None, experts_implementation="eager")),
        _causal("gpt2", T.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=99, n_positions=64, bos_token_id=1,
                                     eos_token_id=2, initializer_range=0.2)),
        _causal("opt", T.OPTConfig(num_hidden_layers=2, hidden_size=32, ffn_dim=48, num_attention_heads=4,
                                   word_embed_proj_dim=32, init_std=0.2, **TEXT)),
        _causal("gpt-neox", T.GPTNeoXConfig(**SMALL, **TEXT)),
        _encoder("bert", T.BertConfig(**BERT)),
        _encoder("roberta", T.RobertaConfig(**BERT)),
        _encoder("distilbert", T.DistilBertConfig(n_layers=2, dim=32, hidden_dim=48, n_heads=4, initializer_range=0.2, **TEXT)),
        _encoder("electra", T.ElectraConfig(**BERT, embedding_size=16)),
        _encoder("albert", T.AlbertConfig(**BERT, embedding_size=16), checkpoints=False),
        _encoder("deberta-v2", T.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])),
        _encoder("deberta-v3", T.DebertaV2Config(**BERT, relative_attention=True, pos_att_type=["p2c", "c2p"],
                                                 share_att_key=True, position_buckets=4, max_relative_positions=64,
                                                 position_biased_input=False, norm_rel_ebd="layer_norm")),
        _encoder("xlnet", T.XLNetConfig(n_layer=2, d_model=32, d_inner=48, n_head=4, vocab_size=99,
                                        initializer_range=0.2, pad_token_id=0), checkpoints=False),
        Family(
            "t5",
            lambda: T.T5ForConditionalGeneration(
                T.T5Config(num_layers=2, num_decoder_layers=2, d_model=32, d_ff=48, num_heads=4, d_kv=8, vocab_size=99,
                           feed_forward_proj="gated-gelu", decoder_start_token_id=1, pad_token_id=0, eos_token_id=2)
            ),
            {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]},
        ),
        Family("bart", lambda: T.BartForConditionalGeneration(T.BartConfig(**ENCODER_DECODER, max_position_embeddings=64)),
               {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}),
        Family("whisper", lambda: T.WhisperForConditionalGeneration(
            T.WhisperConfig(**ENCODER_DECODER, num_mel_bins=8, max_source_positions=10, max_target_positions=32)),
               {"input_features": torch.linspace(-1, 1, 2 * 8 * 20).view(2, 8, 20), "decoder_input_ids": IDS[:, :4]}),
        Family("vit", lambda: T.ViTForImageClassification(T.ViTConfig(**VISION, num_labels=3)), {"pixel_values": IMAGE}),
        Family("clip", lambda: T.CLIPModel(T.CLIPConfig(
            text_config={**SMALL, **TEXT}, vision_config=VISION, projection_dim=16)),
               {"input_ids": IDS, "pixel_values": IMAGE}),
        Family("yolos", lambda: T.YolosForObjectDetection(
            T.YolosConfig(**{**VISION, "image_size": [16, 16]}, num_detection_tokens=3, num_labels=3)), {"pixel_values": IMAGE}),
        Family("wav2vec2", lambda: T.Wav2Vec2ForSequenceClassification(T.Wav2Vec2Config(
            **SMALL, vocab_size=99, conv_dim=(16, 16), conv_kernel=(3, 3), conv_stride=(2, 2),
            num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_labels=3, apply_spec_augment=False, layerdrop=0.0)),
               {"input_values": torch.linspace(-1, 1, 2 * 64).view(2, 64).sin()}),
        Family("plain", Plain, {"input_ids": IDS}, checkpoints=False),
    )
}  # fmt: skip


def exact_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norms as transformers has them, but in the dtype they are given: theirs compute in float32."""
    if hidden_states.dtype != torch.float64:
        return OWN_NORMS[type(self)](self, hidden_states)
    eps = getattr(self, "variance_epsilon", None) or self.eps
    normed = hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + eps)
    return normed * (1 + self.weight if type(self).__name__ == "GemmaRMSNorm" else self.weight)
