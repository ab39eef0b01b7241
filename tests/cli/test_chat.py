"""``veneer chat``, driven as a person would, through stdin."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run

import veneer
from helpers import perturb
from veneer.errors import DataError
from veneer.evaluation.conversation import Conversation, _Streamer
from veneer.methods import method_class
from veneer.tasks.causal_lm import CausalLM

Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    def talk(said: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        code = run("chat", *arguments, "--max-new-tokens", 4)
        return code, *capsys.readouterr()

    return talk


@pytest.fixture
def adapters(tiny_folder: Path, folder: Path) -> list[Path]:
    """Two adapters over the tiny base, of different kinds, that say different things."""
    base = veneer.load_base(tiny_folder)
    for name, method in (("one", "lora"), ("two", "ia3")):
        adapter = base.attach(method_class(method)(), name, task=CausalLM(max_new_tokens=4).describe())
        perturb(adapter, std=1.0, seed=len(name) + len(method))
        adapter.save(folder / name)
    return [folder / "one", folder / "two"]


def test_a_conversation(adapters: list[Path], talk: Talk, tiny_folder: Path) -> None:
    code, out, err = talk(
        "Hello?\n\n/adapter two\nHello?\n/adapter none\nHello?\n/quit\nnever asked\n",
        adapters[0],
        "--adapter",
        adapters[1],
    )
    assert code == 0
    answers = out.splitlines()
    assert len(answers) == 3
    assert len(set(answers)) == 3  # each by another
    assert "adapters: one, two" in err
    assert err.index("answering: one") < err.index("answering: two") < err.index("answering: none")
    base = veneer.load_base(tiny_folder)
    asked = [{"messages": [{"role": "user", "content": "Hello?"}]}]
    adapter = base.load(adapters[0])
    assert answers[0] == next(veneer.predict(adapter, asked, max_new_tokens=4))["output"]


def test_history_goes_on_and_is_forgotten(tiny_folder: Path, talk: Talk) -> None:
    first, second, again = talk("Hello?\nHello?\n/reset\nHello?\n", tiny_folder)[1].splitlines()
    assert first == again
    assert first != second


def test_comparing(adapters: list[Path], talk: Talk) -> None:
    _, out, err = talk(
        "/compare\nHello?\n/compare\n/compare Name a stone.\n", adapters[0], "--adapter", f"second={adapters[1]}"
    )
    assert "no question to compare answers to yet" in err
    assert out.count("plain base") == 2
    assert out.splitlines()[1].split() == ["plain", "base", "one", "second"]


def test_a_question_is_compared_by_itself(tiny_folder: Path) -> None:
    conversation = Conversation(veneer.load_base(tiny_folder), max_new_tokens=4)
    first = conversation.ask(None, "Hello?", lambda _: None)
    second = conversation.ask(None, "Hello?", lambda _: None)
    assert first.text != second.text
    assert conversation.compare()[None].text == first.text  # not as the second time it was asked
    assert conversation.compare("Hello?")[None].text == first.text
    assert len(conversation.turns) == 4


def test_mistakes_are_told_and_the_conversation_goes_on(tiny_folder: Path, talk: Talk) -> None:
    code, out, err = talk("/adaptr x\n/adapter nobody\n/help\nHello?\n", tiny_folder)
    assert code == 0
    assert "There is no /adaptr. Did you mean '/adapter'?" in err
    assert "No adapter 'nobody' here" in err
    assert "/compare" in err
    assert len(out.splitlines()) == 1
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "No base called 'nowhere'"),
        (["{base}", "--adapter", "x=nowhere"], "nowhere is no adapter folder"),
        (["{one}", "--adapter", "{one}"], "'one' is attached already"),
        (["{base}", "--adapter", "none={one}"], "'none' is what the plain base is called"),
        (["{base}", "--adapter", "a b={one}"], "no adapter name"),
        (["{base}", "--base-model", "x"], "is no adapter folder"),
        (["minilm-l6"], "is an encoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_talked_with(
    adapters: list[Path], tiny_folder: Path, talk: Talk, arguments: list[str], message: str
) -> None:
    code, out, err = talk("Hello?\n", *(text.format(base=tiny_folder, one=adapters[0]) for text in arguments))
    assert code == 2
    assert message in err
    assert out == ""


def test_a_classifier_does_not_talk(minilm: veneer.Base, folder: Path, talk: Talk) -> None:
    from veneer.tasks.sequence_classification import SequenceClassification

    task = SequenceClassification(labels=("a", "b"))
    adapter = minilm.attach(veneer.LoRA(rank=2), "c", modules=task.head(minilm, seed=0), task=task.describe())
    perturb(adapter)
    adapter.save(folder / "c")
    code, _, err = talk("Hello?\n", folder / "c")
    assert code == 2
    assert "generates no text" in err


def test_ctrl_c(tiny_folder: Path, talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """During an answer it stops the answer; at the prompt it leaves."""
    put = _Streamer.put
    pressed = []

    def press(self: _Streamer, value: torch.Tensor) -> None:
        put(self, value)
        if not pressed and not self.next_tokens_are_prompt:
            pressed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(_Streamer, "put", press)
    code, out, err = talk("Hello?\nHello?\n", tiny_folder)
    assert code == 0
    assert "(stopped)" in err
    assert len(out.splitlines()) == 2

    class Pressed(io.StringIO):
        def __iter__(self) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Pressed())
    assert run("chat", tiny_folder) == 0


def test_a_base_is_plain_after_an_answer_was_stopped(smollm: veneer.Base) -> None:
    adapter = smollm.attach(veneer.LoRA(rank=2), "a", task=CausalLM().describe())
    perturb(adapter)
    ids = torch.arange(5)[None] + 50
    with torch.no_grad():
        plain = smollm.model(ids).logits

    def press(_: str) -> None:
        raise KeyboardInterrupt

    conversation = Conversation(smollm, max_new_tokens=8)
    assert conversation.ask("a", "Hello?", press).ending == "stopped"
    with torch.no_grad():
        assert torch.equal(smollm.model(ids).logits, plain)


def test_the_oldest_turns_make_room(tiny_folder: Path) -> None:
    conversation = Conversation(veneer.load_base(tiny_folder), max_new_tokens=4)  # 64 tokens of context
    replies = [conversation.ask(None, "Hello? " * 3, lambda _: None) for _ in range(4)]
    assert replies[0].left_out == 0
    assert replies[-1].left_out >= 2
    assert len(conversation.turns) == 8
    with pytest.raises(DataError, match="reads at most 64"):
        conversation.ask(None, "Hello? " * 100, lambda _: None)
    assert len(conversation.turns) == 8


def test_a_base_without_a_template(tiny_folder: Path, talk: Talk, folder: Path) -> None:
    base = veneer.load_base(tiny_folder)
    base.model.save_pretrained(folder / "plain")
    base.tokenizer.chat_template = None
    base.tokenizer.save_pretrained(folder / "plain")
    _, out, err = talk("Hello?\nHello?\n", folder / "plain")
    assert "no chat template" in err
    first, second = out.splitlines()
    assert first == second  # nothing is remembered
