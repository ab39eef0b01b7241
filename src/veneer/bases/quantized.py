"""Bases whose linear maps are kept in few bits; what acts on them sees the weights they stand for.

    nf4    4 bits on the NF4 grid in blocks of 64, the blocks' constants in 8 bits again in blocks of 256 (QLoRA,
           Dettmers et al. 2023, arXiv:2305.14314, §3): 4.127 bits a weight, by bitsandbytes
    int8   8 bits with one scale an output row, by torchao: 8 bits a weight and 40 a row

Quantised are the linear maps inside the layers. Embeddings, heads, norms, biases, experts (bare parameters) and what
the architecture wants in float32 stay as they are.

The product is computed on the weight as it is dequantised for the call, and again for the backward: torchao's own
keeps all of them dequantised until then, and bitsandbytes' own is wrong for float64 on CPU, and in inference there
may pack the weight anew in place.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.bases.factored import is_factored
from veneer.bases.quiet import quiet
from veneer.errors import BaseError, VeneerWarning, did_you_mean

Kind = Literal["nf4", "int8"]
KINDS: tuple[str, ...] = get_args(Kind)
_BLOCK = 64


def kind_of(weight: object) -> str | None:
    """How a parameter is quantised; None if it isn't."""
    name = type(weight).__name__
    if name == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        return str(weight.quant_state.quant_type)  # type: ignore[attr-defined]
    return "int8" if name == "Int8Tensor" else None


def dequantized(weight: Tensor) -> Tensor:
    """The values ``[out, in]`` a quantised parameter stands for, in the dtype it had before.

    Raises:
        BaseError: bitsandbytes has packed it for its own use.
    """
    if kind_of(weight) == "int8":
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    state = weight.quant_state  # type: ignore[attr-defined]
    if getattr(state, "packing_format_for_cpu", False):
        raise BaseError(
            "bitsandbytes has packed this base's weights for inference, where they can't be read any more; load it "
            'with veneer.load_base(name, quantize="nf4").'
        )
    return dequantize_4bit(weight.data, state)


def weight_behind(module: nn.Module) -> Tensor | None:
    """The weight ``[out, in]`` a module's quantised one stands for; None if it isn't quantised."""
    weight = module._parameters.get("weight")
    if weight is None or kind_of(weight) is None:
        return None
    return dequantized(weight).to(getattr(module, "dtype", None))  # those of others have none: as it comes


def runs_on_others(module: nn.Module) -> bool:
    """Whether the module computes rightly when another weight stands in the place of its own: bitsandbytes' don't."""
    weight = module._parameters.get("weight")
    return kind_of(weight) in (None, "int8") or isinstance(module, QuantizedLinear)


def numbers(parameter: Tensor) -> int:
    """How many weights a parameter stands for."""
    if kind_of(parameter) in (None, "int8"):
        return parameter.numel()
    return int(parameter.quant_state.shape.numel())  # type: ignore[attr-defined]


def held(parameter: Tensor) -> int:
    """Bytes a parameter holds, the constants of its blocks included."""
    kind = kind_of(parameter)
    if kind is None:
        return parameter.nbytes
    if kind == "int8":
        return sum(getattr(parameter, name).nbytes for name in ("qdata", "scale", "zero_point"))
    state = parameter.quant_state  # type: ignore[attr-defined]
    constants = [state.absmax] + ([state.state2.absmax, state.offset] if state.nested else [])
    return parameter.nbytes + sum(each.nbytes for each in constants)  # the two grids are shared by all


def would_hold(shape: torch.Size, kind: str) -> int:
    """Bytes a weight ``[out, in]`` takes once it is quantised so, the constants of its blocks included."""
    if kind == "int8":
        return shape.numel() + 5 * shape[0]
    blocks = math.ceil(shape.numel() / _BLOCK)
    return math.ceil(shape.numel() / 2) + blocks + 4 * math.ceil(blocks / 256) + 4


def chosen_maps(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Which of these maps can be quantised, and are not wanted in float32 by the architecture."""
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    return [path for path in paths if _can_be(model.get_submodule(path)) and kept.isdisjoint(path.split("."))]


class _Product(torch.autograd.Function):
    """``x Wᵀ + b`` that keeps nothing for the backward but the quantised weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, dequantized(weight).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (gradient,) = gradients
        to_x = gradient @ dequantized(ctx.weight).to(gradient.dtype) if ctx.needs_input_grad[0] else None
        return to_x, None, gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None


class QuantizedLinear(nn.Linear):
    """A linear map whose weight is quantised.

    Args:
        module: a linear map, or GPT-2's transposed one.
        kind: how.
        device: to quantise on, and to stay on.

    Attributes:
        was_transposed: whether it took the place of a module that stores its weight ``[in, out]``.
        dtype: of the weight before.
    """

    def __init__(self, module: nn.Module, kind: str, device: torch.device) -> None:
        nn.Module.__init__(self)
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        assert weight is not None
        self.was_transposed = not isinstance(module, nn.Linear)
        values = (weight.detach().mT if self.was_transposed else weight.detach()).to(device).contiguous()
        self.out_features, self.in_features = values.shape
        self.dtype = values.dtype
        values = values.float() if self.dtype == torch.float64 else values  # which neither can quantise
        self.weight = _nf4(values) if kind == "nf4" else _int8(values)
        own = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=bias.requires_grad)
        self.register_parameter("bias", own)
        self.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """The product; of another weight if one was swapped in for the call."""
        if kind_of(self.weight) is None:
            return F.linear(x, self.weight, self.bias)
        return _Product.apply(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """With how it is quantised."""
        return f"{super().extra_repr()}, {kind_of(self.weight)}"


def _nf4(values: Tensor) -> nn.Parameter:
    from bitsandbytes.nn import Params4bit

    parameter = Params4bit(
        values, requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=_BLOCK
    )  # quantised when it is moved
    return parameter.to(values.device)


def _int8(values: Tensor) -> nn.Parameter:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    linear = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(values, requires_grad=False)
    quantize_(linear, Int8WeightOnlyConfig())
    return linear.weight


def quantize(model: nn.Module, kind: str, paths: list[str], device: torch.device) -> None:
    """Quantise the linear maps at ``paths``, one after the other, in place.

    Raises:
        BaseError: there is no such kind, its library is missing or fails, or there is nothing to quantise.
    """
    check_kind(kind)
    chosen = chosen_maps(model, paths)
    if not chosen and is_factored(model):
        raise BaseError(
            f"{type(model).__name__} cannot be quantised: its linear maps are factored. Leave `quantize` out, or "
            "quantise the base it was factorised from."
        )
    if not chosen:
        raise BaseError(f"{type(model).__name__} has no linear maps that could be quantised; leave `quantize` out.")
    with quiet():
        for path in chosen:
            parent, _, name = path.rpartition(".")
            try:
                quantized = QuantizedLinear(model.get_submodule(path), kind, device)
            except (RuntimeError, NotImplementedError, AssertionError) as error:
                raise BaseError(f"{path} cannot be quantised on {device}: {str(error).splitlines()[0]}") from error
            setattr(model.get_submodule(parent), name, quantized)
    rest = [p for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name]
    if rest:
        share = sum(p.numel() for p in rest) / sum(numbers(p) for p in model.parameters())
        warnings.warn(
            f"The experts, {share:.0%} of {type(model).__name__}'s weights, are bare parameters and stay unquantised.",
            VeneerWarning,
            stacklevel=2,
        )


def check_kind(kind: str) -> None:
    """Check that weights can be quantised so.

    Raises:
        BaseError: there is no such kind, or its library is missing.
    """
    if kind not in KINDS:
        raise BaseError(f"quantize: {kind!r} is none of {', '.join(KINDS)}.{did_you_mean(str(kind), KINDS)}")
    library = {"nf4": "bitsandbytes", "int8": "torchao"}[kind]
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what they use of torch
            __import__(library)
    except ImportError as error:
        raise BaseError(
            f"quantize: {kind} needs {library} ({error}); install it with pip install 'veneer[quantized]'."
        ) from error


def restore(model: nn.Module) -> None:
    """Replace all quantised maps by plain ones of the weights they stand for, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and (weight := weight_behind(module)) is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _plain(module, weight))
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)


def _plain(module: nn.Linear, values: Tensor) -> nn.Module:
    if getattr(module, "was_transposed", False):
        from transformers.pytorch_utils import Conv1D

        plain: nn.Module = Conv1D(1, 1)
        plain.nf, plain.nx = values.shape  # type: ignore[assignment]
        values = values.mT.contiguous()
    else:
        plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
    plain.weight = nn.Parameter(values, requires_grad=False)
    plain._parameters["bias"] = module.bias
    return plain.train(module.training)


def _can_be(module: nn.Module) -> bool:
    """Not subclasses of a linear map, whose weights others may read past their `forward`."""
    return type(module) is nn.Linear or (type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d))
