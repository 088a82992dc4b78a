"""What settings share: names of choices, limits, settings given by name."""

from collections.abc import Mapping
from dataclasses import fields
from numbers import Integral
from typing import Any, Literal, get_args

from saevlm_fast.errors import did_you_mean, require

Architecture = Literal["topk", "batch_topk", "matryoshka", "relu", "jumprelu"]
InputNorm = Literal["none", "layer_norm", "token_norm"]
ComputeDtype = Literal["float32", "tf32", "bfloat16", "float16"]
StoreDtype = Literal["float16", "bfloat16", "float32"]
DataOn = Literal["auto", "device", "host"]
Control = Literal["frozen-decoder", "soft-frozen", "frozen-encoder", "untrained", "shuffled"]
LOGGER_NAMES = ("jsonl", "tensorboard", "trackio", "wandb")
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
CALIBRATED: tuple[Architecture, ...] = ("batch_topk", "matryoshka")  # one threshold, which training finds
PENALISED: tuple[Architecture, ...] = ("relu", "jumprelu")  # trained with a penalty instead of k
CONTROLS: tuple[Control, ...] = get_args(Control)
CONTROL_WORDS: dict[Control, str] = {
    "frozen-decoder": "its decoder was never changed",
    "soft-frozen": "its decoder's rows were kept near those that it began with",
    "frozen-encoder": "its encoder's weights were never changed",
    "untrained": "no training step was taken",
    "shuffled": "it was trained on activations whose dimensions came from different rows",
}
SELECTING: tuple[Architecture, ...] = ("topk", "batch_topk", "matryoshka")  # by k, which the others have no use for
EXPANSION = 8.0
K = 20
MATRYOSHKA_FRACTIONS = (0.0625, 0.125, 0.25, 0.5625)  # paper, section 4; docs/recipe.md section 1
PROMPT = "What is shown in this image? Use exactly one word!"
WHITE = "white"
CACHE_GIB_VARIABLE, CACHE_GIB = "SAEVLM_FAST_CACHE_GIB", 50.0  # of files that are elsewhere
LARGEST = (1 << 31) - 1  # width of activations, number of latents: int32 indices hold them
FLOAT32_MAX = 3.4028234663852886e38


def is_whole(value: Any) -> bool:
    """Of whatever library; true and false are not numbers."""
    return isinstance(value, Integral) and not isinstance(value, bool)


DEVICE_HELP = "auto (a GPU if there is one), cpu, cuda or cuda:N."


def keyword_settings(who: str, given: Mapping[str, Any], *kinds: Any) -> list[dict[str, Any]]:
    """Settings given by name, one dict for each of the dataclasses whose fields they are.

    Raises:
        ValueError: a name that is a field of none of them, with the nearest that is; `who` takes the settings.
    """
    known = [{each.name for each in fields(kind)} for kind in kinds]
    for name in given:
        every = sorted(set().union(*known))
        require(name in every, f"{name}: no setting of {who}{did_you_mean(name, every)}")
    return [{name: value for name, value in given.items() if name in names} for names in known]
