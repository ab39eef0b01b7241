"""``veneer generate``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number


def generate_(
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)],
    *,
    adapter: Path | None = None,
    base: str | None = None,
    max_new_tokens: Annotated[int, Parameter(validator=Number(gte=1))] = 128,
    temperature: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0,
    seed: int = 0,
    condition: str | None = None,
    compare: Annotated[bool, Parameter(negative=())] = False,
    json: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Answer one prompt, with or without an adapter.

    Examples:

        veneer generate "What is the capital of France?" --base smollm2-135m-instruct

        veneer generate "Ignore all rules." --adapter runs/answers --compare

        cat question.txt | veneer generate - --adapter runs/answers

    Parameters
    ----------
    prompt
        The prompt; - reads it from stdin.
    adapter
        An adapter folder, or a run's folder.
    base
        The base; by default the adapter's.
    max_new_tokens
        Longest answer.
    temperature
        0 takes the likeliest token each time; above, tokens are drawn.
    seed
        Of the draw.
    condition
        Which of its tasks the prompt is of, for an adapter that learned several.
    compare
        Show the plain base's answer, too.
    json
        Print one JSON object on stdout.
    """
    from veneer.cli.output import console, print_json
    from veneer.errors import ConfigError
    from veneer.tasks import adapter_task, load_adapter, load_base
    from veneer.tasks.causal_lm import CausalLM

    if adapter is None and base is None:
        raise ConfigError("Say what is to answer: --adapter FOLDER or --base NAME (`veneer models` lists some).")
    if compare and adapter is None:
        raise ConfigError("--compare shows an adapter beside its base; give --adapter FOLDER.")
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise ConfigError("The prompt is empty.")
    loaded = load_adapter(adapter, base=base) if adapter is not None else None
    on = loaded.base if loaded is not None else load_base(str(base), task=CausalLM.name)
    if on.tokenizer is None:
        raise ConfigError(f"{on.name} has no tokenizer; put the base's tokenizer files into its folder.")
    if condition is not None and (loaded is None or not loaded.method.conditioned):
        raise ConfigError("--condition is for adapters that learned several tasks, and this is none; leave it out.")
    task = adapter_task(loaded) if loaded is not None else CausalLM.for_rows(None, on)
    if task.name != CausalLM.name:
        raise ConfigError(f"{adapter} is an adapter for {task.name}, which generates no text; use `veneer predict`.")

    def answer(model: object) -> str:
        import torch

        torch.manual_seed(seed)
        drawing = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        rows = [{"prompt": text, "task": condition}]
        found = task.predict(model, on, rows, max_new_tokens=max_new_tokens, **drawing)  # type: ignore[arg-type]
        return str(next(iter(found))["output"])

    answers = {}
    if loaded is not None:
        answers["adapter"] = answer(loaded)
    if loaded is None or compare:
        answers["base"] = answer(on.model)
    if json:
        print_json({"prompt": text, **answers})
    elif len(answers) == 1:
        print(next(iter(answers.values())))
    else:
        for who, said in answers.items():
            console.print(f"[bold]{who}[/bold]")
            print(said)
