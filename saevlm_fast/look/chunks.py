"""The data of a page as classic scripts: what a page opened from file:// may load, where fetch may not.

    SAEVLM.define("s0/chunk/3", [...]);

JSON is also JavaScript. Nothing in it can end a script: `<` is written as an escape, and all beyond ASCII too.
"""

import base64
import json
import math
from typing import Any

import numpy as np


def script(name: str, value: Any) -> str:
    """The text of a script that defines a value. ValueError: NaN or infinity, which JSON has not."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"SAEVLM.define({json.dumps(name)},{text});\n"


def floats(values: np.ndarray) -> str:
    """float32 in base64, NaN included."""
    return base64.b64encode(np.ascontiguousarray(values, "<f4").tobytes()).decode("ascii")


def short(value: float) -> float | None:
    """Four digits of a number; None for NaN and infinity."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def shorts(values: Any) -> list[float | None]:
    return [short(float(value)) for value in values]


def heat_text(patches: np.ndarray, values: np.ndarray) -> str:
    """A sparse map in base64: three bytes an entry, patch (low, high) and value."""
    packed = np.empty((len(patches), 3), np.uint8)
    packed[:, 0], packed[:, 1], packed[:, 2] = patches & 255, patches >> 8, values
    return base64.b64encode(packed.tobytes()).decode("ascii")
