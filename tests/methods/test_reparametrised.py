"""Networks that make prompts while these are trained: as peft's, gone in the end, and as large as stated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from families import FAMILIES, run
from test_contract import EXACT, off
from test_counts import count

import veneer
from helpers import perturb, sums
from veneer.errors import ConfigError
from veneer.methods import Method, method_class

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
OURS: dict[str, Method] = {
    "prefix": method_class("prefix")(length=3, mlp=True, mlp_width=5),
    "mlp": method_class("ptuning")(length=3, encoder="mlp", width=7),
    "lstm": method_class("ptuning")(length=3, encoder="lstm", width=5, layers=3),
}
THEIRS: dict[str, Any] = {
    "prefix": lambda **more: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5, **more
    ),
    "mlp": lambda **more: peft.PromptEncoderConfig(
        num_virtual_tokens=3, encoder_hidden_size=7, encoder_reparameterization_type="MLP", **more
    ),
    "lstm": lambda **more: peft.PromptEncoderConfig(
        num_virtual_tokens=3,
        encoder_hidden_size=5,
        encoder_num_layers=3,
        encoder_reparameterization_type="LSTM",
        **more,
    ),
}
CELLS = [(name, on) for name in OURS for on in TASKS]


def ours_on(name: str, on: str) -> veneer.Adapter:
    """Ours as peft would have it, perturbed; with the classifier peft can't load without."""
    model, method = FAMILIES[on].model().requires_grad_(False), OURS[name]
    if name == "prefix" and on in ("t5", "bart"):
        method = method.model_copy(update={"where": "peft"})
    head = {"classifier": dict(model.classifier.named_parameters())} if on == "bert" else {}
    task = {"peft_task_type": TASKS[on]}
    adapter = veneer.Base(model).attach(method, "a", modules=head, task=task).double()
    perturb(adapter, std=0.5)
    return adapter


def theirs_on(name: str, on: str) -> Any:
    # Of an encoder-decoder's virtual tokens peft uses the first half only; the second would run through the LSTM, too.
    one = {"num_transformer_submodules": 1} if name != "prefix" and on in ("t5", "bart") else {}
    return peft.get_peft_model(FAMILIES[on].model(), THEIRS[name](task_type=TASKS[on], **one)).double().eval()


def output(model: Any, name: str, on: str) -> torch.Tensor:
    """Without the logits that peft keeps of virtual tokens in a decoder's input."""
    got = run(model, FAMILIES[on].inputs)
    return got[:, -7:] if got.dim() == 3 and on in ("llama", "gpt2") else got


@pytest.mark.parametrize(("name", "on"), CELLS)
def test_outputs_and_gradients_are_pefts(name: str, on: str) -> None:
    ours, theirs = ours_on(name, on), theirs_on(name, on)
    encoder = theirs.prompt_encoder["default"]
    state = ours.state_dict()
    with torch.no_grad():
        for key, parameter in encoder.named_parameters():
            parameter.copy_(state[f"prompt_encoder.{key}"])
        plain = run(ours.base.model, FAMILIES[on].inputs)
    if on == "bert":
        head = {key.rpartition(".")[2]: value for key, value in state.items() if "classifier" in key}
        theirs.base_model.classifier.modules_to_save["default"].load_state_dict(head)
    outputs = []
    for model in (ours, theirs):
        outputs.append(output(model, name, on))
        outputs[-1].square().mean().backward()
    got, expected = (each.detach() for each in outputs)
    assert off(expected, plain) > 1e-3
    assert off(got, expected) < EXACT
    grads = {key: p.grad for key, p in ours.named_parameters() if "classifier" not in key}
    assert set(grads) == {f"prompt_encoder.{key}" for key, _ in encoder.named_parameters()}
    for key, parameter in encoder.named_parameters():
        assert off(grads[f"prompt_encoder.{key}"], parameter.grad) < EXACT, key


@pytest.mark.parametrize(("name", "on"), CELLS)
def test_what_is_kept_does_the_same_here_and_in_peft(name: str, on: str, tmp_path: Path) -> None:
    ours = ours_on(name, on)
    with torch.no_grad():
        trained = run(ours, FAMILIES[on].inputs)
    before = ours.trainable
    ours.settle()
    assert ours.trainable < before
    with torch.no_grad():
        assert off(run(ours, FAMILIES[on].inputs), trained) < EXACT
    ours.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(FAMILIES[on].model(), tmp_path / "ours").double().eval()
    again = veneer.Base(FAMILIES[on].model()).load(tmp_path / "ours").double()
    assert again.method == ours.method
    with torch.no_grad():
        kept = run(ours.float().double(), FAMILIES[on].inputs)  # files are read as float32
        assert off(output(theirs, name, on), kept) < EXACT
        assert torch.equal(run(again, FAMILIES[on].inputs), kept)


@pytest.mark.parametrize(("name", "on"), CELLS)
def test_what_peft_keeps_does_the_same_here(name: str, on: str, tmp_path: Path) -> None:
    theirs = theirs_on(name, on)
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        expected = output(theirs, name, on)
    theirs.save_pretrained(tmp_path)
    ours = veneer.Base(FAMILIES[on].model().requires_grad_(False)).load(tmp_path).double()
    assert not getattr(ours.method, "mlp", False)
    assert getattr(ours.method, "encoder", None) is None
    with torch.no_grad():
        assert off(run(ours, FAMILIES[on].inputs), expected) < 1e-6  # files are read as float32
        assert off(run(ours.base.model, FAMILIES[on].inputs), expected) > 1e-3


@pytest.mark.parametrize("name", OURS)
def test_with_its_network_it_is_not_called_pefts(name: str, tmp_path: Path) -> None:
    """A run's checkpoint, or an adapter saved before it is settled: goes on here, and peft refuses it."""
    ours = ours_on(name, "llama")
    ours.save(tmp_path)
    again = ours.base.load(tmp_path, "again").double()
    assert again.method == ours.method
    with torch.no_grad():
        kept = run(ours.float().double(), FAMILIES["llama"].inputs)
        assert torch.equal(run(again, FAMILIES["llama"].inputs), kept)
    with pytest.raises((KeyError, ValueError), match="VENEER_"):
        peft.PeftModel.from_pretrained(FAMILIES["llama"].model(), tmp_path)


def test_slots_outlive_the_network_and_a_missing_tokenizer(tmp_path: Path) -> None:
    base = veneer.load_base("minilm-l6")
    adapter = base.attach(method_class("ptuning")(length=4, slots=(3,), marker="[MASK]"), "a")
    batch = dict(base.tokenizer(["The [MASK] film"], return_tensors="pt"))
    with torch.no_grad():
        trained = adapter(**batch).last_hidden_state
        adapter.settle()
        assert off(adapter(**batch).last_hidden_state, trained) < 1e-6
    adapter.save(tmp_path)
    base.tokenizer = None
    loaded = base.load(tmp_path, "b")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).last_hidden_state, adapter(**batch).last_hidden_state)
    assert "VENEER_PTUNING" in (tmp_path / "adapter_config.json").read_text()


def test_trained_and_kept_counts() -> None:
    d, heads, layers, m = 768, 12, 12, 512
    assert heads * 64 == d
    bert = (T.BertModel, T.BertConfig())
    prefix = {"length": 20, "mlp": True}
    assert count(*bert, "prefix", **prefix) == 20 * d + (d + 1) * m + (m + 1) * 2 * layers * d
    assert count(*bert, "prefix", length=20) == 2 * layers * 20 * d
    w = d // 2
    lstm = 20 * d + 8 * w * (d + w + 2) + 8 * w * (3 * w + 2) + 2 * w * (2 * w + 1) + d * (2 * w + 1)
    assert count(*bert, "ptuning", length=20) == lstm
    w = 100
    mlp = 20 * d + w * (d + 1) + w * (w + 1) + d * (w + 1)
    assert count(*bert, "ptuning", length=20, encoder="mlp", width=w) == mlp
    assert count(*bert, "ptuning", length=20, encoder=None) == 20 * d


def test_the_random_state_is_left_alone_and_seeds_tell_starts_apart() -> None:
    base = veneer.Base(FAMILIES["llama"].model())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    for name, method in OURS.items():
        one, two, other = (base.attach(method, f"{name}{n}", seed=n // 2) for n in range(3))
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
        assert not all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_configs_of_pefts() -> None:
    for name, method in OURS.items():
        assert veneer.from_peft(THEIRS[name]()) == method
    with pytest.raises(ConfigError, match="encoder_hidden_size is left out"):
        veneer.from_peft(peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True))
    with pytest.raises(ConfigError, match="encoder_hidden_size is left out"):
        veneer.from_peft(peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_reparameterization_type="LSTM"))
    with pytest.raises(ConfigError, match="encoder_dropout"):
        veneer.from_peft(peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_dropout=0.1))
    with pytest.raises(ConfigError, match="mlp_width"):
        method_class("prefix")(mlp_width=0)


@pytest.mark.parametrize(("name", "size"), [("boft", 6), ("oft", 7)])
def test_blocks_smaller_than_asked_for_are_told(
    name: str, size: int, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = veneer.load_base(tiny_folder, dtype="float32")
    adapter = base.attach(method_class("mix")(methods=[{"name": name, "block_size": size, "targets": ["q", "down"]}]))
    veneer.train(adapter, sums(6), validation=0, max_steps=1, samples=0)
    told = " ".join(capsys.readouterr().err.split())
    assert f"note: {name}: block_size {size} does not fit inputs of width 32, so 2 of 4 maps have blocks of 4." in told
    fitting = base.attach(method_class(name)(block_size=8), "fits")
    assert not fitting.method.remarks(fitting.sites)
