"""Naming conventions of the architecture families: what the end of a module's path says of its role.

The one place that knows how models name their parts. Longer endings win; what is not listed is still a site, without
a role.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Mapping
from dataclasses import dataclass

ATTENTION, MLP = "attention", "mlp"

_ENDINGS: Mapping[str, Mapping[str, str]] = {
    ATTENTION: {
        # Llama, Mistral, Qwen, Gemma, Phi, OPT, BART, CLIP, Whisper, wav2vec 2, ViT; BERT, RoBERTa, ELECTRA, ALBERT,
        # YOLOS; DistilBERT; DeBERTa-v2; T5; XLNet
        "q": "q_proj query q_lin query_proj SelfAttention.q EncDecAttention.q rel_attn.q",
        "k": "k_proj key k_lin key_proj SelfAttention.k EncDecAttention.k rel_attn.k",
        "v": "v_proj value v_lin value_proj SelfAttention.v EncDecAttention.v rel_attn.v",
        # fused: Phi-3; GPT-NeoX; GPT-2
        "qkv": "qkv_proj query_key_value c_attn",
        "o": "o_proj out_proj out_lin attention.output.dense attention.dense self_attn.dense attn.c_proj "
        "SelfAttention.o EncDecAttention.o rel_attn.o",
    },
    MLP: {
        "gate": "gate_proj wi_0",
        "gate_up": "gate_up_proj",
        "up": "up_proj fc1 mlp.c_fc dense_h_to_4h intermediate.dense intermediate_dense lin1 ffn DenseReluDense.wi "
        "wi_1 ff.layer_1",
        "down": "down_proj fc2 mlp.c_proj dense_4h_to_h output.dense output_dense lin2 ffn_output DenseReluDense.wo "
        "ff.layer_2",
    },
}
_ROLES: Mapping[str, tuple[str, str]] = {
    ending: (role, group)
    for group, roles in _ENDINGS.items()
    for role, endings in roles.items()
    for ending in endings.split()
}
_BY_LENGTH = sorted(_ROLES, key=len, reverse=True)


@dataclass(frozen=True)
class Split:
    """A module run again for each group of rows whose adapters differ, because rows can't be mixed inside it.

    Attributes:
        inputs: axis of the rows in each of the module's arguments that has one, by name.
        output: axis of the rows in its outputs.
        attention: how keys and values can be added, if it is an attention: ``disentangled`` or ``relative``.
        shared: the child used once for all rows; the module is split only for adapters that act there. Empty: for all.
    """

    inputs: Mapping[str, int]
    output: int
    attention: str = ""
    shared: str = ""


_SPLITS = {
    # works on relative positions once for all rows
    "DisentangledSelfAttention": Split({"hidden_states": 0, "attention_mask": 0, "query_states": 0}, 0, "disentangled"),
    "DebertaV2Encoder": Split({"hidden_states": 0, "attention_mask": 0, "query_states": 0}, 0, shared="LayerNorm"),
    # keeps its maps as bare parameters, and positions before rows
    "XLNetRelativeAttention": Split(
        {"h": 1, "g": 1, "attn_mask_h": 2, "attn_mask_g": 2, "r": 1, "seg_mat": 2, "mems": 1, "target_mapping": 2},
        1,
        "relative",
    ),
}
_BARE = {"XLNetRelativeAttention": {"q": True, "k": True, "v": True, "o": False, "r": True}}


def positions_first(model: object) -> bool:
    """Whether the layers see ``[positions, rows, …]`` (XLNet's)."""
    return type(model).__name__.startswith("XLNet")


def is_never_called(path: str) -> bool:
    """Whether the module at ``path`` holds a table that others read, so that nothing can act there: T5's and BART's
    shared embedding, whose copies are called; DeBERTa's relative positions."""
    return path.rpartition(".")[2] in ("shared", "rel_embeddings")


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


def peft_task(class_name: str) -> str | None:
    """peft's word for the task that a class of transformers' models is for."""
    return next((task for ending, task in _TASKS.items() if class_name.endswith(ending)), None)


def split_of(module: object) -> Split | None:
    """How to split the rows of this attention module, if they can't be mixed inside it."""
    return _SPLITS.get(type(module).__name__)


def bare_maps(module: object) -> Mapping[str, bool]:
    """Parameters ``[in, heads, width]`` or ``[out, heads, width]`` that are linear maps: whether input comes first."""
    return _BARE.get(type(module).__name__, {})


def is_cross_attention(path: str) -> bool:
    """Whether a part of a decoder attends to the encoder."""
    return "EncDecAttention." in f"{path}." or "encoder_attn." in f"{path}."


def stack_of(path: str) -> str:
    """The encoder or decoder a module lies in, by path with a dot; empty outside both."""
    found = re.match(r"(?:.*?\.)??(?:encoder|decoder)\.", path)
    return found[0] if found else ""


def takes_prefixes(attention: object) -> bool:
    """Whether keys and values can be added to an attention module: it calls transformers' exchangeable attention
    functions, or is one of those that don't and are known (DeBERTa's, XLNet's)."""
    split = split_of(attention)
    through_interface = hasattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS")
    return through_interface or (split is not None and split.attention != "")


_POSITIONS = ("wpe", "position_embeddings", "position_embedding", "embed_positions")


def counts_positions(path: str, *, learned_with_offset: bool) -> bool:
    """Whether the embedding at ``path`` is of positions that follow a prefix.

    Those of a fixed grid (patches of an image, frames of Whisper's encoder) are all taken and cannot shift.
    """
    fixed = "vision_model." in path or (path.endswith("encoder.embed_positions") and not learned_with_offset)
    return path.rpartition(".")[2] in _POSITIONS and not fixed


def role_of(path: str) -> tuple[str | None, str | None]:
    """Role and group of the linear map at ``path``, or None and None."""
    dotted = "." + path
    return next((_ROLES[ending] for ending in _BY_LENGTH if dotted.endswith("." + ending)), (None, None))


def branch_output(path: str, modules: Container[str]) -> str:
    """The module whose output is the whole branch that ends with the map at ``path``: its dropout, or the map."""
    parent = path.rpartition(".")[0]
    above = parent.rpartition(".")[0]
    if parent.endswith(("SelfAttention", "EncDecAttention", "DenseReluDense")):
        return f"{above}.dropout"  # T5; the dropout inside the block acts between its two maps
    if path.endswith(("attention.output.dense", "output.dense", "ffn.lin2")):
        return f"{parent}.dropout"  # BERT and kin; DistilBERT, whose attention.dropout acts on the weights
    for name in ("resid_dropout", "output_dropout"):  # GPT-2; ALBERT, wav2vec 2
        if f"{parent}.{name}" in modules:
            return f"{parent}.{name}"
    if path.endswith("mlp.c_proj"):
        return f"{parent}.dropout"  # GPT-2
    return path
