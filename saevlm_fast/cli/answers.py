"""A LLaVA with an SAE in its vision tower: what steer and steering-score share."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saevlm_fast.cli.options import WorkOptions
from saevlm_fast.cli.terminal import tell, warn
from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.errors import renamed, require
from saevlm_fast.formats.places import SAE_HELP
from saevlm_fast.settings import setting

if TYPE_CHECKING:
    from saevlm_fast.steering.answers import SteeredAnswers

BESIDE_WEIGHTS = "the program and what a forward takes"  # of the memory of a dry run


@dataclass(frozen=True, kw_only=True)
class AnswerArguments(WorkOptions):
    """Options of commands that ask a steered LLaVA."""

    title = "Model and SAE"

    model: str = setting(help="LLaVA: hf:NAME_OR_DIR.", place="model")
    sae: Path = setting(help=SAE_HELP)
    layer: int = setting(help="Block, from 0, whose output the SAE is of.", paper="22")
    tokens: Literal["all", "patches", "cls", "text", "image", "last"] = setting(
        "all",
        help="Tokens that are steered: of vision all, patches, cls; of language all, text, image, last.",
        paper="all",
    )
    error: Literal["drop", "keep"] = setting(
        "drop", help="drop (the paper) or keep what the SAE cannot reconstruct.", paper="drop"
    )
    max_new_tokens: int = setting(64, help="Longest answer.", at_least=1)
    batch_size: int = setting(64, help="Answers generated at once.", at_least=1)
    device: str = setting("auto", help=DEVICE_HELP)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting("auto", help="Of the model.")

    @property
    def steered_part(self) -> str:
        """Whose block is meant: vision or language."""
        return "vision"

    def check(self) -> None:
        super().check()
        known = {"vision": ("all", "patches", "cls"), "language": ("all", "text", "image", "last")}[self.steered_part]
        require(
            self.tokens in known, f"tokens: {self.tokens} is not one of {', '.join(known)} (part {self.steered_part})"
        )


def steered_answers(options: AnswerArguments, only: bool = False) -> "SteeredAnswers":
    """Model and SAE on one device; the SAE in its own dtype. only: all other latents 0."""
    from saevlm_fast.provenance import check_sae_of, other_tower
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.steering.answers import SteeredAnswers
    from saevlm_fast.steering.language import LanguageAnswers
    from saevlm_fast.towers.text import load_llava

    part = options.steered_part
    vision = part == "vision"
    target = resolve_device(options.device)
    dictionary = SparseAutoencoder.from_pretrained(options.sae, device=target)
    point = "residual" if vision else "language"
    doubt = check_sae_of(dictionary, options.layer, options.tokens, point)  # before a large model is loaded
    if doubt is not None:
        warn(f"{doubt}; what it makes of {options.tokens} tokens may mean little")
    with renamed("model"):
        llava, processor = load_llava(options.model, target, options.dtype, on_message=tell)
    as_saved = options.dtype == "auto" or str(llava.dtype) == "torch.float32"
    if as_saved and (trained_on := other_tower(dictionary, llava, vision)) is not None:
        whose = f"{part} {'tower' if vision else 'model'} of {trained_on}"
        warn(f"{options.sae} was trained on the {whose}, whose weights are not those of {options.model}")
    kind: Any = SteeredAnswers if vision else LanguageAnswers
    return kind(
        llava,
        processor,
        dictionary,
        options.layer,
        tokens=options.tokens,
        error=options.error,
        only=only,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )


def weight_bytes(answerer: "SteeredAnswers") -> int:
    """Of the model and the SAE."""
    parts = (*answerer.model.parameters(), *answerer.sae.parameters())
    return sum(parameter.numel() * parameter.element_size() for parameter in parts)


def seconds_an_answer(answerer: "SteeredAnswers", question: Any, n: int) -> float:
    """From one batch of at most n answers, after one answer that warms up."""

    from saevlm_fast.steering.answers import SteeredRow

    rows = [SteeredRow(question, ())] * min(n, answerer.batch_size)
    answerer.answers(rows[:1])
    start = time.perf_counter()
    answerer.answers(rows)
    return (time.perf_counter() - start) / len(rows)
