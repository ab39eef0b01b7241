"""A config of peft's becomes the method that computes the same, or an error that names what would differ."""

from __future__ import annotations

import sys
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, run
from test_contract import EXACT, off

import veneer
from helpers import perturb
from veneer.errors import ConfigError, UnknownName
from veneer.methods import method_class

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft's

CONFIGS = {
    "targets left to peft": peft.LoraConfig(r=3, lora_alpha=7),
    "names, rsLoRA": peft.LoraConfig(r=3, target_modules=["down_proj", "k_proj"], use_rslora=True),
    "an expression": peft.LoraConfig(r=3, target_modules=r".*layers\.1\..*(up|o)_proj"),
    "exclusions, layers": peft.LoraConfig(
        r=3, target_modules=["q_proj", "up_proj"], exclude_modules=["q_proj"], layers_to_transform=[1]
    ),
    "ia3": peft.IA3Config(task_type="CAUSAL_LM"),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(oft_block_size=8, use_cayley_neumann=False, target_modules=["q_proj"]),
    "shira": peft.ShiraConfig(r=2, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_it_trains_the_same_numbers_as_peft(case: str) -> None:
    family = FAMILIES["llama"]
    adapter = veneer.Base(family.model()).attach(veneer.from_peft(CONFIGS[case]))
    theirs = peft.get_peft_model(family.model(), CONFIGS[case])
    ours = {name for name, p in adapter.named_parameters()}
    assert ours == {name.replace(".default", "") for name, p in theirs.named_parameters() if p.requires_grad}


def test_it_computes_the_same_as_peft() -> None:
    family, config = FAMILIES["llama"], CONFIGS["names, rsLoRA"]
    adapter = veneer.Base(family.model()).attach(veneer.from_peft(config)).double()
    perturb(adapter, std=0.2)
    theirs = peft.get_peft_model(family.model(), config).double().eval()
    state = adapter.state_dict()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[name.replace(".default", "")])
        assert off(run(adapter, family.inputs), run(adapter.base.model, family.inputs)) > 1e-3
        assert off(run(adapter, family.inputs), run(theirs, family.inputs)) < EXACT


def test_mappings_and_prompts() -> None:
    assert veneer.from_peft({"peft_type": "lora", "r": 4}) == veneer.LoRA(rank=4, alpha=8, targets=("q", "v"))
    written = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]).to_dict()
    assert veneer.from_peft(written) == veneer.LoRA(rank=4, alpha=8, targets=("q_proj",))
    drawn = peft.PromptTuningConfig(num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    assert veneer.from_peft(drawn) == method_class("prompt")(length=4, init="vocabulary")
    assert dict(veneer.from_peft({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}))["init"] == "random"
    assert veneer.from_peft(peft.PrefixTuningConfig(num_virtual_tokens=4)) == method_class("prefix")(length=4)
    ranks = peft.LoraConfig(rank_pattern={"q_proj": 2}, lora_bias=True, target_parameters=["experts.down_proj"])
    assert veneer.from_peft(ranks).rank_pattern == {r"/(^|\.)(q_proj)$/": 2}
    assert veneer.from_peft(peft.LoraConfig(use_dora=True)).name == "dora"
    cut = veneer.from_peft(peft.AdaLoraConfig(total_step=100, tinit=10, tfinal=30, deltaT=5, target_modules=["q_proj"]))
    assert (cut.name, cut.warmup, cut.final, cut.every) == ("adalora", 0.1, 0.3, 5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: peft.LoraConfig(use_dora=True, bias="all", init_lora_weights="pissa", modules_to_save=["score"]),
            ConfigError,
            "does not do: bias, modules_to_save .a task's head .*, init_lora_weights",
        ),
        (lambda: peft.LoraConfig(layers_to_transform=[0, 2]), ConfigError, "layers are a slice"),
        (lambda: peft.OFTConfig(), ConfigError, "use_cayley_neumann.*veneer methods oft"),
        (
            lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
            ConfigError,
            "target_modules .this method picks its sites itself",
        ),
        (lambda: peft.PrefixTuningConfig(), ConfigError, "length"),
        (lambda: peft.FourierFTConfig(), UnknownName, "no method for peft's FOURIERFT"),
        (lambda: peft.AdaLoraConfig(total_step=9, beta1=0.5), ConfigError, "beta1"),
        (lambda: {"peft_type": "LOORA"}, UnknownName, "LOORA'. Did you mean 'LORA'"),
        (lambda: {"peft_type": "LORA", "rnk": 3, "lora_alhpa": 3}, ConfigError, "no rnk.*lora_alhpa. Did you mean 'lora_alpha'"),
        (lambda: {"r": 3}, ConfigError, "no peft_type"),
        (lambda: 3, ConfigError, "int is no config of peft's"),
        (lambda: peft.LoraConfig, ConfigError, "no config of peft's"),
    ],
)  # fmt: skip
def test_what_would_differ_is_refused_by_name(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        veneer.from_peft(make())


def test_a_mapping_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        veneer.from_peft({"peft_type": "LORA"})
