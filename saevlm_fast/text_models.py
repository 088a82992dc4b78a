"""Models with a text side: LLaVAs, which answer, and CLIPs' text encoders, which say what an answer means."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.config import require
from saevlm_fast.vision import local_or_hub, one_line_errors, open_clip_model, without_load_report

Embed = Callable[[Sequence[str]], Tensor]


def load_llava(
    spec: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = "auto",
    on_message: Callable[[str], None] = print,
) -> tuple[Any, Any]:
    """(model, processor) of hf:NAME_OR_DIR, in eval mode.

    Args:
        dtype: of the weights; "auto" is that of the checkpoint.

    Raises:
        ValueError: in one line: not hf:..., missing files or weights, no network.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    prefix, _, name = spec.partition(":")
    require(prefix == "hf" and name != "", f"model: {spec!r} is not hf:NAME_OR_DIR of a LLaVA")
    with one_line_errors(spec):
        model, processor = local_or_hub(
            name, spec, lambda source, local: (
                _loaded(AutoModelForImageTextToText, source, local, spec, dtype),
                AutoProcessor.from_pretrained(source, local_files_only=local, trust_remote_code=False),
            ), on_message,
        )  # fmt: skip
    return model.to(device).eval().requires_grad_(False), processor


def _loaded(model_class: Any, source: str, local: bool, spec: str, dtype: torch.dtype | str) -> Any:
    """Every weight from the files."""
    with without_load_report():
        model, info = model_class.from_pretrained(
            source, local_files_only=local, dtype=dtype, weights_only=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    missing = sorted(info["missing_keys"])
    require(not missing, f"{spec}: {len(missing)} weights are missing, as {(missing or [''])[0]}")
    return model


def load_text_encoder(
    spec: str, device: torch.device | str = "cpu", on_message: Callable[[str], None] = print
) -> Embed:
    """A CLIP's or SigLIP's text side: texts -> embeddings float32 [N, E] of unit length, on the host.

    Args:
        spec: hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED_OR_FILE, as `vision.load_tower`.

    Raises:
        ValueError: in one line: a model without a text side, and what load_tower refuses.
    """
    prefix, _, name = spec.partition(":")
    loaders = {"hf": _hf_text, "open_clip": _open_clip_text}
    require(
        prefix in loaders and name != "", f"text_model: {spec!r} is not hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED"
    )
    with one_line_errors(spec):
        return loaders[prefix](name, spec, torch.device(device), on_message)


def _hf_text(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Embed:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = local_or_hub(
        name, spec, lambda source, local: (
            _loaded(AutoModel, source, local, spec, torch.float32),
            AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False),
        ), on_message,
    )  # fmt: skip
    model = model.to(device).eval()
    require(hasattr(model, "get_text_features"), f"{spec}: {type(model).__name__} has no text side")
    length = model.config.text_config.max_position_embeddings
    # SigLIP was trained on padded texts and has no mask; CLIP's state is read at <eos>, wherever that is.
    padding = "max_length" if model.config.model_type.startswith("siglip") else True

    def embed(texts: Sequence[str]) -> Tensor:
        inputs = tokenizer(list(texts), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            features = model.get_text_features(**inputs.to(device)).pooler_output
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu()

    return embed


def _open_clip_text(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> Embed:
    import open_clip

    model = open_clip_model(name, spec, on_message).to(device).eval()
    local = name.startswith(("hf-hub:", "local-dir:"))
    tokenizer = open_clip.get_tokenizer(name if local else name.partition("/")[0])

    def embed(texts: Sequence[str]) -> Tensor:
        with torch.inference_mode():
            features = model.encode_text(tokenizer(list(texts)).to(device))
        return torch.nn.functional.normalize(features.float(), dim=-1).cpu()

    return embed
