"""saevlm-fast erase: latents taken out of a CLIP, so that it stops reading words on images, or telling a factor."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from saevlm_fast.cli.options import Plan, WorkOptions, command
from saevlm_fast.cli.planning import check_writable, memory_figures
from saevlm_fast.cli.record import Record, settings_path
from saevlm_fast.cli.terminal import Bar, print_wide_table, say, tell, warn
from saevlm_fast.config import DEVICE_HELP
from saevlm_fast.errors import require
from saevlm_fast.settings import integers, setting, texts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from saevlm_fast.clip_steering.attacks import Style
    from saevlm_fast.clip_steering.erasing import Told
    from saevlm_fast.clip_steering.stream import Vocabulary
    from saevlm_fast.data.label_sets import LabelSet
    from saevlm_fast.images.sources import ImageSource
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.towers.text import TextEncoder
    from saevlm_fast.towers.tower import Tower

WORDS, SCENE = "words", "scene:"


def _several_numbers(name: str, text: str) -> tuple[int, ...]:
    found = integers(name, text)
    require(len(found) > 0 and len(set(found)) == len(found), f"{name}: {text!r} is not a list of different numbers")
    return tuple(found)


def _ks(name: str, text: str) -> tuple[int, ...]:
    found = _several_numbers(name, text)
    require(min(found) >= 1, f"{name}: {text!r}: each must be at least 1")
    return tuple(sorted(found))


@dataclass(frozen=True, kw_only=True)
class EraseArguments(WorkOptions):
    """Options of `saevlm-fast erase`."""

    title = "Model and SAEs"
    model: str = setting(help="Tower with a text side, as of harvest.")
    sae: tuple[str, ...] = setting(help="SAE directories of several layers, separated by commas.", parse=texts)
    layer: tuple[int, ...] = setting(
        help="Block of the tower of each SAE, separated by commas.", parse=_several_numbers
    )
    images: str = setting(help="Images, as of harvest. Half of them choose latents.")
    test_images: str | None = setting(None, help="Images that are asked about.", shown="the other half of --images")
    labels: str = setting(
        "images", help="What is told: images (their labels), FILE.csv:COLUMN, or scene:FACTOR of scenes."
    )
    what: str = setting(WORDS, help="What is erased: words (drawn on the images), or a label, as --labels has it.")
    class_prompts: str = setting(
        "a photo of a {}", help="Text of a class, with {} for the label. Scenes have texts of their own."
    )
    groups: str | None = setting(None, help="Label by which the worst group is found beside the class.", shown="none")
    k: tuple[int, ...] = setting((1, 5, 20), help="Latents that are taken out, separated by commas.", parse=_ks)
    limit: int = setting(500, help="Images for choosing, and images asked about, at most.", at_least=10)
    fonts: tuple[str, ...] = setting(
        (), help="Font files of the words for choosing.", parse=texts, shown="Pillow's bitmap font"
    )
    test_fonts: tuple[str, ...] = setting(
        (), help="Font files of the words asked about.", parse=texts, shown="Pillow's outline font"
    )
    tokens: Literal["all", "patches", "cls"] = setting("all", help="Tokens from which latents are taken.")
    seed: int = setting(0, help="Of the words, their places, and the random latents.", at_least=0)
    output: Path = setting(help="Accuracies: FILE.json.")
    batch_size: int = setting(64, help="Images of a forward.", at_least=1)
    force: bool = setting(False, help="Replace an output that is there.", recorded=False)
    device: str = setting("auto", help=DEVICE_HELP)

    def check(self) -> None:
        super().check()
        require(self.output.suffix == ".json", f"output: {self.output} does not end in .json")
        require(
            len(self.sae) == len(self.layer) > 0,
            f"layer: {len(self.layer)} layers for {len(self.sae)} SAEs; each SAE has one",
        )
        require(self.what != self.labels or self.what == WORDS, f"what: {self.what} is what --labels asks to be told")


def check(options: EraseArguments) -> None:
    """ValueError: the output may not be written, or is there."""
    from saevlm_fast.outputs import check_absent

    check_writable(options.output)
    check_absent([options.output, settings_path(options.output)], options.force)


# Labels ---------------------------------------------------------------------------------------------------------------


def labels_of(argument: str, spec: str, source: "ImageSource", numbers: "Sequence[int]") -> "LabelSet":
    """One label of each image, or none of some. ValueError: no such labels, several of an image."""
    from saevlm_fast.data.label_sets import LabelSet, read_labels

    ids = [source.image_id(i) for i in numbers]
    if spec == "images":
        found = LabelSet.of([source.label(i) for i in numbers], "images")
    elif spec.startswith(SCENE):
        found = LabelSet.of(_of_scenes(argument, spec.removeprefix(SCENE), ids), spec)
    else:
        path, _, column = spec.rpartition(":")
        require(path != "", f"{argument}: {spec!r} is not images, scene:FACTOR or FILE.csv:COLUMN")
        sets = {each.name: each for each in read_labels(path, ids)}
        require(column in sets, f"{argument}: {path} has no column {column!r}, but {', '.join(sets)}")
        found = sets[column]
    found.single()
    return found


def _of_scenes(argument: str, factor: str, ids: list[str]) -> "list[str | None]":
    """Of factors of objects, the value of scenes with a single one."""
    from saevlm_fast.box.scenes import OBJECT_FACTORS, SCENE_FACTORS, VALUES
    from saevlm_fast.images.scenes import scene_labels

    require(factor in VALUES, f"{argument}: {factor!r} is not one of {', '.join(VALUES)}")
    objects_NOF, setting_N3 = scene_labels(ids)
    names = VALUES[factor]
    if factor in SCENE_FACTORS:
        return [names[v] for v in setting_N3[:, SCENE_FACTORS.index(factor)]]
    single_N = (objects_NOF[:, :, 0] >= 0).sum(1) == 1
    values_N = objects_NOF[:, 0, OBJECT_FACTORS.index(factor)]
    return [names[v] if one else None for v, one in zip(values_N, single_N)]


def class_texts(spec: str, names: "Sequence[str]", template: str) -> list[str]:
    """A text of each class."""
    if not spec.startswith(SCENE):
        require("{}" in template, f"class_prompts: {template!r} has no {{}} for the label")
        return [template.replace("{}", name) for name in names]
    from saevlm_fast.box.scenes import VALUES, value_prompts

    factor = spec.removeprefix(SCENE)
    said = dict(zip(VALUES[factor], value_prompts(factor)))
    return [said[name] for name in names]


# What goes in ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """Tower, text side, SAEs, and the images of both halves."""

    tower: "Tower"
    encoder: "TextEncoder"
    saes: "list[SparseAutoencoder]"
    train: "tuple[ImageSource, list[int]]"
    test: "tuple[ImageSource, list[int]]"


def open_inputs(options: EraseArguments) -> Opened:
    """Everything that is read. ValueError: what does not fit, or does not exist."""
    from saevlm_fast.images.open import open_images
    from saevlm_fast.provenance import check_sae_of
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.sae import SparseAutoencoder
    from saevlm_fast.towers.load import load_tower
    from saevlm_fast.towers.text import load_text_encoder

    device = resolve_device(options.device)
    source = open_images(options.images)
    asked = source if options.test_images is None else open_images(options.test_images)
    saes = [SparseAutoencoder.from_pretrained(path, device=device) for path in options.sae]
    tower = load_tower(options.model, device, on_message=tell)
    for path, layer, sae in zip(options.sae, options.layer, saes):
        if (doubt := check_sae_of(sae, layer, options.tokens)) is not None:
            warn(f"{doubt}; what it makes of {options.tokens} tokens may mean little")
        width = tower.anatomy.width
        require(
            width in (None, sae.config.d_in), f"sae: d_in of {path} is {sae.config.d_in}, the tower is {width} wide"
        )
    encoder = load_text_encoder(options.model, device, on_message=tell)
    require(encoder.logit_scale is not None, f"model: {encoder.spec} has no logit scale in its file")
    return Opened(tower, encoder, saes, *_halves(options, source, asked))


def _halves(
    options: EraseArguments, source: "ImageSource", asked: "ImageSource"
) -> "tuple[tuple[ImageSource, list[int]], tuple[ImageSource, list[int]]]":
    """Images that are told apart by the labels, at most --limit for each use. ValueError: too few."""
    from saevlm_fast.data.label_sets import halves

    labels = {WORDS: options.labels}.get(options.what, options.what)
    train, test = _usable("images", labels, source), _usable("test_images", options.labels, asked)
    if asked is source:
        half = dict(zip(train, halves([source.image_id(i) for i in train])))
        train, test = [i for i in train if half[i]], [i for i in test if not half.get(i, False)]
    for name, numbers in (("images", train), ("test_images", test)):
        require(len(numbers) >= 10, f"{name}: {len(numbers)} with a label; 10 at least are needed")
    return (source, train[: options.limit]), (asked, test[: options.limit])


def _usable(argument: str, labels: str, source: "ImageSource") -> list[int]:
    found = labels_of(argument, labels, source, range(len(source)))
    return [int(i) for i in (found.single() >= 0).nonzero()[0]]


def _told(options: EraseArguments, images: "tuple[ImageSource, list[int]]", labels: str, names: list[str]) -> "Told":
    """With classes numbered by `names`."""
    import numpy as np

    from saevlm_fast.clip_steering.erasing import Told

    source, numbers = images
    found = labels_of("labels", labels, source, numbers)
    number = np.array([names.index(name) for name in found.names])
    y_N = np.append(number, -1)[found.single()]
    if options.groups is None:
        return Told(source, numbers, y_N, tuple(names), y_N)
    other = labels_of("groups", options.groups, source, numbers)
    groups = tuple(f"{name}, {group}" for name in names for group in other.names)
    of_other = other.single()
    group_N = np.where((y_N >= 0) & (of_other >= 0), y_N * len(other.names) + of_other, -1)
    return Told(source, numbers, y_N, groups, group_N)


def _classes(
    options: EraseArguments, opened: Opened, labels: str, *images: "tuple[ImageSource, list[int]]"
) -> "Vocabulary":
    from saevlm_fast.clip_steering.stream import Vocabulary

    names = sorted({name for each in images for name in labels_of("labels", labels, *each).names})
    require(len(names) >= 2, f"labels: {labels} has a single class")
    texts_CE = opened.encoder.embed(class_texts(labels, names, options.class_prompts))
    assert opened.encoder.logit_scale is not None
    return Vocabulary(tuple(names), texts_CE, opened.encoder.logit_scale)


# The work -------------------------------------------------------------------------------------------------------------


def plan(options: EraseArguments) -> Plan:
    """What would be asked; the time from one batch of images."""
    import time

    from saevlm_fast.clip_steering.stream import opened_stream

    check(options)
    opened = open_inputs(options)
    n_train, n_test = len(opened.train[1]), len(opened.test[1])
    removals = 4 * len(options.k) + 1
    few = opened.test[1][: options.batch_size]
    with opened_stream(opened.tower, options.layer[0], options.tokens, options.batch_size) as stream:
        start = time.perf_counter()
        batch = next(iter(stream.batches(opened.test[0], few)))
        seconds = (time.perf_counter() - start) / len(few)
        shape = batch.x_BTD.numel()
    conditions = 3 if options.what == WORDS else 2
    passes = len(opened.saes) * (2 * n_train + conditions * n_test * (1 + removals))
    widest = max(sae.config.d_sae for sae in opened.saes)
    return Plan(
        f"{options.what} erased from {options.model} by {len(opened.saes)} SAEs",
        {
            "images_for_choosing": n_train,
            "images_asked_about": n_test,
            "passes_of_an_image": passes,
            **memory_figures(opened.tower.device, 8 * n_train * widest + 16 * shape),
            "time_seconds": passes * seconds,
        },
    )


@command("erase", plan=plan)
def erase(options: EraseArguments) -> dict[str, Any]:
    """What a CLIP still tells when latents are taken out: of images with words on them, or without a factor."""
    from saevlm_fast.files import write_json_atomic
    from saevlm_fast.measures.results import plain
    from saevlm_fast.outputs import output_lock

    with output_lock(options.output, directory=False):
        check(options)
        opened = open_inputs(options)
        layers = []
        for path, layer, sae in zip(options.sae, options.layer, opened.saes):
            layers.append({"sae": path, "layer": layer, **_erase(options, opened, layer, sae)})
        document = {"format": "saevlm-fast erase", "version": 1, "what": options.what, "layers": layers}
        write_json_atomic(options.output, plain(document))
        Record("erase", options, options.output, classes=len(layers)).write()
    _print(options, layers)
    say(f"wrote {options.output}")
    return plain({"output": str(options.output), **document})


def _erase(options: EraseArguments, opened: Opened, layer: int, sae: "SparseAutoencoder") -> dict[str, Any]:
    from saevlm_fast.clip_steering.erasing import erase_factor, erase_words
    from saevlm_fast.clip_steering.stream import opened_stream
    from saevlm_fast.clip_steering.units import Latents

    bars: dict[str, Bar] = {}

    def counted(what: str, done: int, total: int) -> None:
        bar = bars.setdefault(what, Bar(f"layer {layer}, {what}", total, "images"))
        bar.update(done)
        if done == total:
            bars.pop(what).close()

    units = Latents(sae)
    with opened_stream(opened.tower, layer, options.tokens, options.batch_size) as stream:
        if options.what == WORDS:
            classes = _classes(options, opened, options.labels, opened.train, opened.test)
            train, test = (
                _told(options, each, options.labels, list(classes.words)) for each in (opened.train, opened.test)
            )
            return erase_words(stream, units, train, test, classes, options.k, _styles(options), options.seed, counted)
        told = _classes(options, opened, options.labels, opened.test)
        erased = _classes(options, opened, options.what, opened.train, opened.test)
        train = _told(options, opened.train, options.what, list(erased.words))
        tests = {
            options.labels: (_told(options, opened.test, options.labels, list(told.words)), told),
            options.what: (_told(options, opened.test, options.what, list(erased.words)), erased),
        }
        return erase_factor(stream, units, train, tests, options.k, options.seed, counted)


def _styles(options: EraseArguments) -> "tuple[Style, Style]":
    from dataclasses import replace

    from saevlm_fast.clip_steering.attacks import TEST, TRAIN

    train = replace(TRAIN, fonts=options.fonts) if options.fonts else TRAIN
    test = replace(TEST, fonts=options.test_fonts) if options.test_fonts else TEST
    both = set(train.fonts) & set(test.fonts)
    require(not both, f"test_fonts: {', '.join(both)} chose the latents; words asked about need others")
    return train, test


def _print(options: EraseArguments, layers: list[dict[str, Any]]) -> None:
    for each in layers:
        rows = each["rows"]
        columns = [name for name in rows[0] if name not in ("removal", "k")]
        say(f"layer {each['layer']}, {each['sae']}: latents {', '.join(map(str, each['latents'][:8]))}")
        cells = [
            (f"{row['removal']} {row['k'] or ''}".strip(), *(_cell(row[name]) for name in columns)) for row in rows
        ]
        print_wide_table(("taken out", *columns), cells)
    if options.what == WORDS:
        clean, attacked, nonsense = (layers[0]["rows"][0][name]["value"] for name in ("clean", "attacked", "nonsense"))
        if not attacked < nonsense:
            say(
                f"{options.model} does not read these words: nonsense in their place costs as much ({nonsense:.1%} "
                f"right, words {attacked:.1%}, nothing {clean:.1%}), so that there is nothing to defend."
            )
    say("In brackets: of the worst group.")


def _cell(figures: dict[str, Any]) -> str:
    worst = figures.get("worst")
    return f"{figures['value']:.1%}" + ("" if worst is None else f" ({worst['value']:.0%})")
