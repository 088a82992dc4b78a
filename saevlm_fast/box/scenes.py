"""Small images with known factors: one to three objects on a background, the truth against which concepts are checked.

An object has a shape, a colour, a texture, a size and a place (a quadrant); a scene has a background colour and a
backdrop (how the background is drawn), and with that comes what no label names: lighting, noise, jitter of colour,
position, size and rotation. Factors are drawn independently. Scene i depends on (seed, split, i) alone.

The same bytes on every machine: random numbers are raw Philox words (numpy promises never to change them), one fixed
stretch of the counter per scene; pixels are made by elementwise float32 additions, multiplications, divisions, square
roots, comparisons and floors alone, which IEEE 754 defines to the last bit. No sums over axes, no matrix products, no
library sines: those differ between processors. tests/box/test_scenes.py holds the hashes.

Shape suffixes: N scenes, M objects, O = 3 slots for objects, F factors of an object, H = W = 48 pixels, C colours.
"""

from dataclasses import dataclass
from itertools import permutations

import numpy as np

from saevlm_fast.box.outlines import OUTLINES
from saevlm_fast.errors import require

IMAGE_SIZE = 48
MAX_OBJECTS = 3
SPLITS = ("train", "test", "novel")

# factor -> group -> values; a value's path is (root, group, value), so depth 0 is the factor, 1 the group, 2 the value.
TAXONOMY: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "curved": ("circle", "ring", "crescent", "heart"),
        "straight": ("square", "diamond", "triangle"),
        "pointed": ("star", "cross", "arrow"),
    },
    "colour": {
        "warm": ("red", "orange", "yellow", "pink"),
        "cool": ("green", "cyan", "blue", "purple"),
        "neutral": ("white", "black"),
    },
    "texture": {"solid": ("plain", "outlined"), "patterned": ("striped", "dotted", "checkered")},
    "size": {"moderate": ("small", "medium"), "large": ("big",)},
    "place": {"top": ("top left", "top right"), "bottom": ("bottom left", "bottom right")},
    "background": {"dark": ("teal", "navy", "olive", "maroon"), "light": ("beige", "gray", "lavender", "mint")},
    "backdrop": {"smooth": ("even", "fading"), "uneven": ("tiled", "cloudy")},
    "count": {"single": ("one",), "several": ("two", "three")},
}
OBJECT_FACTORS = ("shape", "colour", "texture", "size", "place")
SCENE_FACTORS = ("background", "backdrop", "count")
VALUES: dict[str, tuple[str, ...]] = {
    factor: tuple(value for values in groups.values() for value in values) for factor, groups in TAXONOMY.items()
}
SHAPES, COLOURS, TEXTURES, SIZES, PLACES = (VALUES[factor] for factor in OBJECT_FACTORS)
BACKGROUNDS, BACKDROPS, COUNTS = (VALUES[factor] for factor in SCENE_FACTORS)

# One colour per shape, and one shape per colour, is kept out of the splits "train" and "test": every value is then as
# frequent as every other, and no (shape, colour) pair of the split "novel" was ever shown in training.
HELD_OUT = {shape: COLOURS[(3 * s + 1) % len(COLOURS)] for s, shape in enumerate(SHAPES)}

_COLOUR_RGB = {
    "red": (220, 30, 35),
    "orange": (250, 135, 20),
    "yellow": (250, 225, 40),
    "pink": (255, 135, 190),
    "green": (45, 170, 55),
    "cyan": (70, 225, 240),
    "blue": (40, 80, 230),
    "purple": (145, 45, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
_BACKGROUND_RGB = {
    "teal": (20, 105, 110),
    "navy": (32, 42, 105),
    "olive": (105, 105, 35),
    "maroon": (105, 25, 50),
    "beige": (225, 205, 165),
    "gray": (150, 150, 150),
    "lavender": (195, 180, 230),
    "mint": (175, 230, 195),
}
_LIGHTER_PATTERN = ("black", "blue", "red")  # the others' pattern is darker than they are
_RADII = {"small": 6.0, "medium": 8.4, "big": 11.2}  # pixels, each up to 4 % smaller or larger

_CELL = IMAGE_SIZE // 2  # a place is a quadrant: objects never overlap
_SETTING_WORDS = 128  # of each scene's Philox words; the rest is noise, two bytes per pixel and channel
_NOISE_WORDS = 2 * IMAGE_SIZE * IMAGE_SIZE * 3 // 8
_WORDS = _SETTING_WORDS + _NOISE_WORDS
_BLOCK = 128  # scenes drawn at once: fits the cache
_PLACE_ORDERS = np.array(list(permutations(range(len(PLACES)))))


@dataclass(frozen=True)
class SceneBatch:
    """N scenes. Object slots are in reading order of the objects' places; unused slots hold label -1 and no pixel.

    Attributes:
        images: uint8 [N, H, W, 3].
        masks: bool [N, O, H, W], the pixels that an object covers at least half.
        objects: int64 [N, O, F], index of the value of each of OBJECT_FACTORS in VALUES.
        setting: int64 [N, 3], likewise for SCENE_FACTORS.
    """

    images: np.ndarray
    masks: np.ndarray
    objects: np.ndarray
    setting: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: np.ndarray) -> "SceneBatch":
        """The scenes at `indices`, in their order."""
        return SceneBatch(self.images[indices], self.masks[indices], self.objects[indices], self.setting[indices])

    def captions(self) -> list[str]:
        """Every scene in words: all factors of all objects, then the background."""
        return [describe(objects, setting) for objects, setting in zip(self.objects, self.setting)]

    def labels(self, i: int) -> dict[str, list[str]]:
        """Factor -> names of its values in scene i: one per object in slot order, one for a factor of the scene."""
        present = self.objects[i][self.objects[i, :, 0] >= 0]
        of_objects = {name: [VALUES[name][v] for v in present[:, f]] for f, name in enumerate(OBJECT_FACTORS)}
        return of_objects | {name: [VALUES[name][self.setting[i, f]]] for f, name in enumerate(SCENE_FACTORS)}


class Scenes:
    """An endless, seeded series of scenes.

    Args:
        seed: of everything; the splits of one seed are three unrelated series.
        split: `train`; `test`, the same distribution; `novel`, in which every object is a HELD_OUT pair of shape and
            colour, which the other two never show.

    Raises:
        ValueError: a negative seed or an unknown split.
    """

    def __init__(self, seed: int = 0, split: str = "train"):
        require(seed >= 0, f"seed: {seed} must not be negative")
        require(split in SPLITS, f"split: {split!r} is not one of {', '.join(SPLITS)}")
        self.seed, self.split = seed, split
        entropy = np.random.SeedSequence([seed, SPLITS.index(split)])
        self._key = entropy.generate_state(2, np.uint64)

    def batch(self, start: int, n: int) -> SceneBatch:
        """Scenes start .. start + n - 1.

        Raises:
            ValueError: start negative, or n below 1.
        """
        self._check_range(start, n)
        blocks = [self._draw(i, m) for i, m in _blocks(start, n)]
        columns = ([getattr(b, name) for b in blocks] for name in ("images", "masks", "objects", "setting"))
        return SceneBatch(*(np.concatenate(column) for column in columns))

    def labels(self, start: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """objects [n, O, F] and setting [n, 3] of scenes start .. start + n - 1, without drawing them.

        Raises:
            ValueError: start negative, or n below 1.
        """
        self._check_range(start, n)
        blocks = [self._truth(_Draws(self._words(i, m)[:, :_SETTING_WORDS])) for i, m in _blocks(start, n)]
        setting, objects = (np.concatenate(column) for column in zip(*blocks))
        return objects, setting

    def _check_range(self, start: int, n: int) -> None:
        require(start >= 0, f"start: {start} must not be negative")
        require(n >= 1, f"n: {n} must be at least 1")

    def _draw(self, start: int, n: int) -> SceneBatch:
        words = self._words(start, n)
        draw = _Draws(words[:, :_SETTING_WORDS])
        setting, objects = self._truth(draw)
        canvas = _background(draw, setting)
        masks = np.zeros((n, MAX_OBJECTS, IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
        _paint_objects(canvas, masks, draw, objects)
        _light(canvas, draw)
        _add_noise(canvas, draw, words[:, _SETTING_WORDS:])
        np.clip(canvas, 0.0, 255.0, out=canvas)
        canvas += 0.5
        return SceneBatch(canvas.astype(np.uint8), masks, objects, setting)

    def _words(self, start: int, n: int) -> np.ndarray:
        """Raw Philox words [n, _WORDS]: the counter counts blocks of four words, and each scene owns _WORDS // 4."""
        generator = np.random.Philox(key=self._key)
        generator.advance(start * (_WORDS // 4))
        return generator.random_raw(n * _WORDS).reshape(n, _WORDS)

    def _truth(self, draw: "_Draws") -> tuple[np.ndarray, np.ndarray]:
        counts = draw.index(len(COUNTS))
        setting = np.stack([draw.index(len(BACKGROUNDS)), draw.index(len(BACKDROPS)), counts], axis=1)
        shape = draw.index(len(SHAPES), MAX_OBJECTS)
        held_out = np.array([COLOURS.index(HELD_OUT[name]) for name in SHAPES])[shape]
        other = (held_out + 1 + draw.index(len(COLOURS) - 1, MAX_OBJECTS)) % len(COLOURS)
        colour = held_out if self.split == "novel" else other
        texture, size = draw.index(len(TEXTURES), MAX_OBJECTS), draw.index(len(SIZES), MAX_OBJECTS)
        unused = np.arange(MAX_OBJECTS) > counts[:, None]
        place = _PLACE_ORDERS[draw.index(len(_PLACE_ORDERS))][:, :MAX_OBJECTS]
        place = np.sort(np.where(unused, len(PLACES), place), axis=1)
        objects = np.stack([shape, colour, texture, size, place], axis=2)
        return setting, np.where(unused[:, :, None], -1, objects)


def _blocks(start: int, n: int) -> list[tuple[int, int]]:
    """(first, how many) of the scenes that are drawn at once."""
    return [(i, min(_BLOCK, start + n - i)) for i in range(start, start + n, _BLOCK)]


class _Draws:
    """Hands out a scene's words one after the other, as integers or as floats, for N scenes at once."""

    def __init__(self, words: np.ndarray):
        # 24 bits: exact in float32, and the bias of an index below 100 is under one in 10^5.
        self._words, self._used = (words >> np.uint64(40)).astype(np.int64), 0

    def _take(self, count: int) -> np.ndarray:
        self._used += count
        assert self._used <= self._words.shape[1], "a scene asks for more words than _SETTING_WORDS"
        return self._words[:, self._used - count : self._used]

    def index(self, n_values: int, count: int = 0) -> np.ndarray:
        """Uniform integers below n_values: [N], or [N, count] if count is given."""
        indices = (self._take(max(count, 1)) * n_values) >> 24
        return indices if count else indices[:, 0]

    def between(self, low: float, high: float, count: int) -> np.ndarray:
        """Uniform float32 [N, count] in [low, high)."""
        return self._take(count).astype(np.float32) * np.float32((high - low) / 2**24) + np.float32(low)


def describe(objects: np.ndarray, setting: np.ndarray) -> str:
    """The caption of one scene from its labels, objects [O, F] and setting [3], as in SceneBatch.

    -1 leaves a factor out, and an object whose factors are all left out is not mentioned. The number of objects is said
    where none is mentioned: "two things on tiled teal".
    """
    background, backdrop, count = (int(value) for value in setting)
    phrases = [describe_object(labels) for labels in objects if (labels >= 0).any()]
    if not phrases:
        phrases = [f"{COUNTS[count]} thing{'s' if count else ''}" if count >= 0 else "a scene"]
    ground = [BACKDROPS[backdrop]] * (backdrop >= 0) + [BACKGROUNDS[background]] * (background >= 0)
    if background < 0 <= backdrop:
        ground.append("background")
    return " and ".join(phrases) + (f" on {' '.join(ground)}" if ground else "")


def value_prompts(factor: str) -> list[str]:
    """The shortest description that says each value of a factor: "a star", "a red thing", "a scene on teal"."""
    prompts = []
    for value in range(len(VALUES[factor])):
        objects, setting = np.full((1, len(OBJECT_FACTORS)), -1), np.full(len(SCENE_FACTORS), -1)
        if factor in OBJECT_FACTORS:
            objects[0, OBJECT_FACTORS.index(factor)] = value
        else:
            setting[SCENE_FACTORS.index(factor)] = value
        prompts.append(describe(objects, setting))
    return prompts


def describe_object(labels: np.ndarray) -> str:
    """One object in words, "a big red striped star at the top left", from its labels [F]; -1 leaves a factor out."""
    shape, colour, texture, size, place = (
        VALUES[name][v] if v >= 0 else "" for name, v in zip(OBJECT_FACTORS, labels.tolist())
    )
    words = [word for word in (size, colour, texture, shape or "thing", place and f"at the {place}") if word]
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def _pixel_centres(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.float32) + np.float32(0.5)


def _background(draw: _Draws, setting: np.ndarray) -> np.ndarray:
    """float32 [N, H, W, 3]: the background's colour, made lighter and darker by the backdrop."""
    n = len(setting)
    rgb_NC = np.array([_BACKGROUND_RGB[name] for name in BACKGROUNDS], np.float32)[setting[:, 0]]
    rgb_NC = rgb_NC + draw.between(-10, 10, 3)
    tone = np.zeros((n, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    slopes, phases, clouds = draw.between(-1, 1, 2), draw.between(0, 1, 2), draw.between(-1, 1, 49)
    for backdrop, paint, numbers in (
        ("fading", _fading, slopes),
        ("tiled", _tiled, phases),
        ("cloudy", _cloudy, clouds),
    ):
        chosen = setting[:, 1] == BACKDROPS.index(backdrop)
        tone[chosen] = paint(numbers[chosen])
    return rgb_NC[:, None, None, :] * (tone + 1.0)[..., None]


def _fading(slopes_N2: np.ndarray) -> np.ndarray:
    """From lighter at one side to darker at the opposite one; the steeper of the two slopes is always the same."""
    steepest = np.maximum(np.abs(slopes_N2), np.float32(1e-3)).max(axis=1, keepdims=True)
    x = (_pixel_centres(IMAGE_SIZE) - 24.0) / 24.0
    slopes = slopes_N2 / steepest * np.float32(0.38)
    return slopes[:, 0, None, None] * x + slopes[:, 1, None, None] * x[:, None]


def _tiled(phases_N2: np.ndarray) -> np.ndarray:
    """A board of lighter and darker squares of 6 pixels."""
    x, y = (np.floor(_pixel_centres(IMAGE_SIZE) / 6.0 + 2.0 * phases_N2[:, axis, None]) for axis in (0, 1))
    odd = (x[:, None, :] + y[:, :, None]) % 2.0
    return (odd - 0.5) * np.float32(0.36)


def _cloudy(values_N49: np.ndarray) -> np.ndarray:
    """Random tones on a grid of 7 x 7 points, 8 pixels apart, blended between them."""
    grid = values_N49.reshape(-1, 7, 7) * np.float32(0.42)
    at = _pixel_centres(IMAGE_SIZE) / 8.0
    cell = np.floor(at).astype(np.int64)
    weight = at - cell.astype(np.float32)
    rows = grid[:, cell, :] + (grid[:, cell + 1, :] - grid[:, cell, :]) * weight[:, None]
    return rows[:, :, cell] + (rows[:, :, cell + 1] - rows[:, :, cell]) * weight


def _paint_objects(canvas: np.ndarray, masks: np.ndarray, draw: _Draws, objects: np.ndarray) -> None:
    """Paints every object into its own quadrant of the canvas, all M objects at once, and notes their masks."""
    limits = {
        "radius": (0.96, 1.04),
        "turn": (-0.11, 0.11),
        "x": (-1, 1),
        "y": (-1, 1),
        "phase_x": (0, 1),
        "phase_y": (0, 1),
    }
    numbers = {name: draw.between(low, high, MAX_OBJECTS) for name, (low, high) in limits.items()}  # in this order
    jitter = draw.between(-12, 12, 3 * MAX_OBJECTS).reshape(-1, MAX_OBJECTS, 3)
    scene, slot = np.nonzero(objects[:, :, 0] >= 0)
    shape, colour, texture, size, place = objects[scene, slot].T
    of_object = {name: values[scene, slot] for name, values in numbers.items()}
    radius = np.array([_RADII[name] for name in SIZES], np.float32)[size] * of_object["radius"]
    u, v = _object_axes(radius, of_object)
    distance = _distances(shape, u / radius[:, None, None], v / radius[:, None, None]) * radius[:, None, None]
    pattern = _patterns(texture, u, v, distance, radius, of_object)
    first, second = _paints(colour, jitter[scene, slot])
    cover = np.clip(0.5 - distance, 0.0, 1.0)[..., None]
    paint = first[:, None, None] + (second - first)[:, None, None] * pattern[..., None]
    row, column = place // 2, place % 2
    cells = canvas.reshape(len(canvas), 2, _CELL, 2, _CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    ground = cells[scene, row, column]
    cells[scene, row, column] = ground + (paint - ground) * cover
    mask_cells = masks.reshape(*masks.shape[:2], 2, _CELL, 2, _CELL).transpose(0, 1, 2, 4, 3, 5)
    mask_cells[scene, slot, row, column] = cover[..., 0] >= 0.5


def _light(canvas: np.ndarray, draw: _Draws) -> None:
    """Brightness, and light that falls in from one side: a plane over the image multiplies it."""
    gain, slopes = draw.between(0.82, 1.08, 1), draw.between(-0.2, 0.2, 2)
    along = (_pixel_centres(IMAGE_SIZE) - IMAGE_SIZE / 2) / IMAGE_SIZE
    across = (gain + slopes[:, :1] * along)[:, None, :]
    canvas *= (across + (slopes[:, 1:] * along)[:, :, None])[..., None]


def _add_noise(canvas: np.ndarray, draw: _Draws, words: np.ndarray) -> None:
    """The sum of two uniform bytes per pixel and channel, centred; its strength (0.5 to 9 levels) is the scene's."""
    noise = words.astype("<u8", copy=False).view(np.uint8).reshape(len(words), 2, *canvas.shape[1:])
    strength = draw.between(0.005, 0.085, 1)[:, :, None, None]
    canvas += (noise[:, 0].astype(np.float32) + noise[:, 1] - 255.0) * strength


def _object_axes(radius: np.ndarray, of_object: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates [M, cell, cell] in pixels from the object's centre, turned with the object; v points down."""
    room = np.maximum(_CELL / 2 - 0.25 - radius, 0.0)  # the whole object stays in its quadrant
    x = _pixel_centres(_CELL) - (_CELL / 2 + room * of_object["x"])[:, None]
    y = _pixel_centres(_CELL) - (_CELL / 2 + room * of_object["y"])[:, None]
    half = of_object["turn"]  # tangent of half the angle: sine and cosine without a sine
    square = half * half
    cos, sin = ((1.0 - square) / (1.0 + square))[:, None, None], (2.0 * half / (1.0 + square))[:, None, None]
    x, y = x[:, None, :], y[:, :, None]
    return x * cos + y * sin, y * cos - x * sin


def _paints(colour: np.ndarray, jitter_MC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An object's own colour and that of its pattern, a lighter or a darker one of the same hue, both [M, 3]."""
    rgb_MC = np.array([_COLOUR_RGB[name] for name in COLOURS], np.float32)[colour] + jitter_MC
    lighter = np.array([name in _LIGHTER_PATTERN for name in COLOURS])[colour, None]
    return rgb_MC, np.where(lighter, rgb_MC + (255.0 - rgb_MC) * np.float32(0.5), rgb_MC * np.float32(0.42))


def _patterns(
    texture: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    distance: np.ndarray,
    radius: np.ndarray,
    of_object: dict[str, np.ndarray],
) -> np.ndarray:
    """How much of the pattern's colour each pixel has, float32 [M, cell, cell] in [0, 1]."""
    phase_x, phase_y = of_object["phase_x"][:, None, None], of_object["phase_y"][:, None, None]
    pattern = np.zeros_like(u)
    for name, paint in (("striped", _stripes), ("dotted", _dots), ("checkered", _checks)):
        m = texture == TEXTURES.index(name)
        pattern[m] = paint(u[m], v[m], phase_x[m], phase_y[m])
    m = texture == TEXTURES.index("outlined")
    width = 0.5 + radius[m, None, None] * np.float32(0.14)
    pattern[m] = np.clip(distance[m] + width + 0.5, 0.0, 1.0)
    return pattern


def _wave(t: np.ndarray) -> np.ndarray:
    """A triangle wave of period 1 between -1/4 and 1/4."""
    return np.abs(t - np.floor(t) - 0.5) - 0.25


def _stripes(u: np.ndarray, v: np.ndarray, phase_x: np.ndarray, phase_y: np.ndarray) -> np.ndarray:
    return np.clip(_wave((u + v) * np.float32(0.16) + phase_x) * 5.0 + 0.5, 0.0, 1.0)


def _dots(u: np.ndarray, v: np.ndarray, phase_x: np.ndarray, phase_y: np.ndarray) -> np.ndarray:
    x, y = u * np.float32(0.21) + phase_x, v * np.float32(0.21) + phase_y
    x, y = x - np.floor(x) - 0.5, y - np.floor(y) - 0.5
    return np.clip(1.9 - np.sqrt(x * x + y * y) * np.float32(1 / 0.21), 0.0, 1.0)


def _checks(u: np.ndarray, v: np.ndarray, phase_x: np.ndarray, phase_y: np.ndarray) -> np.ndarray:
    x, y = _wave(u * np.float32(0.14) + phase_x), _wave(v * np.float32(0.14) + phase_y)
    return np.clip(x * y * 60.0 + 0.5, 0.0, 1.0)


def _distances(shape: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """About the distance to the outline in radii, negative inside, float32 [M, cell, cell]."""
    distance = np.empty_like(u)
    for s, name in enumerate(SHAPES):
        m = shape == s
        distance[m] = OUTLINES[name](u[m], v[m])
    return distance
