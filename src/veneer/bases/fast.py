"""Exact faster forms of what a base computes in training, in the places of its own for the time of a forward.

    attention       backward by plain batched products            `veneer.kernels.attention`
    RMS norms       two tensors kept for the backward, not six     `veneer.kernels.rms_norm`
    gated layers    the gate's activation computed again           `veneer.kernels.gated`
    rotary          fewer passes, nothing kept                     `veneer.kernels.rotary`
    linear maps     by tiles, where nothing is learned             `veneer.kernels.frozen`

A module is taken for one of these if it is built like one and, tried once a class, the plain form computes the very
same numbers; what is compiled of it (`veneer.kernels.native`) is as near to the exact ones.
Nothing of it stays: the modules' own methods are back when the forward is over.
"""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from veneer.kernels import attention as kernel
from veneer.kernels import native
from veneer.kernels.frozen import frozen_linear
from veneer.kernels.gated import gated
from veneer.kernels.native import tiles
from veneer.kernels.precision import wider
from veneer.kernels.rms_norm import rms_norm
from veneer.kernels.rotary import rotary

SDPA = "sdpa"
FAST_SDPA = "veneer_sdpa"
ROTARY = "apply_rotary_pos_emb"
"""What transformers' files of models call the function that turns queries and keys, each having its own."""
Forward = Callable[..., Any]


class Fast:
    """The faster forms of one model's modules.

    Args:
        model: the base.
        configs: its configs, which name the attention function.

    Attributes:
        linears: linear maps that are changed, and forwards that compute map and change at once where they can.
    """

    def __init__(self, model: nn.Module, configs: Sequence[Any]) -> None:
        self.model = model
        self.configs = configs
        self.linears: dict[nn.Module, Forward] = {}

    @functools.cached_property
    def forwards(self) -> list[tuple[nn.Module, Forward]]:
        """Modules that have a faster form, and that."""
        return list(_recognised(self.model))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "forwards"}  # found again when wanted

    def on(self) -> Callable[[], None]:
        """Put the faster forms in; what to call to have the modules' own again."""
        _register()
        known = [*self.forwards, *self.linears.items()]
        modules = [(module, forward) for module, forward in known if "forward" not in module.__dict__]
        configs = [config for config in self.configs if config._attn_implementation == SDPA]
        for module, forward in modules:
            module.__dict__["forward"] = forward
        for config in configs:
            config._attn_implementation_internal = FAST_SDPA

        def off() -> None:
            for module, _ in modules:
                module.__dict__.pop("forward", None)
            for config in configs:
                config._attn_implementation_internal = SDPA

        return off


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' function of that name, faster in training where `veneer.kernels.attention` suits."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    usual = dropout == 0 and all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap"))
    could = usual and causal and kernel.suits(query, key, value, None, True)
    padded = could and attention_mask is not None and _only_pads(attention_mask)
    mask = None if padded else attention_mask
    causal = padded or (causal and mask is None and query.shape[2] > 1)
    if usual and kernel.suits(query, key, value, mask, causal):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return kernel.attention(query, key, value, mask, causal, scale).transpose(1, 2).contiguous(), None
    result: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return result


_PADS: MutableMapping[Tensor, tuple[int, bool]] = WeakTensorKeyDictionary()
"""Masks that have been looked at, each in which version: all layers of a forward share one."""


def _only_pads(mask: Tensor) -> bool:
    """Whether a mask hides later keys and padding at the ends of rows, no more.

    Then it can be left out for a causal one, where queries and keys are of the same tokens: padding comes later than
    all that is there, and what padding itself sees reaches nothing that counts.
    """
    square = mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == mask.shape[3]
    if mask.dtype != torch.bool or not square or type(mask) is not Tensor:  # one without numbers, while planning
        return False
    version = -1 if mask.is_inference() else mask._version  # whoever made it may write into it
    seen, only = _PADS.get(mask, (-1, False))
    if seen != version or version < 0:
        there = mask[:, :, -1:]
        ends = bool((there[..., 1:] <= there[..., :-1]).all() and there[..., 0].all())
        only = ends and torch.equal(mask, torch.ones_like(mask[:1]).tril_() & there)
        _PADS[mask] = version, only
    return only


def _register() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if FAST_SDPA not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(FAST_SDPA, sdpa)
        ALL_MASK_ATTENTION_FUNCTIONS.register(FAST_SDPA, ALL_MASK_ATTENTION_FUNCTIONS[SDPA])


def _recognised(model: nn.Module) -> Iterator[tuple[nn.Module, Forward]]:
    """Each class is tried once with each way it could be built."""
    tried: dict[tuple[Any, ...], bool] = {}
    turning: dict[type, Forward | None] = {}
    for module in model.modules():
        if type(module) is nn.Linear and tiles.there():
            yield module, functools.partial(_linear, module)
            continue
        for forward, key in (*_as_norm(module), *_as_gated(module)):
            found = (type(module), key)
            if found not in tried:
                tried[found] = _same(module, forward)
            if tried[found]:
                yield module, functools.partial(forward, module)
                break
        else:
            kind = type(module)
            if kind not in turning:
                turning[kind] = _with_rotary(kind)
            if (turned := turning[kind]) is not None:
                yield module, functools.partial(turned, module)


def _linear(module: nn.Linear, input: Tensor) -> Tensor:
    return frozen_linear(input, module.weight, module.bias)


def _with_rotary(kind: type[nn.Module]) -> Forward | None:
    """The forward of an attention module with the faster function in the place of its own; None where it calls none
    or one that computes something else."""
    forward: object = kind.forward
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    theirs: Forward | None = forward.__globals__.get(ROTARY)
    if theirs is None:  # an attribute of something, or imported inside
        return None
    x = torch.linspace(-3, 3, 96).cos().view(1, 2, 3, 16)
    angles = torch.linspace(0, 3, 48).view(1, 3, 16)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [each.to(dtype) for each in (x, x.sin(), angles.cos(), angles.sin())]
            with native.plain():
                same = all(map(torch.equal, theirs(*tensors), _turned(*tensors)))
            if not same:
                return None
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None

    def turned(*args: Any, **kwargs: Any) -> Any:
        usual = len(args) == 4 and not kwargs and all(isinstance(each, Tensor) for each in args)
        usual = usual and len({(each.dtype, each.shape[-1]) for each in args}) == 1
        usual = usual and args[2].dim() == 3 and not args[2].requires_grad
        return (_turned if usual else theirs)(*args, **kwargs)

    names = {**forward.__globals__, ROTARY: turned}
    own = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _turned(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[rows, heads, positions, d]`` by cosines and sines ``[rows, positions, d]``."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return rotary(query, cos, sin), rotary(key, cos, sin)


def _as_norm(module: nn.Module) -> Iterator[tuple[Forward, Any]]:
    """What it would be as an RMS norm."""
    weight, eps = module._parameters.get("weight"), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    alone = len(module._parameters) == 1 and not module._modules
    if weight is not None and weight.dim() == 1 and alone and isinstance(eps, float):
        for more, rounded in itertools.product((0, 1), (True, False)):
            yield functools.partial(_norm, eps, more, rounded), (weight.dtype, more, rounded)


def _norm(eps: float, more: int, rounded: bool, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    weight = module.weight
    if args or kwargs or weight.requires_grad or x.dtype != weight.dtype:
        return type(module).forward(module, x, *args, **kwargs)
    return rms_norm(x, weight.to(wider(weight.dtype)) + more if more else weight, eps, rounded=rounded)


def _as_gated(module: nn.Module) -> Iterator[tuple[Forward, Any]]:
    """What it would be as a gated feed-forward layer."""
    act = getattr(module, "act_fn", None)
    parts = set(module._modules) - {"act_fn"}
    plain = not isinstance(act, nn.Identity) and not any(True for _ in getattr(act, "parameters", tuple)())
    if parts == {"gate_proj", "up_proj", "down_proj"} and callable(act) and plain:
        yield _gated_layer, type(act)


def _gated_layer(module: Any, x: Tensor) -> Any:
    return module.down_proj(gated(module.gate_proj(x), module.up_proj(x), module.act_fn))


def _same(module: nn.Module, forward: Forward) -> bool:
    """Whether it computes what the module does, on a few numbers; without anybody's hooks."""
    parameter = next(module.parameters())
    width = getattr(getattr(module, "gate_proj", None), "in_features", parameter.shape[-1])
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    x = torch.linspace(-3, 3, 2 * width, device=parameter.device).cos().view(2, width).to(dtype)
    module = _bare(module)
    if not module._modules:  # any weight will do, and ones or zeros would tell less
        module._parameters = {"weight": nn.Parameter(x[1].sin(), requires_grad=False)}
    try:
        with native.plain():  # which rounds just as the module does
            return torch.equal(type(module).forward(module, x), forward(module, x.clone().requires_grad_()))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False


def _bare(module: nn.Module) -> nn.Module:
    """A copy without hooks, which has the parameters of the module."""
    bare = copy.copy(module)
    for name in (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
    ):
        setattr(bare, name, OrderedDict())
    bare._modules = {name: child and _bare(child) for name, child in module._modules.items()}
    return bare
