"""The model card of an adapter: ``README.md`` in the hub's format, with what its record says was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter

CARD = "README.md"


def card(adapter: Adapter, versions: Mapping[str, Any]) -> str:
    """The card of an adapter, from its method, task and record."""
    record, task = adapter.record, adapter.task.get("name")
    result, config = record.get("result", {}), record.get("config", {})
    after = result.get("after") or {}
    header: dict[str, Any] = {"base_model": adapter.base.name, "library_name": "peft"}
    header["tags"] = [tag for tag in ("veneer", adapter.method.name, task) if tag]
    if named := _hub_data(config.get("data", {}), record.get("data", {})):
        header["datasets"] = named
    if after:
        header["metrics"] = list(after)
    parts = [
        "---\n" + yaml.safe_dump(header, sort_keys=False) + "---",
        f"# {adapter.method.name} adapter for {adapter.base.name}",
        f"Trained with veneer for {task or 'no stated task'}. The base is unchanged; both are needed to run it:",
        '```python\nimport veneer\n\nadapter = veneer.load_adapter("path/to/this/folder")\n```',
        _list("Method", _method(adapter)),
    ]
    if record.get("data"):
        parts.append(_list("Data", [f"{part}: {_data(part, about, config)}" for part, about in record["data"].items()]))
    if settings := config.get("train") or record.get("settings"):
        rate = settings.get("learning_rate") or adapter.method.learning_rate
        shown = {**settings, "learning_rate": rate}
        parts.append(_list("Settings", [f"{key}: {_said(value)}" for key, value in shown.items()]))
    if result:
        parts.append(_measured(result))
    if evaluation := record.get("evaluation"):
        parts.append(_evaluated(evaluation))
        parts += _forgotten(evaluation.get("forgetting"))
    if plan := record.get("plan"):
        parts.append(_list("Plan", [_planned(what, about) for what, about in plan.items()] + [_storage(adapter)]))
    parts.append(
        _list("Versions", [f"{name}: {value}" for name, value in {**versions, **record.get("versions", {})}.items()])
    )
    return "\n\n".join(parts) + "\n"


def _method(adapter: Adapter) -> list[str]:
    settings = ", ".join(f"{key} {_said(value)}" for key, value in adapter.method.model_dump(mode="json").items())
    trained = adapter.record.get("result", {}).get("trainable", adapter.trainable)
    of_base = f"{adapter.share(trained):.3%} of the base's {adapter.base.parameter_count:,}"
    kept = f"; {adapter.trainable:,} kept" if trained != adapter.trainable else ""
    return [
        f"{adapter.method.name}: {settings or 'no settings'}",
        f"{trained:,} numbers trained, {of_base}{kept}",
        f"{adapter.nbytes / 1e6:.1f} MB, beside a base of {adapter.base.nbytes / 1e6:,.1f} MB",
    ]


def _data(part: str, about: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    files = ", ".join(Path(name).name for name in about.get("files", {}))
    source = files or ("held out from the training data" if part == "validation" and config else "")
    return f"{about['rows']:,} rows" + (f" ({source})" if source else "") + f", sha256 `{about['sha256'][:16]}…`"


def _measured(result: Mapping[str, Any]) -> str:
    lines = ["## Measured", f"{result['steps']} steps, {result['tokens']:,} tokens."]
    before, after = result.get("before") or {}, result.get("after") or {}
    if after:
        rows = [f"| {name} | {_number(before.get(name))} | {_number(value)} |" for name, value in after.items()]
        lines.append("\n".join(["| validation | before | after |", "|---|---|---|", *rows]))
    for old in result.get("earlier", ()):
        if "after" in old:
            said = ", ".join(
                f"{name} {_number(old['before'][name])} → {_number(old['after'][name])}" for name in old["after"]
            )
            lines.append(f"On {old['rows']} held-out rows of {old['data']}, learned before: {said}.")
    return "\n\n".join([*lines, *(f"Note: {told}" for told in result.get("warnings", ()))])


def _evaluated(evaluation: Mapping[str, Any]) -> str:
    base, beside = evaluation.get("base") or {}, evaluation.get("compared_with") or ""
    rows = [f"| {name} | {_score(score)} | {_score(base.get(name))} |" for name, score in evaluation["adapter"].items()]
    rows += [
        f"| {each['task']}, {each['metric']} | {_score(each['adapter'])} | {_score(each['base'])} |"
        for each in evaluation.get("lm_eval", ())
    ]
    told = f"{evaluation['rows']:,} rows of {evaluation['data']}, 95 % intervals."
    return f"## Evaluation\n\n{told}\n\n" + "\n".join([f"| | adapter | {beside} |", "|---|---|---|", *rows])


_SHIPPED = ("general texts", "general prompts", "general questions")
"""What forgetting is measured on by itself; other data are the user's own."""


def _forgotten(found: Mapping[str, Any] | None) -> list[str]:
    """What an evaluation found to be forgotten; nothing where it was not measured."""
    if not found:
        return []
    title = "## Forgetting"
    if found.get("undefined"):
        return [f"{title}\n\nNot defined here: {found['undefined']}."]
    rows = [
        f"| {change['measure']} on {change['rows']} {change['data']} | {_number(change['base'])} | "
        f"{_number(change['adapter'])} | {_score(change['change'])} |"
        for change in found["changes"]
    ]
    own = list(dict.fromkeys(change["data"] for change in found["changes"] if change["data"] not in _SHIPPED))
    yours = f"; {', '.join(own)}: texts of your own, whatever it saw of them" if own else ""
    told = f"On what the adaptation never saw{yours}. With the adapter on; kl and loss in nats a token."
    table = "\n".join(["| | base | adapter | change |", "|---|---|---|---|", *rows])
    return [f"{title}\n\n{told}\n\n{table}"]


def _planned(what: str, about: Mapping[str, int]) -> str:
    parts = [f"{name} {value / 1e6:,.1f}" for name, value in about.items() if name not in ("rows", "tokens", "total")]
    rows = f"{about['rows']} rows of {about['tokens']:,} tokens" if about["rows"] > 1 else f"{about['tokens']:,} tokens"
    return f"{what}, {rows} at a time: {about['total'] / 1e6:,.1f} MB ({', '.join(parts)})"


def _storage(adapter: Adapter) -> str:
    base, own = adapter.base.nbytes / 1e6, adapter.nbytes / 1e6
    return f"a hundred such variants: {base + 100 * own:,.1f} MB, as whole copies {100 * base:,.1f} MB"


def _score(score: Mapping[str, Any] | None) -> str:
    if not score:
        return ""
    interval = f" ({_number(score['low'])} to {_number(score['high'])})" if score.get("low") is not None else ""
    return _number(score["value"]) + interval


def _hub_data(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """Sources that are names of data sets, not files of somebody's disk."""
    train = settings.get("train", [])
    parts = train if isinstance(train, list) else [train]
    sources = [str(part["path"] if isinstance(part, Mapping) else part) for part in parts]
    files = [Path(name) for name in facts.get("train", {}).get("files", {})]
    return [s for s in sources if not any(Path(s).expanduser() in (file, *file.parents) for file in files)]


def _list(title: str, lines: list[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines)


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
