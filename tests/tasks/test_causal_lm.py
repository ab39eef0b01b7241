from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import veneer
from helpers import sums, write_jsonl
from veneer.data import read
from veneer.errors import DataError
from veneer.kernels import native
from veneer.kernels.native import tiles
from veneer.tasks import output_head
from veneer.tasks.causal_lm import IGNORED, CausalLM

CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "No."},
    ]
}


def learned(example: dict[str, list[int]], tokenizer: object) -> str:
    return tokenizer.decode([token for token in example["labels"] if token != IGNORED])  # type: ignore[attr-defined]


def test_only_answers_and_their_end_are_learned(smollm: veneer.Base) -> None:
    tokenizer = smollm.tokenizer
    (example,) = CausalLM().encode(CHAT, tokenizer)
    assert learned(example, tokenizer) == "Yes.<|im_end|>No.<|im_end|>"
    assert tokenizer.decode(example["input_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\nYes."
        "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>"
    )
    (example,) = CausalLM().encode({"prompt": "One?", "completion": "Yes."}, tokenizer)
    assert learned(example, tokenizer) == "Yes.<|im_end|>"


def test_the_end_token_is_learned_though_it_is_also_padding(smollm: veneer.Base) -> None:
    tokenizer, task = smollm.tokenizer, CausalLM()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = [example for row in sums(4) for example in task.encode(row, tokenizer)]
    batch = task.collate(examples, tokenizer)
    for row, example in zip(batch["labels"], examples, strict=True):
        assert row[len(example["input_ids"]) - 1] == tokenizer.eos_token_id
        assert (row[len(example["input_ids"]) :] == IGNORED).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(example["input_ids"]) for example in examples]


def test_the_end_token_is_added_where_the_template_has_none(
    smollm: veneer.Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = smollm.tokenizer
    (example,) = CausalLM(template="plain").encode({"prompt": "One?", "completion": " Yes."}, tokenizer)
    assert learned(example, tokenizer) == " Yes.<|im_end|>"
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}",
    )
    (example,) = CausalLM().encode({"prompt": "One?", "completion": "Yes."}, tokenizer)
    assert learned(example, tokenizer) == "Yes.<|im_end|>"


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_prompt_has_the_same_tokens_in_training_and_generation(smollm: veneer.Base, template: str) -> None:
    task = CausalLM(template=template)
    rows = [*sums(10), *([CHAT] if template == "chat" else [])]
    for row in rows:
        (example,) = task.encode(row, smollm.tokenizer)
        prompt = task.prompt_tokens(row, smollm.tokenizer)
        assert example["input_ids"][: len(prompt)] == prompt
        assert example["labels"][len(prompt)] != IGNORED


def test_a_conversation_that_ends_with_the_user_is_answered_from_there(smollm: veneer.Base) -> None:
    row = {"messages": CHAT["messages"][:4]}
    prompt = CausalLM().prompt_tokens(row, smollm.tokenizer)
    assert smollm.tokenizer.decode(prompt).endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    (example,) = CausalLM().encode(row, smollm.tokenizer)
    assert learned(example, smollm.tokenizer) == "Yes.<|im_end|>"
    assert not CausalLM().has_answer(row)
    assert CausalLM().has_answer(CHAT)


def test_long_text_is_cut_into_pieces_and_nothing_is_lost(smollm: veneer.Base) -> None:
    text = " ".join(str(n) for n in range(200))
    pieces = CausalLM(max_length=64).encode({"text": text}, smollm.tokenizer)
    assert max(len(piece["input_ids"]) for piece in pieces) == 64
    everything = [token for piece in pieces for token in piece["input_ids"]]
    assert smollm.tokenizer.decode(everything) == text + "<|im_end|>"


def test_the_end_of_a_text_is_learned_wherever_it_is_cut(smollm: veneer.Base) -> None:
    """Even where the end token would stand alone, with nothing before it to predict it from."""
    end = smollm.tokenizer.eos_token_id
    text = "one two three four five six seven"
    whole = CausalLM().encode({"text": text}, smollm.tokenizer)[0]["input_ids"]
    for length in range(2, len(whole) + 1):
        pieces = CausalLM(max_length=length).encode({"text": text}, smollm.tokenizer)
        assert pieces[-1]["labels"][-1] == end
        assert all(2 <= len(piece["labels"]) <= length for piece in pieces)


def test_lengths_are_told_before_anything_is_cut(smollm: veneer.Base) -> None:
    rows = [*sums(3), {"prompt": "word " * 100, "completion": "x"}, {"prompt": "x", "completion": "word " * 100}]
    tokens = CausalLM(max_length=60).prepare(read(rows), smollm.tokenizer).tokens
    assert tokens.truncated.tolist() == [4]
    assert tokens.dropped.tolist() == [3]
    assert tokens.given[3] > 100 > tokens.learned[3] == 2
    assert tokens.learned[4] > 100 > tokens.given[4]
    assert tokens.given[0] + tokens.learned[0] == len(CausalLM().encode(rows[0], smollm.tokenizer)[0]["input_ids"])


def test_what_another_version_left_in_the_cache_is_not_used(
    smollm: veneer.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read(write_jsonl(tmp_path / "rows.jsonl", sums(3)))
    now = CausalLM().prepare(rows, smollm.tokenizer).examples
    again = CausalLM().prepare(rows, smollm.tokenizer).examples
    assert now._fingerprint == again._fingerprint
    monkeypatch.setattr("veneer.tasks.base._ENCODING", "another")
    assert CausalLM().prepare(rows, smollm.tokenizer).examples._fingerprint != now._fingerprint


def test_truncation_is_counted(smollm: veneer.Base) -> None:
    rows = [*sums(3), {"prompt": "word " * 100, "completion": "x"}, {"prompt": "x", "completion": "word " * 100}]
    prepared = CausalLM(max_length=60).prepare(read(rows), smollm.tokenizer)
    assert (len(prepared.examples), prepared.truncated, prepared.dropped, prepared.longest) == (4, 1, 1, 60)
    with pytest.raises(DataError, match="None of the 1 rows"):
        CausalLM(max_length=10).prepare(read(rows[3:4]), smollm.tokenizer)


@pytest.mark.parametrize("plain", [False, True])
def test_loss_at_labelled_tokens_equals_the_models_own(plain: bool, smollm: veneer.Base) -> None:
    task, model = CausalLM(), smollm.model
    examples = [example for row in sums(5) for example in task.encode(row, smollm.tokenizer)]
    batch = task.collate(examples, smollm.tokenizer)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad(), native.plain() if plain else contextlib.nullcontext():
        outcome = task.outcome(model, batch)
        logits = model(**given).logits
        if tiles.there():  # which do not round logits to bfloat16
            logits = model.model(**given).last_hidden_state.float() @ model.lm_head.weight.float().T
    expected = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(outcome.loss / outcome.items, expected, rtol=1e-3, atol=0)
    assert outcome.items == task.items(batch)
    assert model(**given).logits.shape[:2] == batch["input_ids"].shape  # the head is whole again


def test_a_known_projection_is_not_run_while_the_loss_is_computed(smollm: veneer.Base) -> None:
    task, head = CausalLM(), smollm.model.get_output_embeddings()
    batch = task.collate([each for row in sums(2) for each in task.encode(row, smollm.tokenizer)], smollm.tokenizer)
    adapter = smollm.attach(veneer.LoRA(rank=2), "known")
    output_head._last.pop(head, None)
    losses, given = [], []
    with head.register_forward_hook(lambda module, args, output: given.append(output)):
        for _ in range(2):
            losses.append(float(task.outcome(adapter.train(), batch).loss.detach()))
    smollm.detach("known")
    assert losses[0] == losses[1]
    assert [bool(each.any()) for each in given] == [True, False]
    assert all(each.shape == (1, 49152) and each.requires_grad for each in given)  # DDP looks from there
    assert "forward" not in vars(head)


def test_a_forward_somebody_gave_the_projection_is_left_there(smollm: veneer.Base) -> None:
    task, head = CausalLM(), smollm.model.get_output_embeddings()
    batch = task.collate([each for row in sums(2) for each in task.encode(row, smollm.tokenizer)], smollm.tokenizer)
    own = head.__dict__["forward"] = type(head).forward.__get__(head)
    try:
        with torch.no_grad():
            for _ in range(2):
                task.outcome(smollm.model, batch)
        assert vars(head)["forward"] is own
    finally:
        del head.__dict__["forward"]


def test_generation_is_the_same_alone_and_in_a_batch() -> None:
    """In float32: in bf16 near ties fall either way with the padding, in any framework."""
    smollm = veneer.load_base("smollm2-135m-instruct", dtype="float32")
    rows = [{"prompt": f"What is the capital of {country}?"} for country in ("France", "Italy", "the United Kingdom")]
    task = CausalLM(max_new_tokens=12)
    together = [answer["output"] for answer in task.predict(smollm.model, smollm, rows)]
    assert "Paris" in together[0]
    assert "London" in together[2]
    alone = [next(iter(task.predict(smollm.model, smollm, [row])))["output"] for row in rows]
    assert alone == together


def test_json_match_compares_values() -> None:
    rows = [{"prompt": "?", "completion": '{"a": 1, "b": [true]}'}] * 3
    given = [{"output": '{"b":[true],"a":1}'}, {"output": '{"a": 1}'}, {"output": "no"}]
    assert CausalLM().score(rows, given) == {"exact_match": [0, 0, 0], "json_match": [1, 0, 0]}
    strict = CausalLM().score([{"prompt": "?", "completion": '{"a": true}'}], [{"output": '{"a": 1}'}])
    assert strict["json_match"] == [0]
    assert CausalLM().score([{"prompt": "?", "completion": "null"}], [{"output": "null"}])["json_match"] == [1]
    assert "json_match" not in CausalLM().score([{"prompt": "?", "completion": "plain"}], [{"output": "plain"}])


def test_a_template_that_rewrites_the_past_is_refused(smollm: veneer.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm.tokenizer, "chat_template", "{{ messages | length }}{{ messages[-1].content }}")
    with pytest.raises(DataError, match="changes earlier turns"):
        CausalLM().encode(CHAT, smollm.tokenizer)
    monkeypatch.setattr(smollm.tokenizer, "chat_template", "{{ raise_exception('no system turn') }}")
    with pytest.raises(DataError, match="refuses this conversation: no system turn"):
        CausalLM().encode(CHAT, smollm.tokenizer)
