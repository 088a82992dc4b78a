"""saevlm-fast steer: one image, one question, some latents."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Column

from saevlm_fast.cli.answers import BESIDE_WEIGHTS, AnswerArguments, seconds_an_answer, steered_answers, weight_bytes
from saevlm_fast.cli.options import Plan, command
from saevlm_fast.cli.planning import free_memory, memory_figures
from saevlm_fast.cli.terminal import Bar, print_table
from saevlm_fast.errors import ImageError, require
from saevlm_fast.settings import integers, numbers, setting

if TYPE_CHECKING:
    from PIL.Image import Image

    from saevlm_fast.steering.edits import Edit


@dataclass(frozen=True, kw_only=True)
class SteerArguments(AnswerArguments):
    """Options of `saevlm-fast steer`."""

    image: Path = setting(help="Image file.")
    prompt: str = setting(help="What is asked; put into the model's chat template.")
    latent: tuple[int, ...] = setting(help="Latent; several: 3,17. Each is clamped by itself.", parse=integers)
    alpha: tuple[float, ...] = setting(
        help="Value in raw activation units; several: 0,50,100.", paper="100", parse=numbers
    )
    only: bool = setting(False, help="All other latents 0.")
    whose: Literal["vision", "language"] = setting(
        "vision", help="Whose block --layer is: of the vision tower, or of the language model.", option="part"
    )

    @property
    def steered_part(self) -> str:
        return self.whose

    @property
    def tried(self) -> list[tuple[int, float]]:
        """(latent, alpha) in the order they are tried."""
        return [(latent, alpha) for latent in self.latent for alpha in self.alpha]

    def edits(self) -> "list[Edit]":
        """One for each that is tried; checked before a model is loaded."""
        from saevlm_fast.steering.edits import clamp

        return [clamp(latent, alpha) for latent, alpha in self.tried]

    def picture(self) -> "Image":
        """The image. ValueError: it is none, or there is nothing to ask about it."""
        from saevlm_fast.images.decode import decode
        from saevlm_fast.images.sources import read_file

        require(self.prompt.strip() != "", "prompt: is empty")
        try:
            return decode(read_file(str(self.image)))
        except ImageError as reason:
            raise ValueError(f"image: {self.image}: {reason}") from reason


def _checked(options: SteerArguments) -> "tuple[list[Edit], Image]":
    """The edits and the picture. ValueError: a latent that the SAE lacks, before a large model is loaded."""
    from saevlm_fast.formats.sae_header import read_sae_header

    edits, picture = options.edits(), options.picture()
    d_sae = read_sae_header(options.sae).config.d_sae
    for edit in edits:
        require(0 <= edit.latent < d_sae, f"latent: {edit.latent} of an SAE whose latents are 0 to {d_sae - 1}")
    return edits, picture


def plan(options: SteerArguments) -> Plan:
    """What would be asked; the time from a batch of answers without an edit."""
    from saevlm_fast.runtime import resolve_device

    edits, picture = _checked(options)
    device = resolve_device(options.device)
    free = free_memory(device)
    answerer = steered_answers(options, options.only)
    n = len(edits) + 2
    seconds = seconds_an_answer(answerer, answerer.ask(picture, options.prompt), n)
    return Plan(
        f"{n} answers of {options.model} about {options.image}",
        {
            "answers": n,
            "most_tokens_each": options.max_new_tokens,
            "image": f"{picture.width} x {picture.height}",
            **memory_figures(device, weight_bytes(answerer), free, without=BESIDE_WEIGHTS),
            "time_seconds": seconds * n,
        },
    )


@command("steer", plan=plan)
def steer(options: SteerArguments) -> dict[str, Any]:
    """Clamp SAE latents in a LLaVA's vision tower or language model and read how its answer changes."""

    from saevlm_fast.steering.answers import SteeredRow

    edits, picture = _checked(options)
    answerer = steered_answers(options, options.only)
    question = answerer.ask(picture, options.prompt)
    rows = [SteeredRow(question, None), SteeredRow(question, ()), *(SteeredRow(question, (edit,)) for edit in edits)]
    with Bar("steer", len(rows), "answers", lines=False) as bar:
        unsteered, attached, *steered = answerer.answers(rows, bar.update)
    answers = [("-", "no SAE", unsteered), ("-", "SAE, no edit", attached)]
    answers += [(str(latent), f"{alpha:g}", text) for (latent, alpha), text in zip(options.tried, steered)]
    print_table((Column("latent", justify="right"), "alpha", Column("answer", overflow="fold")), answers)
    return {
        "model": options.model,
        "sae": str(options.sae),
        "image": str(options.image),
        "prompt": options.prompt,
        **answerer.settings,
        "controls": {"unsteered": unsteered, "sae_attached": attached},
        "steered": [
            {"latent": latent, "alpha": alpha, "answer": text} for (latent, alpha), text in zip(options.tried, steered)
        ],
    }
