"""The shapes of a scene's objects: about the distance to each outline in radii, negative inside.

Of points (u, v), float32 in radii from the object's centre, v pointing down. Elementwise additions, multiplications,
square roots and comparisons alone, which IEEE 754 defines to the last bit (box/scenes.py says why).
"""

import numpy as np


def _length(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)


def _rectangle(u: np.ndarray, v: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _length(u, v) - np.float32(0.92)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(_length(u, v) - np.float32(0.74)) - np.float32(0.23)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_length(u, v) - np.float32(0.96), np.float32(0.78) - _length(u - np.float32(0.5), v))


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Two discs above a square that stands on its corner."""
    x, y = np.abs(u), v + np.float32(0.12)
    lobe = _length(x - np.float32(0.43), y + np.float32(0.33)) - np.float32(0.5)
    point = np.maximum((x + y) * np.float32(0.7071) - np.float32(0.576), -y - np.float32(0.33))
    return np.minimum(lobe, point)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return _rectangle(u, v, 0.8, 0.8)


def _diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.abs(u) * np.float32(1.5) + np.abs(v) - 1.0) * np.float32(0.555)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v - np.float32(0.7), np.abs(u) * np.float32(0.866) - v * np.float32(0.45) - np.float32(0.44))


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Five points: the plane is folded twice along the star's axes, then there is one edge left."""
    x, y = np.abs(u), -v
    for fold_x, fold_y in ((0.809017, -0.587785), (-0.809017, -0.587785)):
        over = np.maximum(x * np.float32(fold_x) + y * np.float32(fold_y), 0.0) * 2.0
        x, y = x - over * np.float32(fold_x), y - over * np.float32(fold_y)
    x = np.abs(x)
    return (y - 1.0) * np.float32(0.46) + x * np.float32(0.888)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_rectangle(u, v, 0.34, 0.95), _rectangle(u, v, 0.95, 0.34))


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """It points up."""
    head = np.maximum(v - np.float32(0.05), np.abs(u) * np.float32(0.75) - v * np.float32(0.66) - np.float32(0.65))
    return np.minimum(head, _rectangle(u, v - np.float32(0.45), 0.27, 0.5))


OUTLINES = {
    "circle": _circle,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
    "square": _square,
    "diamond": _diamond,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "arrow": _arrow,
}
