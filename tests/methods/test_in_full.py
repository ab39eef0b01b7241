"""What trains parameters of the base itself: token rows, chosen modules, all of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, IDS, run

import veneer
from helpers import perturb, sums, tiny_bert, tiny_llama
from veneer.adapters.hooks import SiteHooks
from veneer.errors import AdapterError, AdapterFileError, ConfigError, TargetError
from veneer.methods import method_class, method_from_config
from veneer.tasks.sequence_classification import SequenceClassification

Full, Partial, Tokens = (method_class(name) for name in ("full", "partial", "tokens"))


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    logits = model(input_ids=IDS).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def differing(adapter: veneer.Adapter) -> set[str]:
    """Names of the parameters that the merged model has otherwise than the base."""
    merged = dict(adapter.merged().named_parameters())
    own = ((name, p) for name, p in adapter.base.model.named_parameters() if name in merged)
    return {name for name, p in own if not torch.equal(p, merged[name])}


# Full


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_full_fine_tuning(tied: bool) -> None:
    """Step by step, bit for bit, what a copy of the model comes to that is trained without us."""
    model = tiny_llama(tie_word_embeddings=tied)
    plain = copy.deepcopy(model)
    adapter = veneer.Base(model).attach(Full(), "a")
    adapter.base._execution.fast = None  # whose sums are in another order
    assert adapter.trainable == sum(p.numel() for p in plain.parameters())
    assert {key: p.shape for key, p in adapter.named_parameters()} == {k: p.shape for k, p in plain.named_parameters()}
    losses: list[list[float]] = []
    for trained in (adapter, plain):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=0.1)
        trained.train()
        losses.append([])
        for _ in range(4):
            loss = loss_of(trained)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss.detach()))
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.1
    theirs = dict(plain.named_parameters())
    assert all(torch.equal(p, theirs[key]) for key, p in adapter.named_parameters())
    merged = adapter.merged()
    assert all(torch.equal(p, theirs[key]) for key, p in merged.named_parameters())
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied


def test_no_module_is_hooked_for_it() -> None:
    base = veneer.Base(tiny_llama())
    base.attach(Full(), "a")
    kinds = [type(getattr(h, "__self__", None)) for m in base.model.modules() for h in m._forward_hooks.values()]
    assert SiteHooks not in kinds
    assert set(base._handles) == {""}


def test_the_base_is_itself_again_after_a_forward_that_fails() -> None:
    base = veneer.Base(tiny_llama())
    adapter = base.attach(Full(), "a")
    perturb(adapter)
    own = list(base.model.parameters())
    handle = base.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        adapter(input_ids=IDS)
    handle.remove()
    assert all(a is b for a, b in zip(own, base.model.parameters(), strict=True))


def test_in_bf16_it_is_rounded_once_and_again_when_it_changed() -> None:
    base = veneer.Base(tiny_llama().to(torch.bfloat16))
    adapter = base.attach(Full(), "a")
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    perturb(adapter, std=0.3)
    whole = base._execution.whole
    assert whole is not None
    with torch.no_grad():
        first = adapter(input_ids=IDS).logits
        kept = {name: rounded for name, (_, _, rounded) in whole._rounded.items()}
        assert torch.equal(adapter(input_ids=IDS).logits, first)
        assert all(whole._rounded[name][2] is rounded for name, rounded in kept.items())
        assert len(kept) == len(list(adapter.parameters()))
        merged = adapter.merged()
        assert torch.equal(merged(input_ids=IDS).logits, first)
        perturb(adapter, std=0.3, seed=5)
        assert not torch.equal(adapter(input_ids=IDS).logits, first)
    assert not torch.equal(adapter(input_ids=IDS).logits.detach(), first)
    assert not whole._rounded  # training needs the memory


def test_beside_other_adapters_and_a_head_of_its_own(tmp_path: Path) -> None:
    base = veneer.Base(tiny_bert())
    head = {"classifier": {name: p.detach().clone() for name, p in base.model.classifier.named_parameters()}}
    base.attach(veneer.LoRA(rank=2), "lora")
    adapter = base.attach(Full(), "a", modules=head)
    names = {key for key, _ in adapter.named_parameters()}
    assert "base_model.model.classifier.weight" in names
    assert not any(name.startswith("classifier") or "lora" in name for name in names)
    perturb(adapter)
    adapter.train()
    adapter(input_ids=IDS).logits.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    adapter.eval().save(tmp_path / "a")
    again = base.load(tmp_path / "a", "again")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, adapter(input_ids=IDS).logits)
        assert torch.equal(adapter.merged()(input_ids=IDS).logits, adapter(input_ids=IDS).logits)
        assert not torch.equal(base.model(input_ids=IDS).logits, adapter(input_ids=IDS).logits)


def test_it_has_nothing_to_set() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting of full\. It has none"):
        Full(rank=3)


def test_a_quantised_base_is_refused() -> None:
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"not for a quantised base: .*up_proj.weight is torch.int8"):
        veneer.Base(model).attach(Full(), "a")


def test_it_is_no_lora() -> None:
    adapter = veneer.Base(tiny_llama()).attach(Full(), "a")
    from veneer.adapters.convert import converted

    with pytest.raises(AdapterError, match="full acts at the whole model"):
        converted(adapter, veneer.LoRA, "b")


# Partial


def test_the_last_layer_with_all_that_is_in_it() -> None:
    base = veneer.Base(tiny_llama(attention_bias=True))
    adapter = base.attach(Partial(), "a")
    expected = {name for name, _ in tiny_llama(attention_bias=True).named_parameters() if "layers.1." in name}
    perturb(adapter)
    assert differing(adapter) == expected
    assert adapter.trainable == sum(p.numel() for n, p in base.model.named_parameters() if n in expected)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"targets": "embed_tokens", "layers": None}, {"model.embed_tokens.weight"}),
        (
            {"targets": ["q", "input_layernorm"], "layers": ":1"},
            {"q_proj.weight", "q_proj.bias", "input_layernorm.weight"},
        ),
        ({"targets": "/norm/", "layers": None, "exclude": "/layers/"}, {"model.norm.weight"}),
    ],
)
def test_chosen_modules(settings: dict[str, object], expected: set[str]) -> None:
    adapter = veneer.Base(tiny_llama(attention_bias=True)).attach(Partial(**settings), "a")
    perturb(adapter)
    assert {next((e for e in expected if name.endswith(e)), name) for name in differing(adapter)} == expected


def test_a_tied_embedding_is_trained_for_the_input_alone() -> None:
    adapter = veneer.Base(tiny_llama(tie_word_embeddings=True)).attach(
        Partial(targets="embed_tokens", layers=None), "a"
    )
    perturb(adapter)
    merged = adapter.merged()
    assert torch.equal(merged.lm_head.weight, adapter.base.model.lm_head.weight)
    assert not torch.equal(merged.model.embed_tokens.weight, merged.lm_head.weight)
    assert merged.config.tie_word_embeddings is False


def test_nothing_left_says_so() -> None:
    for settings, message in (
        ({"layers": "7:"}, r"layers='7:' picks none of this base's 2 layers, 0 to 1\.$"),
        ({"layers": "-1:", "exclude": "everything"}, r"left of targets='everything' without exclude='everything' in"),
        ({"targets": "evrything"}, "Did you mean 'everything'"),
    ):
        with pytest.raises(TargetError, match=message):
            veneer.Base(tiny_llama()).attach(Partial(**settings), "a")


# Tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_only_these_rows_move_wherever_the_table_is_used(family: str, tmp_path: Path) -> None:
    base = veneer.Base(FAMILIES[family].model(torch.float32).requires_grad_(False))
    adapter = base.attach(Tokens(tokens=(6, 9)), "a")
    perturb(adapter, std=0.5)
    merged = adapter.merged()
    into, out = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    own = base.model.get_input_embeddings().weight
    rows = (into != own).any(1).nonzero().flatten().tolist()
    assert rows == [6, 9]
    assert (into is out) == (base.model.get_output_embeddings().weight is own) == (family != "llama")
    merged.save_pretrained(tmp_path / "merged")
    again = type(merged).from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(run(again, FAMILIES[family].inputs), run(merged, FAMILIES[family].inputs))
        adapted = run(adapter, FAMILIES[family].inputs)
        assert torch.allclose(run(merged, FAMILIES[family].inputs), adapted, atol=1e-5)
        assert not torch.allclose(run(base.model, FAMILIES[family].inputs), adapted, atol=1e-3)


def test_tokens_by_their_text(tiny_folder: Path, tmp_path: Path) -> None:
    base = veneer.load_base(str(tiny_folder))
    tokenizer = base.tokenizer
    adapter = base.attach(Tokens(tokens=("<|im_start|>", " the", 7)), "a")
    ids = tokenizer.convert_tokens_to_ids("<|im_start|>"), tokenizer(" the")["input_ids"][0], 7
    assert adapter.method == Tokens(tokens=ids)
    perturb(adapter)
    adapter.save(tmp_path / "a")
    assert base.load(tmp_path / "a", "again").method == Tokens(tokens=ids)
    with pytest.raises(TargetError, match=r"'<call>' is no token of this base: .*'<', 'call', '>'.*resize_token_emb"):
        base.attach(Tokens(tokens=("<call>",)), "b")
    mixed = base.attach(method_class("mix")(methods=[{"name": "tokens", "tokens": [" the"]}, "norm"]), "mixed")
    assert mixed.method.methods[0] == Tokens(tokens=ids[1:2])


def test_a_base_enlarged_for_tokens_of_ones_own(tiny_folder: Path, tmp_path: Path) -> None:
    """As the docstring tells."""
    base = veneer.load_base(str(tiny_folder), dtype=torch.float32)
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    base.model.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
    base.model.save_pretrained(tmp_path / "with-calls")
    base.tokenizer.save_pretrained(tmp_path / "with-calls")
    larger = veneer.load_base(str(tmp_path / "with-calls"), dtype=torch.float32)
    adapter = larger.attach(Tokens(tokens=("<call>",)), "a")
    (before,) = (value.detach().clone() for value in adapter.parameters())
    rows = [{"prompt": "<call> " + str(row["prompt"]), "completion": row["completion"]} for row in sums(8)]
    veneer.train(adapter, rows, validation=0, epochs=1, batch_size=2, samples=0, learning_rate=1e-2)
    (after,) = adapter.parameters()
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((128,), "has 128 token embeddings, and none for token 128"),
        ((-1,), "none for token -1"),
        ((3, 3), "token 3 more than once"),
        (("a",), "the base has no tokenizer; give its id"),
    ],
)
def test_tokens_that_are_not_there(tokens: tuple[int | str, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        veneer.Base(tiny_llama()).attach(Tokens(tokens=tokens), "a")


def test_no_tokens_at_all() -> None:
    with pytest.raises(ConfigError, match=r"method\.tokens"):
        Tokens()
    with pytest.raises(AdapterFileError, match="names no tokens"):
        Tokens.from_peft({"token_indices": []})
    with pytest.raises(TargetError, match="does not read token ids"):
        veneer.Base(FAMILIES["vit"].model()).attach(Tokens(tokens=(1,)), "a")


def test_pefts_config() -> None:
    import peft

    assert veneer.from_peft(peft.TrainableTokensConfig(token_indices=[3, 5])) == Tokens(tokens=(3, 5))


@pytest.mark.parametrize("inside", [False, True])
def test_tokens_that_no_row_has_are_told_before_training(
    inside: bool, folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"say {n}", "completion": "<file_sep> it"} for n in range(6)]
    method: dict[str, object] = {"name": "tokens", "tokens": ["<repo_name>", "<file_sep>"]}
    base = veneer.load_base(tiny_folder, dtype="float32")
    adapter = base.attach(method_class("mix")(methods=[method, "norm"]) if inside else method_from_config(method))
    veneer.train(adapter, rows, validation=0, max_steps=1, samples=0)
    told = " ".join(capsys.readouterr().err.split())
    assert (
        f"warning: training: '<repo_name>' (token {base.tokenizer.convert_tokens_to_ids('<repo_name>')}) occurs in"
        in told
    )
    assert "file_sep>' (token" not in told


def test_all_of_a_base_is_all_of_it_whatever_head_it_gets(minilm: veneer.Base) -> None:
    """Five labels make a larger head than the base's own two."""
    task = SequenceClassification(labels=("a", "b", "c", "d", "e"))
    adapter = minilm.attach(method_class("full")(), "a", modules=task.head(minilm, seed=0), task=task.describe())
    assert adapter.trainable > minilm.parameter_count
    assert adapter.trainable_share == 1
