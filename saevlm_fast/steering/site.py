"""Where a model is steered: the block, the tokens, and the hook.

Nothing of a model is replaced: one hook, gone afterwards, also after an error. It comes before the library's own hooks,
so hidden states that the model collects (LLaVA's vision_feature_layer) hold the edited stream. Of nested steerings of
one block the inner acts first. Code compiled by torch.compile does not see new hooks, so it rests while a steering is
on: everything runs eagerly, and the compiled code is used again, unchanged, afterwards.

Shape suffixes: B rows of the block (images, or their tiles), T tokens, D width.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saevlm_fast.errors import check_kind, require, shown, whole_number
from saevlm_fast.sae import SparseAutoencoder, check_sae
from saevlm_fast.towers.forms import Form
from saevlm_fast.towers.language import language_blocks
from saevlm_fast.towers.load import find_anatomy
from saevlm_fast.towers.tower import Anatomy

ERRORS, TOKENS = ("drop", "keep"), ("all", "patches", "cls")
PARTS = ("vision", "language")


class Site(NamedTuple):
    """A block whose output is steered, and what is known of its tower. reads: see `blocks_read`."""

    anatomy: Anatomy
    layer: int
    reads: frozenset[int] | None

    @property
    def block(self) -> nn.Module:
        """If torch.compile wrapped it by itself, the inner one: from that the model collects hidden states."""
        block = self.anatomy.blocks[self.layer]
        return getattr(block, "_orig_mod", block)


def find_site(
    model: nn.Module,
    sae: SparseAutoencoder,
    layer: int,
    tokens: str | Tensor = "all",
    error: str = "drop",
    part: str = "vision",
) -> Site:
    """The block, after all checks that need no forward. Raises the ValueErrors of `steer`."""
    require(isinstance(part, str) and part in PARTS, f"part: {shown(part)} is not one of {', '.join(PARTS)}")
    if part == "language":
        require(
            isinstance(tokens, str) and tokens == "all",
            f"tokens: {_shown(tokens)} of a language model, where only all is known here; LanguageAnswers has others",
        )
        return language_site(model, sae, layer, error)
    check_kind("model", model, nn.Module, "a model with a vision tower")
    check_sae(sae)
    layer = whole_number("layer", layer, -(2**62))
    model = getattr(model, "_orig_mod", model)  # what torch.compile returns is a wrapper
    anatomy, name = find_anatomy(model), type(model).__name__
    last = len(anatomy.blocks) - 1
    require(0 <= layer <= last, f"layer: {layer} of {name}, whose vision blocks are 0 to {last}")
    require(
        anatomy.width in (None, sae.config.d_in),
        f"sae: d_in is {sae.config.d_in}, but the vision blocks of {name} have width {anatomy.width}",
    )
    require(isinstance(error, str) and error in ERRORS, f"error: {shown(error)} is not one of {', '.join(ERRORS)}")
    mask = isinstance(tokens, Tensor) and tokens.dtype == torch.bool and tokens.ndim in (1, 2)
    known = mask or (isinstance(tokens, str) and tokens in TOKENS)
    require(known, f"tokens: {_shown(tokens)} is not one of {', '.join(TOKENS)}, or a bool mask [T] or [B, T]")
    chosen = True if isinstance(tokens, str) else bool(tokens.any())
    require(chosen, "tokens: the mask chooses none, so that steering changes nothing")
    cls_only = tokens == "cls" if isinstance(tokens, str) else anatomy.has_cls and not bool(tokens[..., 1:].any())
    require(anatomy.has_cls or not cls_only, f"tokens: cls, but the vision tower of {name} has no CLS token")
    reads = blocks_read(model, len(anatomy.blocks))
    if reads is not None:
        _check_read(model.config, layer, reads, cls_only)
    return Site(anatomy, layer, reads)


def language_site(model: nn.Module, sae: SparseAutoencoder, layer: int, error: str = "drop") -> Site:
    """A block of a LLaVA's language model, of which every one can be edited: its last is read by the head.

    Raises:
        ValueError: a model without a language part, no such block, another width than the SAE's.
    """
    check_kind("model", model, nn.Module, "a model with a language part")
    check_sae(sae)
    layer = whole_number("layer", layer, -(2**62))
    model = getattr(model, "_orig_mod", model)
    (blocks, config), name = language_blocks(model), type(model).__name__
    last = len(blocks) - 1
    require(0 <= layer <= last, f"layer: {layer} of {name}, whose language blocks are 0 to {last}")
    require(
        config.hidden_size == sae.config.d_in,
        f"sae: d_in is {sae.config.d_in}, but the language blocks of {name} have width {config.hidden_size}",
    )
    require(isinstance(error, str) and error in ERRORS, f"error: {shown(error)} is not one of {', '.join(ERRORS)}")
    return Site(Anatomy(blocks, n_prefix=0, has_cls=False, image_points={}, width=config.hidden_size), layer, None)


def blocks_read(model: Any, n_blocks: int) -> frozenset[int] | None:
    """The vision blocks whose output the language model is given (-1: the embeddings); None where there is none.

    LLaVA's kind says which (vision_feature_layer, which counts hidden states, of which there is one more than blocks:
    -2 is the last block but one). All others read the last one; Qwen3-VL's and Mllama's read some below it too.
    """
    config = getattr(model, "config", None)
    chosen = getattr(config, "vision_feature_layer", None)
    if chosen is not None:
        return frozenset(index % (n_blocks + 1) - 1 for index in ([chosen] if isinstance(chosen, int) else chosen))
    if not answers(model):
        return None
    vision = config.vision_config  # type: ignore[union-attr]
    beside = [*getattr(vision, "deepstack_visual_indexes", ()), *getattr(vision, "intermediate_layers_indices", ())]
    return frozenset([*beside, n_blocks - 1])


def answers(model: Any) -> bool:
    """Whether it is a model with a vision tower and a language model that answers."""
    both = all(hasattr(getattr(model, "config", None), f"{part}_config") for part in ("vision", "text"))
    return both and callable(getattr(model, "can_generate", None)) and bool(model.can_generate())


def _check_read(config: Any, layer: int, reads: frozenset[int], cls_only: bool) -> None:
    last_read, chosen = max(reads), getattr(config, "vision_feature_layer", None)
    what = "" if chosen is None else f" (vision_feature_layer {chosen})"
    require(
        layer <= last_read,
        f"layer: {layer} changes nothing, the language model reads vision blocks up to {last_read}{what}",
    )
    drops_cls = getattr(config, "vision_feature_select_strategy", None) == "default"
    drops_cls = drops_cls or bool(getattr(config, "vision_use_cls_token", False))  # PerceptionLM takes it off
    require(
        not (cls_only and drops_cls and layer == last_read),
        f"tokens: cls at layer {layer} changes nothing, the language model reads that block{what} without CLS",
    )


def _shown(tokens: object) -> str:
    return f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else shown(tokens)


def hooked_block(site: Site, change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """The block's output x_BTD, in whatever form it comes, becomes change(x_BTD)."""
    return hooked_output(site.block, site.anatomy.form, change)


@contextmanager
def hooked_output(module: nn.Module, form: Form, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The output x_BTD of a block or of a sublayer of one, in whatever form it comes, becomes change(x_BTD)."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        tokens = output[0] if isinstance(output, tuple) else output
        changed = form.restore(change(form.tokens(tokens)), tokens)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook, prepend=True)
    try:
        with _compiled_code_waits, form.watching():
            yield
    finally:
        handle.remove()


@contextmanager
def one_token_into(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Blocks whose output is replaced, or read by nobody, are given one token instead of all.

    Those that are given more than tokens (a mask of them, their places) are left to run as they do.
    """
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(_one_token, with_kwargs=True).remove)
        yield


def _one_token(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    names = ["hidden_states"] if not args else []
    others = [*args[1:], *(value for name, value in kwargs.items() if name not in names)]
    if any(isinstance(value, (Tensor, tuple, list)) for value in others):
        return None
    if args:
        return (args[0][:1, :1], *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"][:1, :1]}


class _ForcedEager:
    """Compiled code, which would not see a hook, runs eagerly while there is one, in whatever order hooks come and go.

    The stance of torch.compile is one for the whole process, so it is set by the first and put back by the last.
    """

    def __init__(self) -> None:
        self._lock, self._number = threading.Lock(), 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._number == 0:
                self._stance = torch.compiler.set_stance("force_eager")
                self._stance.__enter__()
            self._number += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._number -= 1
            if self._number == 0:
                self._stance.__exit__(None, None, None)


_compiled_code_waits = _ForcedEager()


def token_mask(tokens: str | Tensor, n_rows: int, n_tokens: int, anatomy: Anatomy) -> Tensor:
    """bool [B, T], True for the chosen tokens. ValueError: a mask of another shape."""
    if isinstance(tokens, Tensor):
        fits = tokens.shape[-1] == n_tokens and (tokens.ndim == 1 or len(tokens) == n_rows)
        require(fits, f"tokens: mask {list(tokens.shape)} for {n_rows} rows of {n_tokens} tokens")
        return tokens.expand(n_rows, n_tokens)
    place_T = torch.arange(n_tokens) % (anatomy.form.tile or n_tokens)
    mask_T = torch.ones(n_tokens, dtype=torch.bool)
    if tokens == "patches":
        mask_T = place_T >= anatomy.n_prefix
    elif tokens == "cls":
        mask_T = place_T == 0
    return mask_T.expand(n_rows, n_tokens)
