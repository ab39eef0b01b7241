"""Conditional adapters: one adapter that several tasks share, told at each row which of them it is in.

    u = act(W_d h + b_d)        u' = (1 + Γ z) ⊙ u + B z        h ← h + s · (W_u u' + b_u)           mode film
    W_d, W_u = D · c, U · c     c = LayerNorm(MLP[z; layer; place])                                  mode hyper

after both residual branches of a layer, with z the condition: a vector learned for each task, or any vector the user
gives. Nearest in print are CA-MTL's conditioned layers (Pilault et al. 2021, arXiv:2009.09139, §2) and, for `hyper`,
HyperFormer++ (Mahabadi et al. 2021, arXiv:2106.04489, §2.2–2.4; its generated norms are left out, biases are each
place's own). For a fixed z either is a plain bottleneck: film with W_u diag(1 + Γ z) and b_u + W_u B z. A row without a
condition gets the mean of the tasks', or zero if there are none.

Trained and stored: film ``2 d m + m + d + 2 m |z|`` a place, plus |z| a task. W_u (in hyper U), Γ and B start at zero:
bit-equal to the base. Not mergeable.

Use it where many small tasks help each other (languages, customers, kinds of question) and each has too few rows of its
own; the data's `task` column says which a row is in. With one task it is a costlier `houlsby`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from veneer.bases import Site, SiteMap
from veneer.deltas import Bottleneck, Delta
from veneer.errors import AdapterError, ConfigError, TargetError, did_you_mean
from veneer.methods.base import BaseWeights, Lowering, Method
from veneer.methods.houlsby import ACTIVATIONS, Houlsby

_PLACES = ("attention", "mlp")


class Conditional(Houlsby):
    """A bottleneck after each residual branch that depends on a condition."""

    name: ClassVar[str] = "conditional"
    aliases: ClassVar[tuple[str, ...]] = ("can",)
    summary: ClassVar[str] = "one adapter for several tasks, told at each row which it is"
    paper: ClassVar[str] = "Pilault et al. 2021, arXiv:2009.09139"
    peft_type: ClassVar[str] = "VENEER_CONDITIONAL"

    mode: Literal["film", "hyper"] = "film"
    """How the condition acts: it scales and shifts the bottleneck, or a shared network writes its matrices."""
    size: int = Field(32, ge=1)
    """Length of the condition z, and in `hyper` of c and of the vectors for layers and places."""
    tasks: tuple[str, ...] = ()
    """Names of the tasks, each with a condition that is learned; by default those in the data's `task` column."""
    scale: float = Field(1.0, gt=0)
    """The factor s."""

    @property
    def conditioned(self) -> bool:
        """Always."""
        return True

    @property
    def asks(self) -> str | None:
        """A task."""
        return "acts by a row's task, and general texts are of none of them"

    def for_tasks(self, names: Sequence[str] | None) -> Method:
        """With these tasks, unless it was given its own.

        Raises:
            ConfigError: the rows say nothing of tasks, or of others than its own.
        """
        if names is None:
            raise ConfigError(
                "method conditional: the data have no `task` column, by which it is told the rows apart; add one, or "
                "use houlsby, which is the same for a single task."
            )
        if self.tasks and (odd := sorted(set(names) - set(self.tasks))):
            raise ConfigError(
                f"method.tasks: rows are of task {', '.join(odd)}, but it has {', '.join(self.tasks)}. A conditional "
                "adapter takes no new tasks once it is made: leave these rows out, or train a new one that has all."
            )
        return self if self.tasks else self.model_copy(update={"tasks": tuple(names)})

    def sites(self, sites: SiteMap) -> Sequence[Site]:
        """The outputs of all residual branches; in `hyper` all of one width.

        Raises:
            TargetError: they aren't.
        """
        found = super().sites(sites)
        if self.mode == "hyper" and len({site.out_features for site in found}) > 1:
            raise TargetError("The layers of this base differ in width; mode: hyper writes matrices of one width only.")
        return found

    def rate(self, name: str) -> float:
        """The network's is a tenth: its matrices are sums over the whole code, and at the full rate it learned nothing
        on MiniLM."""
        return 0.1 if name.startswith("hyper.") else 1.0

    def shared(self, sites: Sequence[Site], generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """A condition for each task, normal; in `hyper` the network, with U zero."""
        n = self.size

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        conditions = {"conditions": normal(len(self.tasks), n)} if self.tasks else {}
        if self.mode == "film":
            return conditions
        m, d = self.bottleneck, sites[0].out_features
        layers = 1 + max(site.layer or 0 for site in sites)
        return conditions | {
            "hyper.layers": normal(layers, n),
            "hyper.places": normal(len(_PLACES), n),
            "hyper.first.weight": normal(2 * n, 3 * n, std=(3 * n) ** -0.5),
            "hyper.first.bias": torch.zeros(2 * n),
            "hyper.second.weight": normal(n, 2 * n, std=(2 * n) ** -0.5),
            "hyper.second.bias": torch.zeros(n),
            "hyper.down": normal(m * d, n, std=0.02 * n**-0.5),
            "hyper.up": torch.zeros(d * m, n),
        }

    def parameters(self, site: Site, generator: torch.Generator, base: BaseWeights) -> dict[str, Tensor]:
        """Houlsby's, with Γ and B ``[m, |z|]`` zero; in `hyper` its biases only."""
        own = super().parameters(site, generator, base)
        if self.mode == "hyper":
            return {name: value for name, value in own.items() if name.endswith("bias")}
        m = self.width(site)
        return own | {"adapter_gain": torch.zeros(m, self.size), "adapter_shift": torch.zeros(m, self.size)}

    def lower(self, site: Site, parameters: Mapping[str, Tensor], step: Lowering) -> Delta:
        """The plain bottleneck that it is for this condition."""
        z = self._condition(step.condition, parameters)
        down, up, up_bias = self._film(z, parameters) if self.mode == "film" else self._hyper(z, site, parameters)
        bias = parameters["adapter_down.bias"]
        return Bottleneck(down, bias, up, up_bias, ACTIVATIONS[self.activation], self.scale)

    def _film(self, z: Tensor, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        up = parameters["adapter_up.weight"]
        gain, shift = 1 + parameters["adapter_gain"] @ z, parameters["adapter_shift"] @ z
        return parameters["adapter_down.weight"], up * gain, parameters["adapter_up.bias"] + up @ shift

    def _hyper(self, z: Tensor, site: Site, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        network = {name.removeprefix("hyper."): value for name, value in parameters.items()}
        place = _PLACES.index(site.group or "mlp")
        told = torch.cat([z, network["layers"][site.layer or 0], network["places"][place]])
        inner = F.relu(F.linear(told, network["first.weight"], network["first.bias"]))
        code = F.layer_norm(F.linear(inner, network["second.weight"], network["second.bias"]), (self.size,))
        d, m = site.out_features, self.bottleneck
        return (network["down"] @ code).view(m, d), (network["up"] @ code).view(d, m), parameters["adapter_up.bias"]

    def _condition(self, given: Any, parameters: Mapping[str, Tensor]) -> Tensor:
        """z ``[size]``.

        Raises:
            AdapterError: no task of that name, or a vector of another length.
        """
        like = parameters["adapter_up.bias"]
        if given is None:
            return parameters["conditions"].mean(0) if self.tasks else like.new_zeros(self.size)
        if isinstance(given, str | int):
            given = str(given)
            if given not in self.tasks:
                known = ", ".join(self.tasks) or "none; give vectors"
                raise AdapterError(
                    f"This adapter knows no task {given!r}.{did_you_mean(given, self.tasks)} It knows: {known}."
                )
            return parameters["conditions"][self.tasks.index(given)]
        z = torch.as_tensor(given, dtype=like.dtype, device=like.device)
        if z.shape != (self.size,):
            raise AdapterError(f"A condition has {self.size} numbers here, but one of shape {list(z.shape)} is given.")
        return z
