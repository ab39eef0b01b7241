"""Spike: what a fused low-rank function and a label-only head are worth on SmolLM2-135M.

    python -m benchmarks.fused_spike [--rounds 5] [--json]

One step is a forward and a backward of 4 × 256 tokens, half of them labelled, LoRA r = 16 on all linear layers,
bf16 base. Variants run in turn within one process; medians of the rounds are compared. The findings stand in
docs/decisions/0002-shape-of-apply.md.

    plain         our `LowRank.apply` as it is, full logits
    plain+head    the same, logits at labelled tokens only (what training uses)
    fused         one autograd function per site: nothing saved twice, scale and add inside the products
    fused+linear  the function also takes over the frozen product's backward (x is detached for the module's call)
    siblings      q/k/v and gate/up share one product x·[A…]ᵀ, then `fused`
    siblings+linear  both
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import veneer
from veneer.adapters.execution import SiteHooks
from veneer.tasks.causal_lm import CausalLM

SIBLINGS = {"q": ("q", "k", "v"), "gate": ("gate", "up")}


class Fused(torch.autograd.Function):
    """``y + s (x Aᵀ) Bᵀ`` with fp32 masters A, B and products in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, b: Tensor, scale: float, weight: Tensor | None) -> Tensor:
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        inner = F.linear(x, a16).mul_(scale)
        ctx.save_for_backward(x, inner, a16, b16)
        ctx.scale, ctx.weight = scale, weight
        ctx.mark_dirty(y)
        flat = y.view(-1, y.shape[-1])
        flat.addmm_(inner.view(-1, inner.shape[-1]), b16.t())
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, inner, a16, b16 = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        xs, inners = x.reshape(-1, x.shape[-1]), inner.reshape(-1, inner.shape[-1])
        db = (g.t() @ inners).float()
        dinner = (g @ b16).mul_(ctx.scale)
        da = (dinner.t() @ xs).float()
        if ctx.weight is not None:
            dx = (g @ ctx.weight).addmm_(dinner, a16).view_as(x)
            return dx, None, da, db, None, None
        return (dinner @ a16).view_as(x), grad, da, db, None, None


class Down(torch.autograd.Function):
    """``x [A₁; A₂; …]ᵀ`` for siblings, one product each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *a: Tensor) -> Any:
        stacked = torch.cat([each.to(x.dtype) for each in a])
        ctx.save_for_backward(x, stacked)
        ctx.sizes = [len(each) for each in a]
        return tuple(part.contiguous() for part in F.linear(x, stacked).split(ctx.sizes, -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, stacked = ctx.saved_tensors
        g = torch.cat([grad.reshape(-1, grad.shape[-1]) for grad in grads], -1)
        da = (g.t() @ x.reshape(-1, x.shape[-1])).float().split(ctx.sizes)
        return ((g @ stacked).view_as(x), *da)


class Up(torch.autograd.Function):
    """``y + s h Bᵀ``; with ``weight``, the frozen product's backward too, x being detached for its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, y: Tensor, b: Tensor, scale: float, weight: Tensor | None) -> Tensor:
        b16 = b.to(y.dtype)
        ctx.save_for_backward(h, b16)
        ctx.scale, ctx.weight = scale, weight
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b16.t(), alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        h, b16 = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        db = (g.t() @ h.reshape(-1, h.shape[-1])).float().mul_(ctx.scale)
        dh = (g @ b16).mul_(ctx.scale).view_as(h)
        dx = (g @ ctx.weight).view(*grad.shape[:-1], -1) if ctx.weight is not None else None
        return dx, dh, None if ctx.weight is not None else grad, db, None, None


@contextlib.contextmanager
def patched(base: veneer.Base, *, linear: bool, siblings: bool) -> Any:
    """Let the site hooks run the fused functions instead of `LowRank.apply`."""
    sites = {site.path: site for site in base.sites}
    cache: dict[str, Any] = {}
    kept: dict[str, Tensor] = {}
    changed: list[tuple[dict[int, Any], int, Any]] = []

    def pre(self: SiteHooks, module: Any, args: Any) -> Any:
        self._own.append({})
        if self.path in self.execution.plan and linear:
            kept[self.path] = args[0]
            return (args[0].detach(),)
        return None

    def post(self: SiteHooks, module: Any, args: Any, y: Tensor) -> Any:
        self._own.pop()
        plan = self.execution.plan
        if (delta := plan.get(self.path)) is None:
            return None
        x = kept.pop(self.path) if linear else args[0]
        weight = module.weight if linear else None
        if not siblings:
            return Fused.apply(x, y, delta.A, delta.B, delta.scale, weight)
        role = sites[self.path].role
        if role in SIBLINGS:
            parent = self.path.rpartition(".")[0]
            names = [f"{parent}.{name}_proj" for name in SIBLINGS[role]]
            cache.clear()
            cache.update(zip(names, Down.apply(x, *[plan[name].A for name in names]), strict=True))
        h = cache[self.path] if self.path in cache else Down.apply(x, delta.A)[0]
        return Up.apply(x, h, y, delta.B, delta.scale, weight)

    for site in base.sites:
        module = base.model.get_submodule(site.path)
        for hooks, new in ((module._forward_pre_hooks, pre), (module._forward_hooks, post)):
            for key, hook in hooks.items():
                if isinstance(getattr(hook, "__self__", None), SiteHooks):
                    changed.append((hooks, key, hook))
                    hooks[key] = functools.partial(new, hook.__self__)
    try:
        yield
    finally:
        for hooks, key, hook in changed:
            hooks[key] = hook


def step(adapter: veneer.Adapter, task: CausalLM, batch: dict[str, Tensor], label_only: bool) -> float:
    adapter.train()
    adapter.zero_grad()
    if label_only:
        outcome = task.outcome(adapter, batch)
        loss = outcome.loss / outcome.items
    else:
        logits = adapter(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    return float(loss.detach())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    base = veneer.load_base("smollm2-135m-instruct")
    adapter = base.attach(veneer.LoRA(rank=16), "spike")
    torch.manual_seed(0)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    ids = torch.randint(0, 49152, (4, 256))
    labels = torch.where(torch.arange(256) < 128, -100, ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    task = CausalLM()
    variants: dict[str, tuple[Any, bool]] = {
        "plain": (None, False),
        "plain+head": (None, True),
        "fused": ({"linear": False, "siblings": False}, True),
        "fused+linear": ({"linear": True, "siblings": False}, True),
        "siblings": ({"linear": False, "siblings": True}, True),
        "siblings+linear": ({"linear": True, "siblings": True}, True),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, float] = {}
    gradients: dict[str, Tensor] = {}
    for turn in range(options.rounds + 1):
        for name, (patch, label_only) in variants.items():
            with patched(base, **patch) if patch else contextlib.nullcontext():
                started = time.perf_counter()
                losses[name] = step(adapter, task, batch, label_only)
                if turn:
                    times[name].append(time.perf_counter() - started)
            gradients[name] = torch.cat([p.grad.flatten() for p in adapter.parameters() if p.grad is not None])
    with torch.no_grad():
        started = time.perf_counter()
        base.model(input_ids=ids, use_cache=False)
        forward = time.perf_counter() - started
    reference = gradients["plain+head"]
    rows = [
        {
            "variant": name,
            "median_seconds": statistics.median(values),
            "ratio_to_plain": statistics.median(times["plain"]) / statistics.median(values),
            "loss": losses[name],
            "gradient_difference": float((gradients[name] - reference).norm() / reference.norm()),
        }
        for name, values in times.items()
    ]
    if options.json:
        print(json.dumps({"no_grad_forward_seconds": forward, "rows": rows}, indent=2))
        return
    for row in rows:
        print(
            f"{row['variant']:<16} {row['median_seconds']:.3f} s  {row['ratio_to_plain']:.2f}×  "
            f"loss {row['loss']:.5f}  gradients differ by {row['gradient_difference']:.1e}"
        )
    print(f"{'no-grad forward':<16} {forward:.3f} s")


if __name__ == "__main__":
    main()
