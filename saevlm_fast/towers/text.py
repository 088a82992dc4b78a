"""Models with a text side: LLaVAs, which answer, and CLIPs' text encoders, which say what an answer means."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saevlm_fast.errors import check_kind, require, shown
from saevlm_fast.runtime import exact_defaults, loading, own_defaults, resolve_device
from saevlm_fast.towers.from_open_clip import open_clip_model
from saevlm_fast.towers.from_transformers import check_sizes, without_load_report
from saevlm_fast.towers.hub import local_or_hub, one_line_errors
from saevlm_fast.towers.load import find_anatomy

# Of these families only the text half is loaded.
_TEXT_HALVES = {
    "clip": "CLIPTextModelWithProjection",
    "metaclip_2": "MetaClip2TextModelWithProjection",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
}


@loading()
@own_defaults()
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

    check_kind("spec", spec, str, "hf:NAME_OR_DIR of a LLaVA")
    device = resolve_device(device)
    known = isinstance(getattr(torch, dtype, None) if isinstance(dtype, str) else dtype, torch.dtype)
    require(dtype == "auto" or known, f"dtype: {shown(dtype)} is neither auto nor a torch.dtype")
    prefix, _, name = spec.partition(":")
    require(prefix == "hf" and name != "", f"model: {spec!r} is not hf:NAME_OR_DIR of a LLaVA")

    def load(source: str, local: bool) -> tuple[Any, Any]:
        try:
            model = _loaded(AutoModelForImageTextToText, source, local, spec, dtype=dtype)
        except ValueError as error:
            kind = re.search(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'>", str(error))
            require(kind is None, f"{spec}: has a {kind and kind[1]}: no model that reads images and answers in text")
            raise
        processor = AutoProcessor.from_pretrained(source, local_files_only=local, trust_remote_code=False)
        _complete(processor, model)
        return model, processor

    with one_line_errors(spec):
        model, processor = local_or_hub(name, spec, load, on_message)
    return model.to(device).eval().requires_grad_(False), processor


def _complete(processor: Any, model: Any) -> None:
    """What the processor of a LLaVA saved before transformers 4.46 does not say, as the model's configuration has it.

    Without it the processor does not know how many tokens an image takes.
    """
    if getattr(processor, "patch_size", 0) is not None:
        return
    processor.patch_size = model.config.vision_config.patch_size
    processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy
    processor.num_additional_image_tokens = find_anatomy(model).n_prefix


def _loaded(model_class: Any, source: str, local: bool, spec: str, **options: Any) -> Any:
    """Every weight from the files."""
    with without_load_report():
        options |= {"local_files_only": local, "trust_remote_code": False, "ignore_mismatched_sizes": True}
        model, info = model_class.from_pretrained(source, weights_only=True, output_loading_info=True, **options)
    check_sizes(info, spec)
    missing = sorted(info["missing_keys"])
    require(not missing, f"{spec}: {len(missing)} weights are missing, as {(missing or [''])[0]}")
    return model


# --- texts as points in the space of a CLIP's images -----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A CLIP's or SigLIP's text side. Made by `load_text_encoder`.

    Attributes:
        spec: what was loaded. d: width E of the space shared with images. max_tokens: of a text, special ones included.
        token_ids: of one text, uncut. unknown: the number of the token for unknown words; None where there is none.
        project: texts, cut to max_tokens -> [M, E].
        logit_scale, logit_bias: by which a cosine with an image becomes a logit (about 100 of CLIP's); None where the
            checkpoint has none.
    """

    spec: str
    d: int
    max_tokens: int
    token_ids: Callable[[str], list[int]]
    unknown: int | None
    project: Callable[[list[str]], Tensor]
    logit_scale: float | None = None
    logit_bias: float = 0.0

    @exact_defaults()
    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 256, *, refuse: bool = True) -> Tensor:
        """Texts -> embeddings float32 [M, E] of unit length, on the host.

        Args:
            batch_size: texts of a forward. With 1 an embedding is the same to the last bit whatever the others are.
            refuse: texts that the model would misread. False for what another model has answered, which nobody chose:
                a text that is too long is cut, a word that is unknown is read as the tokenizer's token for such.

        Raises:
            ValueError: with refuse, a text that is too long, or has a word the tokenizer does not know.
        """
        for text in texts if refuse else ():
            self._check(text)
        parts = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
        unit = [torch.nn.functional.normalize(self.project(part).float().cpu(), dim=1) for part in parts]
        return torch.cat(unit) if unit else torch.empty(0, self.d, dtype=torch.float32)

    def _check(self, text: str) -> None:
        ids = self.token_ids(text)
        require(
            len(ids) <= self.max_tokens,
            f"texts: {text[:60]!r} has {len(ids)} tokens, {self.spec} takes at most {self.max_tokens}",
        )
        require(self.unknown not in ids, f"texts: {text[:60]!r} has a word that {self.spec} does not know")


@loading()
@own_defaults()
def load_text_encoder(
    spec: str, device: torch.device | str = "cpu", on_message: Callable[[str], None] = print
) -> TextEncoder:
    """The text side of a CLIP or SigLIP, in float32.

    Args:
        spec: hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED_OR_FILE, as `load.load_tower`.

    Raises:
        ValueError: in one line: a model without a text side, no tokenizer, and what load_tower refuses.
    """
    check_kind("spec", spec, str, "hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED")
    device = resolve_device(device)
    prefix, _, name = spec.partition(":")
    loaders = {"hf": _hf_text, "open_clip": _open_clip_text}
    require(
        prefix in loaders and name != "", f"text_model: {spec!r} is not hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED"
    )
    with one_line_errors(spec):
        return loaders[prefix](name, spec, device, on_message)


def _hf_text(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> TextEncoder:
    def load(source: str, local: bool) -> tuple[Any, Any, tuple[float | None, float]]:
        return *_text_half(source, local, spec), _logit_numbers(source, local)

    model, tokenizer, logit = local_or_hub(name, spec, load, on_message)
    model = model.to(device).eval().requires_grad_(False)
    length, siglip = model.config.max_position_embeddings, model.config.model_type.startswith("siglip")
    # SigLIP was trained on padded texts and has no mask; CLIP's state is read at <eos>, wherever that is.
    padding = "max_length" if siglip else True

    def project(texts: list[str]) -> Tensor:
        inputs = tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt").to(device)
        if siglip:
            return model(input_ids=inputs["input_ids"]).pooler_output
        return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).text_embeds

    d = model.config.projection_size if siglip else model.config.projection_dim
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    return TextEncoder(spec, d, length, ids, _unknown(tokenizer), project, *logit)


def _logit_numbers(source: str, local: bool) -> tuple[float | None, float]:
    """Scale and bias of the logits, which belong to neither half; (None, 0) of a checkpoint in another layout."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    path = cached_file(source, "model.safetensors", local_files_only=local, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return None, 0.0
    with safe_open(path, "pt") as file:
        there = set(file.keys())
        scale = float(file.get_tensor("logit_scale").float().exp()) if "logit_scale" in there else None
        bias = float(file.get_tensor("logit_bias").float()) if "logit_bias" in there else 0.0
    return scale, bias


def _unknown(tokenizer: Any) -> int | None:
    """CLIP's own tokenizer, for which <unk> is just <eos>, knows every text."""
    return None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id


def _text_half(source: str, local: bool, spec: str) -> tuple[Any, Any]:
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    config: Any = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    require(
        config.model_type in _TEXT_HALVES,
        f"{spec}: a {config.model_type} model has no text side known here; {', '.join(_TEXT_HALVES)} have",
    )
    text_config = config.text_config
    if config.model_type in ("clip", "metaclip_2"):
        text_config.projection_dim = config.projection_dim
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    _check_vocabulary(len(tokenizer), text_config.vocab_size)
    model_class = getattr(transformers, _TEXT_HALVES[config.model_type])
    return _loaded(model_class, source, local, spec, config=text_config, dtype=torch.float32), tokenizer


def _check_vocabulary(n_tokens: int, vocab_size: int) -> None:
    """Without its files transformers makes a tokenizer of special tokens alone, for which all texts are the same.

    An OSError, so that a hub model whose vision tower alone is in the cache is asked of the hub.
    """
    if not vocab_size // 2 <= n_tokens <= vocab_size:
        raise FileNotFoundError(
            f"its tokenizer has {n_tokens} tokens, its text tower {vocab_size}: tokenizer.json is missing, or another's"
        )


def _open_clip_text(name: str, spec: str, device: torch.device, on_message: Callable[[str], None]) -> TextEncoder:
    """open_clip has no loader for one half: the whole model is read, and its image side let go."""
    import open_clip

    model = open_clip_model(name, spec, on_message).eval().requires_grad_(False)
    del model.visual
    model = model.to(device)
    local = name.startswith(("hf-hub:", "local-dir:"))
    tokenizer = open_clip.get_tokenizer(name if local else name.partition("/")[0])
    project = lambda texts: model.encode_text(tokenizer(texts).to(device))  # noqa: E731
    d = project(["a"]).shape[1]
    logit = float(model.logit_scale.exp()), float(getattr(model, "logit_bias", None) or 0.0)
    inner = getattr(tokenizer, "tokenizer", None)  # of transformers, behind some models
    if inner is not None:
        ids = lambda text: inner(text)["input_ids"]  # noqa: E731
        return TextEncoder(spec, d, tokenizer.context_length, ids, _unknown(inner), project, *logit)
    special = [tokenizer.sot_token_id, tokenizer.eot_token_id]
    ids = lambda text: special + tokenizer.encode(text)  # noqa: E731
    return TextEncoder(spec, d, tokenizer.context_length, ids, None, project, *logit)
