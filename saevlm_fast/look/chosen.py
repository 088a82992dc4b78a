"""Which latents: 0:100 as Python slices, a list, or the best so many."""

import re
from typing import TYPE_CHECKING

from saevlm_fast.errors import require
from saevlm_fast.settings import integer, integers

if TYPE_CHECKING:  # the command line reads these texts before it needs torch
    from torch import Tensor


def check_latents(name: str, text: str) -> str:
    """The text, if it is A:B, a list of numbers, or top:N. ValueError: it is not."""
    if text.startswith("top:"):
        n = integer(name, text.removeprefix("top:"))
        require(n >= 1, f"{name}: {text!r} must name at least 1")
        return text
    fits = re.fullmatch(r"\d*:\d*|\d+(,\d+)*", text) is not None
    require(fits, f"{name}: {text!r} is not 0:100, 3,17,40 or top:50")
    return text


def chosen_latents(text: str, ranks_S: "Tensor") -> list[int]:
    """The latents that a text names; ranks_S: [S] the larger the better, for top:N, -inf for never.

    Raises:
        ValueError: latents that are not there or listed twice; none.
    """
    n_latents = len(ranks_S)
    if text.startswith("top:"):
        order = ranks_S.argsort(descending=True, stable=True)[: integer("latents", text.removeprefix("top:"))]
        return order[ranks_S[order] > float("-inf")].tolist()
    if ":" not in text:
        latents = list(integers("latents", text))
        outside = next((each for each in latents if each >= n_latents), None)
        require(outside is None, f"latents: {outside} is not within 0 to {n_latents - 1}")
        require(len(set(latents)) == len(latents), f"latents: {text!r} lists one twice")
        return latents
    return list(sliced(text, n_latents))


def sliced(text: str, n_latents: int) -> range:
    """Those of A:B, either of which may be missing. ValueError: it goes beyond the last, or names none."""
    start, _, stop = text.partition(":")
    require(integer("latents", stop or "0") <= n_latents, f"latents: {text!r} goes beyond the last of {n_latents}")
    found = range(n_latents)[integer("latents", start or "0") : integer("latents", stop or str(n_latents))]
    require(len(found) > 0, f"latents: {text!r} chooses none of {n_latents}")
    return found
