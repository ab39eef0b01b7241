"""Training from Python: it learns, its arithmetic is exact, others' trainers work on an adapter."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers

import veneer
from helpers import sums, tiny_bert, tiny_llama
from veneer.errors import ConfigError
from veneer.methods import Course, method_class
from veneer.training.forecast import largest_pass
from veneer.training.passes import parts
from veneer.training.settings import TrainSettings

IDS = torch.arange(40).view(8, 5) + 3


OTHER = [{"prompt": "Name a stone.", "completion": "Quartz, or obsidian 1 it is."}]
"""What gets worse while sums are learned."""


def tiny(folder: Path) -> veneer.Adapter:
    return veneer.load_base(folder, dtype="float32").attach(veneer.LoRA(rank=4), "t")


def state(adapter: veneer.Adapter) -> torch.Tensor:
    return torch.cat([value.flatten() for value in adapter.state_dict().values()])


def test_it_learns(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = tiny(tiny_folder)
    result = veneer.train(
        adapter, sums(40), validation=sums(10), epochs=6, learning_rate=1e-2, output=tmp_path / "run", samples=0
    )
    assert result.before is not None
    assert result.after is not None
    assert result.after["loss"] < result.before["loss"] - 1
    assert result.steps == 30
    assert result.trainable == adapter.trainable
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in steps] == [1, 10, 20, 30]
    assert {"learning_rate", "tokens_per_second", "peak_memory"} <= set(steps[0])
    assert log[0]["step"] == 0
    assert "eval_perplexity" in log[0]
    assert not adapter.training


def test_a_penalty_is_told_apart_from_the_loss(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(Course):
        def penalty(self) -> torch.Tensor:
            return torch.tensor(100.0, requires_grad=True)

    monkeypatch.setattr(veneer.LoRA, "course", lambda *_: Fixed())
    more = {"batch_size": 4, "accumulation": 2, "log_every": 2, "samples": 0}
    veneer.train(tiny(tiny_folder), sums(32), validation=0, output=tmp_path / "run", **more)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    assert len(steps) > 3
    assert all(entry["penalty"] == pytest.approx(100, rel=1e-5) and entry["loss"] < 20 for entry in steps)


@pytest.mark.parametrize("name", ["prompt", "prefix", "ia3", "houlsby", "bitfit", "shira", "oft", "lokr"])
def test_every_method_trains(name: str, tiny_folder: Path) -> None:
    base = veneer.load_base(tiny_folder, dtype="float32")
    adapter = base.attach(method_class(name)(), "t")
    result = veneer.train(adapter, sums(24), validation=sums(8), epochs=4, learning_rate=1e-2)
    assert result.before is not None
    assert result.after is not None
    assert result.after["loss"] < result.before["loss"] - 0.05


def test_batches_and_accumulation_are_the_same_step(tiny_folder: Path) -> None:
    """8 × 1 equals 1 × 8 on rows of uneven length: losses are averaged over tokens."""
    states = []
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        adapter = tiny(tiny_folder)
        before = state(adapter)
        veneer.train(
            adapter, sums(24), validation=0, batch_size=batch, accumulation=accumulation, epochs=1, learning_rate=5e-3
        )
        states.append(state(adapter))
        assert (states[-1] - before).abs().max() > 1e-3
    assert (states[0] - states[1]).abs().max() < 1e-5
    assert (states[0] - states[2]).abs().max() < 1e-5


def test_the_best_weights_are_kept(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = tiny(tiny_folder)
    options = {"epochs": 8, "learning_rate": 0.02, "schedule": "constant", "samples": 0}
    result = veneer.train(adapter, sums(16), validation=OTHER, output=tmp_path / "run", **options)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry and entry["step"]}
    assert result.best_step == min(losses, key=losses.get)  # type: ignore[arg-type]
    assert result.best_step != max(losses)  # else this shows nothing
    again = veneer.train(adapter, sums(8), validation=OTHER, max_steps=1, learning_rate=1e-12, samples=0)
    assert again.before is not None
    assert again.before["loss"] == pytest.approx(losses[result.best_step], rel=1e-5)


def test_validation_is_averaged_over_tokens(tiny_folder: Path) -> None:
    losses = [
        veneer.train(tiny(tiny_folder), sums(8), validation=sums(9), batch_size=size, max_steps=1, samples=0).before
        for size in (1, 4)
    ]
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-5)


def test_classification_from_python(minilm: veneer.Base) -> None:
    rows = [{"text": text, "label": label} for text, label in (("I love it", "good"), ("I hate it", "bad")) * 12]
    adapter = minilm.attach(veneer.LoRA(rank=4))
    result = veneer.train(adapter, rows, validation=rows[:2], epochs=4, learning_rate=2e-3)
    assert result.after is not None
    assert result.after["accuracy"] == 1
    assert adapter.task["labels"] == ["bad", "good"]
    assert next(iter(veneer.predict(adapter, [{"text": "I love it"}])))["label"] == "good"


def test_checkpointing_gives_the_same_weights(tiny_folder: Path) -> None:
    states = []
    for on in (False, True):
        adapter = tiny(tiny_folder)
        veneer.train(adapter, sums(16), validation=0, epochs=1, checkpointing=on)
        states.append(state(adapter))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-6)


def test_batches_computed_in_parts_give_the_same_weights(tiny_folder: Path) -> None:
    states, most = [], []
    for tokens in (0, 150, 1):
        adapter = tiny(tiny_folder)
        seen: list[int] = []
        adapter.base.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(kwargs["input_ids"])), with_kwargs=True
        )
        result = veneer.train(adapter, sums(16), validation=0, epochs=1, pass_tokens=tokens)
        states.append(state(adapter))
        most.append((result.steps, max(seen)))
    assert most[0] == (2, 8)
    assert most[1][0] == 2
    assert 1 < most[1][1] < 8
    assert most[2] == (2, 1)
    for other in states[1:]:
        torch.testing.assert_close(states[0], other, rtol=0, atol=1e-6)


def test_parts_hold_every_row_once() -> None:
    batch = {"attention_mask": torch.ones(7, 10), "input_ids": torch.arange(70).view(7, 10), "task": list("abcdefg")}
    for tokens, sizes in ((0, [7]), (70, [7]), (69, [3, 4]), (50, [3, 4]), (20, [1, 2, 2, 2]), (1, [1] * 7)):
        found = parts(batch, tokens)
        assert [len(part["task"]) for part in found] == sizes
        assert torch.equal(torch.cat([part["input_ids"] for part in found]), batch["input_ids"])
        assert [task for part in found for task in part["task"]] == batch["task"]


def test_parts_cost_least() -> None:
    lengths = [200, 190, 150, 40, 40, 40, 30, 2]
    mask = (torch.arange(200) < torch.tensor(lengths)[:, None]).long()
    for tokens, sizes in ((1600, [3, 5]), (600, [3, 5]), (400, [2, 1, 5]), (250, [1, 1, 1, 5]), (150, [1, 1, 1, 3, 2])):
        assert [len(part["attention_mask"]) for part in parts({"attention_mask": mask}, tokens)] == sizes
    for tokens in (1600, 400, 250):
        found = [part["attention_mask"].sum(1) for part in parts({"attention_mask": mask}, tokens)]
        cost = sum(len(part) * int(part.max()) + 150 for part in found)
        assert cost == min(
            sum(150 + (last - first) * lengths[first] for first, last in itertools.pairwise((0, *cuts, 8)))
            for number in range(8)
            for cuts in itertools.combinations(range(1, 8), number)
            if all((b - a) * lengths[a] <= tokens for a, b in itertools.pairwise((0, *cuts, 8)))
        )


def test_a_run_is_forecast_by_the_largest_part_there_could_be() -> None:
    lengths = [600, 200, 200, 200, 200, 200, 30]
    learned = [length // 2 for length in lengths]
    for tokens, expected in ((1024, (5, 200)), (400, (1, 600)), (0, (7, 600))):
        batch = largest_pass(lengths, learned, TrainSettings(pass_tokens=tokens), torch.device("cpu"))
        assert (batch.rows, batch.tokens) == expected
    assert batch.labelled == sum(learned) / (7 * 600)


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [([256], 4, 1024), ([20] * 9 + [400], 8, 580), ([45], 8, 512), ([5000], 1, 1024), ([], 8, 512)],
)
def test_passes_are_as_large_as_batches_usually_are(lengths: list[int], size: int, expected: int) -> None:
    """Within bounds; and on processors only, unless something else is asked for."""
    here = torch.device("cpu")
    assert TrainSettings(batch_size=size).tokens_of_a_pass(here, lengths) == expected
    assert TrainSettings(batch_size=size).tokens_of_a_pass(torch.device("cuda"), lengths) == 0
    assert TrainSettings(batch_size=size, pass_tokens=100).tokens_of_a_pass(here, lengths) == 100
    assert TrainSettings(batch_size=size, pass_tokens=0).tokens_of_a_pass(here, lengths) == 0


def test_parts_are_without_padding_they_do_not_need() -> None:
    lengths = [3, 9, 1, 10, 2]
    mask = (torch.arange(10) < torch.tensor(lengths)[:, None]).long()
    batch = {"attention_mask": mask, "input_ids": torch.arange(50).view(5, 10) * mask, "vector": torch.ones(5, 10)}
    found = parts({**batch, "task": list("abcde")}, 20, ("attention_mask", "input_ids"))
    assert [part["task"] for part in found] == [["d", "b"], ["a", "e", "c"]]
    assert [tuple(part["input_ids"].shape) for part in found] == [(2, 10), (3, 3)]
    assert sum(int(part["input_ids"].sum()) for part in found) == int(batch["input_ids"].sum())
    assert all(part["vector"].shape == (len(part["task"]), 10) for part in found)  # not by token


def test_rows_of_uneven_length_in_parts_give_the_same_weights(tiny_folder: Path) -> None:
    rows = [{"prompt": "say " + "more " * (7 * number % 11), "completion": "yes"} for number in range(16)]
    states = []
    padding = []
    widths: list[set[int]] = []
    for tokens in (0, 100):
        adapter = tiny(tiny_folder)
        seen: list[torch.Size] = []
        adapter.base.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        settings = {"validation": 0, "epochs": 1, "group_by_length": False, "pass_tokens": tokens}
        result = veneer.train(adapter, rows, **settings)  # type: ignore[arg-type]
        assert result.padding == pytest.approx(1 - result.tokens / sum(shape.numel() for shape in seen))
        states.append(state(adapter))
        widths.append({shape[1] for shape in seen})
        padding.append(result.padding)
    assert len(widths[1]) > len(widths[0])
    assert 0 < padding[1] < padding[0]
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-6)


def test_training_leaves_the_base_as_it_was(tiny_folder: Path) -> None:
    base = veneer.load_base(tiny_folder, dtype="float32")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    settings = base.model.config.to_dict()
    adapter = base.attach(veneer.LoRA(rank=4), "t")
    veneer.train(adapter, sums(16), validation=sums(4), epochs=1)
    base.detach("t")
    assert base.model.config.to_dict() == settings
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, labels: torch.Tensor) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": IDS[index], "labels": self.labels[index]}


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_a_plain_transformers_trainer_trains_saves_and_resumes(make: object, tmp_path: Path) -> None:
    model = make()  # type: ignore[operator]
    labels = IDS if hasattr(model, "lm_head") else torch.arange(8) % 3
    finals = []
    for steps in ((4,), (2, 4)):
        base = veneer.Base(make())  # type: ignore[operator]
        adapter = base.attach(veneer.LoRA(rank=2))
        out = tmp_path / f"{len(steps)}"
        for upto in steps:
            arguments = transformers.TrainingArguments(
                output_dir=str(out),
                max_steps=upto,
                save_steps=2,
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                learning_rate=1e-2,
                lr_scheduler_type="constant",
                per_device_train_batch_size=4,
                dataloader_pin_memory=False,
            )
            trainer = transformers.Trainer(adapter, arguments, train_dataset=Rows(labels), eval_dataset=Rows(labels))
            before = trainer.evaluate()["eval_loss"]
            trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if upto > steps[0] else None)
        assert trainer.evaluate()["eval_loss"] < before
        finals.append(state(adapter))
    assert torch.equal(finals[0], finals[1])


def test_ddp_takes_an_adapter(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        adapter = veneer.Base(tiny_llama()).attach(veneer.LoRA(rank=2))
        wrapped = torch.nn.parallel.DistributedDataParallel(adapter)
        wrapped(input_ids=IDS, labels=IDS).loss.backward()
        grads = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
        adapter.zero_grad()
        adapter(input_ids=IDS, labels=IDS).loss.backward()
        assert all(torch.equal(grad, p.grad) for grad, p in zip(grads, adapter.parameters(), strict=True))
    finally:
        torch.distributed.destroy_process_group()


def test_wrong_settings_are_told_together(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"epochs: .*greater than 0.*learning_rte: unknown key. Did you mean"):
        veneer.train(tiny(tiny_folder), sums(4), epochs=0, learning_rte=1)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        veneer.train(veneer.Base(tiny_llama()).attach(veneer.LoRA()), sums(4), validation=0)


def test_b_learns_at_its_own_rate(tiny_folder: Path) -> None:
    """LoRA+: after one step of Adam from zero, each number has moved by its learning rate."""
    adapter = veneer.load_base(tiny_folder, dtype="float32").attach(veneer.LoRA(rank=2, b_rate=8), "a")
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    veneer.train(adapter, sums(8), validation=0, epochs=1, batch_size=8, learning_rate=1e-3, warmup=0)
    moved = {name: float((value - before[name]).abs().max()) for name, value in adapter.state_dict().items()}
    assert max(value for name, value in moved.items() if "lora_B" in name) == pytest.approx(8e-3, rel=0.05)
    assert max(value for name, value in moved.items() if "lora_A" in name) <= 1.05e-3
