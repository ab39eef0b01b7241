"""Against peft, with its weights: equal outputs and gradients in float64; folders exchanged both ways."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from contracts import CONTRACTS, method
from families import FAMILIES, IDS, Family, run
from test_contract import EXACT, off

import veneer
from helpers import perturb
from veneer.errors import AdapterFileError, TargetError
from veneer.methods import method_class

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

ON = ("llama", "gpt2", "bert", "t5", "vit", "whisper")
TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}
# IA3 as peft maps it where peft has no mapping of its own.
IA3 = {
    "vit": (["k_proj", "v_proj", "mlp.fc2"], ["mlp.fc2"]),
    "whisper": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
}


class PlainBlockDiagonal:
    """What peft's CUDA extension does, in PyTorch: without it peft has no more than one butterfly factor."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.stack([torch.block_diag(*each) for each in blocks]),)

    @staticmethod
    def backward(grad: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor]:
        count, size = blocks.shape[1:3]
        tiles = grad.view(len(grad), count, size, count, size)
        return (torch.stack([tiles[:, n, :, n] for n in range(count)], 1),)


@pytest.fixture(autouse=True)
def butterflies_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: PlainBlockDiagonal)


def theirs_for(name: str, family: Family, targets: Any) -> peft.PeftConfig:
    """The configuration of peft that does what ours does."""
    task = TASKS.get(family.name)
    settings = CONTRACTS[name].settings
    if name == "lora":
        return peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type=task)
    if name == "ia3":
        return peft.IA3Config(target_modules=targets[0], feedforward_modules=targets[1], task_type=task)
    if name == "shira":
        return peft.ShiraConfig(r=settings["rank"], target_modules=targets, task_type=task)
    if name == "oft":
        return peft.OFTConfig(oft_block_size=8, r=0, use_cayley_neumann=False, target_modules=targets, task_type=task)
    if name == "boft":
        sizes = {"boft_block_size": settings["block_size"], "boft_n_butterfly_factor": settings["factors"]}
        return peft.BOFTConfig(**sizes, target_modules=targets, task_type=task)
    if name == "lokr":
        return peft.LoKrConfig(r=2, alpha=3, target_modules=targets, task_type=task)
    if name == "dora":
        return peft.LoraConfig(r=3, lora_alpha=7, use_dora=True, target_modules=targets, task_type=task)
    if name == "adalora":
        return peft.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=7, total_step=10, tinit=1, tfinal=1, target_modules=targets, task_type=task
        )
    if name == "loha":
        return peft.LoHaConfig(r=2, alpha=3, target_modules=targets, task_type=task)
    if name == "hira":
        return peft.HiraConfig(r=3, target_modules=targets, task_type=task)
    if name == "vera":
        return peft.VeraConfig(r=3, target_modules=targets, task_type=task)
    if name == "vblora":
        bank = {"num_vectors": settings["num_vectors"], "vector_length": settings["vector_length"]}
        return peft.VBLoRAConfig(r=2, topk=settings["topk"], **bank, target_modules=targets, task_type=task)
    if name == "unilora":
        return peft.UniLoraConfig(r=2, theta_d_length=settings["bank_size"], target_modules=targets, task_type=task)
    if name == "tokens":
        return peft.TrainableTokensConfig(token_indices=settings["tokens"], task_type=task)
    if name == "norm":
        return peft.LNTuningConfig(target_modules=targets, task_type=task)
    if name == "prefix":
        return peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=task)
    return peft.PromptTuningConfig(num_virtual_tokens=3, task_type=task)


def ours_on(name: str, family: Family) -> veneer.Adapter:
    model = family.model().requires_grad_(False)
    # peft saves a classifier beside prompts, and won't load without one.
    head = (
        {"classifier": dict(model.classifier.named_parameters())} if name in PROMPTS and family.name == "bert" else {}
    )
    chosen = method(name)
    if name == "prefix" and family.name in ("t5", "bart"):
        chosen = chosen.model_copy(update={"where": "peft"})
    if name == "unilora":
        chosen = chosen.model_copy(update={"identity": False})
    adapter = veneer.Base(model).attach(chosen, "a", modules=head).double()
    perturb(adapter, std=0.2)
    return adapter


def gradients(model: torch.nn.Module, family: Family, skip: int = 0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output without its first positions (peft keeps the logits of virtual tokens), and gradients of its mean square."""
    model.zero_grad()
    output = run(model, family.inputs)
    output = output[:, skip:] if output.dim() == 3 else output
    output.square().mean().backward()
    return output.detach(), {
        key.replace(".default", ""): p.grad for key, p in model.named_parameters() if p.grad is not None
    }


PROMPTS = ("prefix", "prompt")
LINEAR_ONLY = ("boft", "loha", "lokr", "oft", "shira")  # in peft; GPT-2's maps are Conv1D
CELLS = [
    (name, family)
    for name in ("adalora", "dora", "hira", "ia3", "lora", "norm", "unilora", "vblora", "vera", *LINEAR_ONLY)
    for family in ON
    if (name, family) not in [(linear, "gpt2") for linear in LINEAR_ONLY]
]
CELLS += [("tokens", family) for family in ("llama", "gpt2", "bert", "t5")]
CELLS += [(name, family) for name in ("prefix", "prompt") for family in ("llama", "gpt2", "bert", "t5", "bart")]


@pytest.mark.parametrize(("name", "on"), CELLS)
def test_we_write_and_peft_computes_the_same(name: str, on: str, tmp_path: Path) -> None:
    family = FAMILIES[on]
    ours = ours_on(name, family)
    prompting = name in PROMPTS
    ours.task = {"peft_task_type": TASKS.get(on)} if prompting or on == "llama" else {}
    ours.save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(family.model(), tmp_path / "ours", is_trainable=not prompting)
    theirs = theirs.double().eval()
    if prompting:  # peft loads these for inference only
        theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    with torch.no_grad():
        plain = run(ours.base.model, family.inputs)
    skip = 3 if name == "prompt" and on not in ("t5", "bart") else 0  # there they are in the encoder's input
    expected, their_grads = gradients(theirs, family, skip)
    got, grads = gradients(ours, family)
    assert off(expected, plain) > 1e-3
    assert off(got, expected) < EXACT
    for in_memory, in_files in (
        ("prompt_encoder.embedding.weight", "prompt_embeddings"),
        ("lora_magnitude_vector.weight", "lora_magnitude_vector"),
    ):
        their_grads = {key.replace(in_memory, in_files): grad for key, grad in their_grads.items()}
    # What all maps share peft lists under the first of them.
    shared = re.compile(r"base_model\..*\.(vblora_vector_bank|unilora_theta_d)")
    their_grads = {shared.sub(r"base_model.\1", key): grad for key, grad in their_grads.items()}
    # What peft trains unasked: a classifier beside prompts; the number of AdaLoRA's ranks.
    unasked = ("classifier", "ranknum")
    their_grads = {key: grad for key, grad in their_grads.items() if not any(word in key for word in unasked)}
    assert set(their_grads) == {key for key in grads if "classifier" not in key}
    for key, grad in their_grads.items():
        assert off(grads[key].view_as(grad), grad) < EXACT, key


@pytest.mark.parametrize(("name", "on"), CELLS)
def test_peft_writes_and_we_compute_the_same(name: str, on: str, tmp_path: Path) -> None:
    family = FAMILIES[on]
    ours = ours_on(name, family)
    targets: Any = None
    if name == "ia3":
        sites = [site for site in ours.sites if site.role == "down"]
        targets = (ours.base.sites.shortest_names(ours.sites), ours.base.sites.shortest_names(sites))
    elif hasattr(ours.method, "targets") or name == "norm":
        targets = ours.base.sites.shortest_names(ours.sites)
    theirs = peft.get_peft_model(family.model(), theirs_for(name, family, targets)).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad and "ranknum" not in key:
                moved = parameter + torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2
                parameter.copy_(moved.float())  # files are read as float32
        expected = run(theirs, family.inputs)
    theirs.save_pretrained(tmp_path / "theirs")
    again = veneer.Base(family.model().requires_grad_(False)).load(tmp_path / "theirs", "theirs").double()
    with torch.no_grad():
        plain, got = run(again.base.model, family.inputs), run(again, family.inputs)
    if name == "prompt" and expected.dim() == 3 and on not in ("t5", "bart"):
        expected = expected[:, 3:]
    assert off(expected, plain) > 1e-3
    assert off(got, expected) < EXACT


def test_an_approximate_rotation_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    config = peft.OFTConfig(oft_block_size=8, r=0, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(family.model(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="use_cayley_neumann"):
        veneer.Base(family.model()).load(tmp_path, "a")


def test_a_final_choice_of_vectors_goes_both_ways(tmp_path: Path) -> None:
    """peft's save_only_topk_weights."""
    family = FAMILIES["llama"]
    ours = ours_on("vblora", family)
    with torch.no_grad():
        for _, parameter in ours.named_parameters():
            parameter.copy_(parameter.float())  # files are read as float32
        trained, plain = run(ours, family.inputs), run(ours.base.model, family.inputs)
        ours.settle()
        assert ours.trainable == 6 * 8  # the bank
        settled = run(ours, family.inputs)
        assert off(settled, trained) < EXACT
        assert off(settled, plain) > 1e-3
    ours.float().save(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(family.model(), tmp_path / "ours").double().eval()
    with torch.no_grad():
        assert off(run(theirs, family.inputs), settled) < 1e-6  # peft has weights' logarithms, in float32
    theirs.save_pretrained(tmp_path / "theirs")
    again = veneer.Base(family.model()).load(tmp_path / "theirs", "again").double()
    assert again.method.final
    with torch.no_grad():
        assert off(run(again, family.inputs), settled) < 1e-6


def test_a_prefix_peft_would_misread_is_not_called_pefts(tmp_path: Path) -> None:
    base = veneer.Base(FAMILIES["t5"].model())
    base.attach(method("prefix"), "ours").save(tmp_path / "ours")
    with pytest.raises((KeyError, ValueError), match="VENEER_PREFIX"):
        peft.PeftModel.from_pretrained(FAMILIES["t5"].model(), tmp_path / "ours")
    assert base.load(tmp_path / "ours", "again").method == method("prefix")


def test_peft_places_need_an_encoder_decoder() -> None:
    with pytest.raises(TargetError, match="where: peft is for encoder-decoders"):
        veneer.Base(FAMILIES["llama"].model()).attach(method_class("prefix")(where="peft"), "a")


@pytest.mark.parametrize(("name", "on"), [("prefix", "llama"), ("prefix", "t5"), ("prompt", "gpt2"), ("prompt", "t5")])
def test_prompts_act_in_peft_without_a_task_of_ours(name: str, on: str, tmp_path: Path) -> None:
    family = FAMILIES[on]
    ours = ours_on(name, family)
    ours.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(family.model(), tmp_path)
    with torch.no_grad():
        assert off(run(theirs.base_model, family.inputs), run(theirs, family.inputs)[:, -IDS.shape[1] :][:, :7]) > 1e-3


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_what_peft_would_load_in_part_is_not_called_pefts(name: str, tmp_path: Path) -> None:
    base = veneer.Base(FAMILIES["xlnet"].model())
    base.attach(method(name), "ours").save(tmp_path / "ours")
    with pytest.raises((KeyError, ValueError), match="VENEER_"):
        peft.PeftModel.from_pretrained(FAMILIES["xlnet"].model(), tmp_path / "ours")


def test_peft_files_with_modules_of_their_own(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    for number, settings in enumerate(
        (
            {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
            {"target_modules": ["q_proj", "embed_tokens"]},
        )
    ):
        theirs = peft.get_peft_model(family.model(), peft.LoraConfig(**settings)).double().eval()
        with torch.no_grad():
            for key, parameter in theirs.named_parameters():
                if parameter.requires_grad or "lora_" in key:
                    parameter.copy_((parameter + torch.randn_like(parameter) * 0.1).float())
            expected = run(theirs, family.inputs)
        theirs.save_pretrained(tmp_path / str(number))
        ours = veneer.Base(family.model().requires_grad_(False)).load(tmp_path / str(number)).double()
        with torch.no_grad():
            assert off(run(ours, family.inputs), expected) < EXACT
            assert off(run(ours.base.model, family.inputs), expected) > 1e-3


def test_a_convolution_has_the_rank_of_its_patches() -> None:
    base = veneer.Base(FAMILIES["vit"].model())
    assert base.attach(veneer.LoRA(targets="projection", rank=32), "a").trainable == 32 * (3 * 8 * 8 + 32)
    with pytest.raises(TargetError, match="which is 32"):
        base.attach(veneer.LoRA(targets="projection", rank=33), "b")


def test_rotations_need_a_block() -> None:
    base = veneer.Base(FAMILIES["llama"].model())
    adapter = base.attach(method_class("oft")(block_size=7), "a")  # of 32 and 48: 4 and 6
    assert adapter.parameters_at("model.layers.0.mlp.down_proj")["oft_R.weight"].shape == (8, 15)
    with pytest.raises(TargetError, match="divides 3,"):
        veneer.Base(torch.nn.ModuleDict({"m": torch.nn.Linear(3, 4)})).attach(method_class("oft")(block_size=2), "a")
