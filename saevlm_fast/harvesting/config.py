"""What is harvested: config.HarvestSettings, with hook points and choices of tokens, which need the towers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saevlm_fast.config import HarvestSettings
from saevlm_fast.data.store import STORE_DTYPES
from saevlm_fast.errors import check_kind, require
from saevlm_fast.settings import setting
from saevlm_fast.towers.language import check_language_tokens
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import LANGUAGE_POINT, HookPoint

COMPUTE_DTYPES = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_tokens(points: Sequence[str]) -> str:
    """Where no tokens are asked for: CLS; of a language model all."""
    return "all" if LANGUAGE_POINT in points else "cls"


@dataclass(frozen=True)
class HarvestConfig(HarvestSettings):
    """What is harvested: everything that decides the rows. `--resume` refuses other settings.

    An SAE writes codes instead of activations, of one point and one choice of tokens (ImageNet's CLS codes are 116 MB).

    Raises:
        ValueError: no point, one that is asked for twice, several stores for an SAE, and what HarvestSettings refuses.
    """

    points: tuple[HookPoint, ...] = setting(help="Where in the tower.")
    tokens: tuple[Tokens, ...] = setting(
        (Tokens.parse("cls"),), help="Which tokens of points that have them. A store for every pair."
    )

    def check(self) -> None:
        super().check()
        for name, kind in (("points", HookPoint), ("tokens", Tokens)):
            for each in getattr(self, name):
                check_kind(name, each, kind, f"a {kind.__name__}")
        require(len(self.points) > 0, "point: at least one hook point is needed")
        self._check_language()
        require(
            self.sae is None or len(self.stores) == 1,
            f"sae: an SAE reads one point and one choice of tokens, but {len(self.stores)} are asked for",
        )

    def _check_language(self) -> None:
        """Language layers are harvested by themselves, and have tokens of their own."""
        if not self.is_language:
            given = "prompt" if self.prompt is not None else "wrong_captions" if self.wrong_captions else ""
            require(not given, f"{given}: only for --point language, which reads captions")
            return
        others = [point.name for point in self.points if point.point != LANGUAGE_POINT]
        require(not others, f"point: language and {', '.join(others)} are not of one tower; harvest them one by one")
        require(self.square is None, f"square: {self.square} is of vision towers; the point is language")
        for tokens in self.tokens:
            check_language_tokens(tokens)

    @property
    def is_language(self) -> bool:
        """Whether image-text pairs are read."""
        return any(point.point == LANGUAGE_POINT for point in self.points)

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of a language model: half as large where the forward is."""
        return COMPUTE_DTYPES[self.dtype] or torch.float32

    @property
    def stores(self) -> tuple[tuple[HookPoint, Tokens | None], ...]:
        """The stores in order: (point, tokens); points without tokens, such as the projection, have None."""
        return tuple(
            (point, tokens) for point in self.points for tokens in (self.tokens if point.layer is not None else (None,))
        )

    @property
    def store_names(self) -> tuple[str, ...]:
        """What each of `stores` is called: residual-11-cls, projection."""
        return tuple(point.name if tokens is None else f"{point.name}-{tokens.name}" for point, tokens in self.stores)

    @property
    def torch_store_dtype(self) -> torch.dtype:
        """Of what is on disk."""
        default = "float16" if self.sae is not None else self.dtype.replace("tf32", "float32")
        return STORE_DTYPES[self.store_dtype or default]
