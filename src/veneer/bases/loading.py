"""Finding and loading a base: a catalogue name, a local folder, a GGUF file, or a hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from veneer.bases import factored, quantized
from veneer.bases.catalogue import CATALOGUE
from veneer.bases.pretrained import Pretrained
from veneer.bases.quiet import quiet
from veneer.bases.sites import ALL_LINEAR, SiteMap, backbone
from veneer.errors import BaseError, FetchError, VeneerError, did_you_mean
from veneer.packages import offline as no_network


def load_pretrained(
    name: str | os.PathLike[str],
    *,
    auto_class: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
    offline: bool | None = None,
    weights: bool = True,
    quantize: str | None = None,
    **config: Any,
) -> Pretrained:
    """Load a pretrained model and its tokenizer.

    Args:
        name: a catalogue name, a folder with safetensors, a ``.gguf`` file, or a hub id.
        auto_class: the transformers auto class to load with; by default the one the checkpoint was saved as.
        dtype: ``"auto"`` keeps the checkpoint's, except that a half-precision type which this device computes
            slowly or not at all is replaced: by bfloat16 where that is fast, else by float32.
        device: by default CUDA, MPS or CPU, the first there is.
        revision: of a hub id.
        offline: True forbids all downloads; None leaves it to ``VENEER_OFFLINE`` and ``HF_HUB_OFFLINE``.
        weights: False leaves them out: architecture and tokenizer alone, at once, in next to no memory.
        quantize: ``"nf4"`` or ``"int8"``: keep the linear maps inside the layers in so many bits.
        config: settings of the model's config, such as ``num_labels``.

    Raises:
        BaseError: the name leads to nothing that transformers can load.
        FetchError: a download failed or is forbidden.
    """
    import transformers

    device = _device(device)
    if quantize is not None:
        quantized.check_kind(quantize)
    source, where = locate(str(name), revision, no_network(offline))
    options = {**where, **config}
    try:
        with quiet():
            settings = transformers.AutoConfig.from_pretrained(source, **where)
            if quantize is not None and getattr(settings, "quantization_config", None) is not None:
                raise BaseError(f"{name} is quantised already; leave `quantize` out.")
            wanted = auto_class or default_auto_class(settings)
            _check_kind(str(name), wanted, settings)
            cls = getattr(transformers, wanted)
            if not weights:
                with torch.device("meta"):
                    model = cls.from_config(settings, dtype=_dtype(dtype, settings, device))
                    factored.install(backbone(model), getattr(settings, factored.RANKS, {}))
                return Pretrained(model, _tokenizer(source, where), name=str(name))
            if "gguf_file" in where:
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            options["dtype"] = _dtype(dtype, settings, device)
            if hasattr(settings, factored.RANKS):
                model, info = factored.load(cls, source, settings, **options)
            else:
                model, info = cls.from_pretrained(source, output_loading_info=True, **options)
    except VeneerError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise _explained(str(name), error) from error
    snapshot, original = _snapshot(source, where), None
    if quantize is not None:
        targets = [site.path for site in SiteMap(model).resolve(ALL_LINEAR) if site.parameter is None]
        quantized.quantize(model, quantize, targets, device)
        revision_now = snapshot.name if snapshot else revision

        def original() -> nn.Module:
            """The model before, from where it was loaded: on CPU it is little more than a view of the files."""
            return load_pretrained(
                name, auto_class=wanted, dtype=dtype, device="cpu", revision=revision_now, offline=offline, **config
            ).model

    model.to(device).eval()
    tokenizer = _tokenizer(source, where)
    if getattr(model.config, "pad_token_id", None) is None and tokenizer is not None:
        model.config.pad_token_id = tokenizer.pad_token_id  # sequence classification looks for the last real token
    local = Path(source) / where["gguf_file"] if "gguf_file" in where else Path(source)
    return Pretrained(
        model,
        tokenizer,
        name=str(name),
        revision=revision or (snapshot.name if snapshot else None),
        folder=local if local.exists() else None,
        missing=info["missing_keys"],
        original=original,
    )


def _snapshot(source: str, where: dict[str, Any]) -> Path | None:
    """The snapshot of the hub's repository that was loaded, named by its commit; None for what is no hub id."""
    from huggingface_hub import try_to_load_from_cache

    if Path(source).exists():
        return None
    found = try_to_load_from_cache(source, "config.json", revision=where.get("revision"))
    return Path(found).parent if isinstance(found, str) else None


def _device(asked: torch.device | str | None) -> torch.device:
    try:
        device = torch.device(asked) if asked is not None else default_device()
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BaseError(f"There is no device {str(asked)!r} here ({str(error).splitlines()[0]}); try cpu.") from error
    return device


def _check_kind(name: str, auto_class: str, settings: Any) -> None:
    """An encoder made to predict next tokens loads without a word, and never learns to."""
    from transformers.models.auto import modeling_auto as auto

    encoder = settings.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    saved = (getattr(settings, "architectures", None) or [""])[0]
    causal = saved in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() or getattr(settings, "is_decoder", False)
    if auto_class == "AutoModelForCausalLM" and encoder and not causal and saved:
        raise BaseError(
            f"{name} is an encoder ({saved}): it reads text, but doesn't write any. Take a decoder such as "
            "smollm2-135m-instruct, or give it rows with text and label to classify."
        )


def default_device() -> torch.device:
    """CUDA, then Apple's MPS, then CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices at full speed."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type == "mps"


def _dtype(asked: torch.dtype | str, settings: Any, device: torch.device) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        return asked
    if asked != "auto":
        found = getattr(torch, asked, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise BaseError(f"{asked!r} is no dtype; use auto, float32, bfloat16 or float16.")
        return found
    stored = getattr(settings, "dtype", None) or torch.float32
    if stored == torch.float16 and device.type == "cpu":
        stored = torch.bfloat16
    if stored == torch.bfloat16 and not fast_bfloat16(device):
        return torch.float32
    return stored


def locate(name: str, revision: str | None, no_downloads: bool) -> tuple[str, dict[str, Any]]:
    """What to hand to ``from_pretrained``: a source and its options."""
    if name in CATALOGUE:
        return str(CATALOGUE[name].fetch(no_network=no_downloads)), {"local_files_only": True}
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BaseError(f"There is no file {path}.")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        if not (path / "config.json").is_file():
            what = " It looks like an adapter; load it with veneer.load_adapter." if _is_adapter(path) else ""
            raise BaseError(f"{path} is no model folder: it has no config.json.{what}")
        return str(path), {"local_files_only": True}
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") > 1:
        raise BaseError(f"There is no folder {path}.")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    if no_downloads:
        options["local_files_only"] = True
    return name, options


def _is_adapter(path: Path) -> bool:
    return (path / "adapter_config.json").is_file()


def _explained(name: str, error: Exception) -> BaseError | FetchError:
    """Turn transformers' page of possible causes into one sentence."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "/" in name or Path(name).exists():
        if any(word in str(error) for word in ("offline", "connect", "cached files", "couldn't find them")):
            return FetchError(
                f"{name} is not on this machine and the hub cannot be reached ({first}). "
                f"Without a hub, use a local folder or one of: {', '.join(CATALOGUE)}."
            )
        return BaseError(f"Cannot load {name!r} as a base: {first}")
    return BaseError(
        f"No base called {name!r}: it is no folder here, not in the catalogue "
        f"({', '.join(CATALOGUE)}), and not to be had from the hub.{did_you_mean(name, CATALOGUE)}"
    )


def default_auto_class(settings: Any) -> str:
    """The auto class of the architecture the checkpoint was saved as, which need not be a bare backbone."""
    from transformers.models.auto import modeling_auto as auto

    saved = (getattr(settings, "architectures", None) or [""])[0]
    for names, cls in (
        (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM"),
        (auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "AutoModelForSeq2SeqLM"),
        (auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "AutoModelForSequenceClassification"),
    ):
        if saved in names.values() or (not saved and settings.model_type in names):
            return cls
    return "AutoModel"


def _tokenizer(source: str, where: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
        if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked; labels are made from rows, not from it
        return tokenizer
    except (OSError, ValueError, KeyError, TypeError):
        return None  # vision and speech bases have none; tasks that need one say so
