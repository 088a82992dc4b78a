"""The page: its data as chunks, its few scripts, and one HTML file that loads them (or holds them all).

index.html                 the page: opens from file://, asks for nothing beyond this folder
app/*.js, app/*.css        its scripts and style
data/index.js              SAEs, measures, names: what the list of latents needs
data/sN/chunk-NNNN.js      256 latents of SAE N: images, bands, heat maps, histogram, words, classes, neighbours
data/tiles-NNNN.js         ids, labels, sizes and regions of 1,024 images
sprites/sheet-NNNNN.webp   thumbnails of 64 images
"""

import base64
import hashlib
import json
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saevlm_fast import __version__
from saevlm_fast.files import atomic_write
from saevlm_fast.look.chunks import floats, heat_text, script, short, shorts
from saevlm_fast.look.looked import Looked
from saevlm_fast.look.measured import Measure
from saevlm_fast.look.sprites import SIDE, TILES, Tiles, sheet_name
from saevlm_fast.look.stats import BINS_PER_OCTAVE, LOWEST_OCTAVE, N_BANDS
from saevlm_fast.records import object_of
from saevlm_fast.sae import SparseAutoencoder
from saevlm_fast.scoring.geometry import PatchGrid

CHUNK, TILES_A_CHUNK = 256, 1024
ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("data.js", "charts.js", "pictures.js", "table.js", "latent.js", "overview.js", "blind.js", "main.js")
STYLE = "page.css"
_N_CLASSES = 8


class Panel(NamedTuple):
    """An SAE as a page has it: what was looked at, its measures, names and words, tiles of its images.

    texts: of a table, by column and latent. steered: results of steering, by latent. tile_of_N: -1 for none.
    """

    looked: Looked
    measures: list[Measure]
    own_names: list[str | None]
    words: list[list[list[Any]]]
    texts: dict[str, dict[int, str]]
    steered: dict[int, dict[str, Any]]
    tile_of_N: np.ndarray

    def tile_of(self, image: int) -> int:
        """Of an image that is shown."""
        return int(self.tile_of_N[image])


def index_of(title: str, panels: list[Panel], tiles: Tiles, side: int, notes: dict[str, Any]) -> dict[str, Any]:
    """JSON of data/index.js."""
    missing = sum(size == (0, 0) for size in tiles.sizes)
    return {
        "title": title,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": __version__,
        "chunk": CHUNK,
        "tilesAChunk": TILES_A_CHUNK,
        "bins": {"octave": BINS_PER_OCTAVE, "lowest": LOWEST_OCTAVE},
        "images": {"shown": len(tiles), "missing": missing, "side": side, "across": SIDE, "aSheet": TILES, **notes},
        "saes": [_sae(panel) for panel in panels],
    }


def _sae(panel: Panel) -> dict[str, Any]:
    looked, subject = panel.looked, panel.looked.subject
    config, classes, grid = subject.sae.config, panel.looked.classes, panel.looked.grid
    best = None
    if looked.stats.classes_SC is not None:
        sums_SC = looked.stats.classes_SC
        best = [int(c) if fires else -1 for c, fires in zip(sums_SC.argmax(1).tolist(), sums_SC.any(1).tolist())]
    return {
        "name": subject.name,
        "path": subject.path,
        "rows": str(subject.rows.path),
        "nRows": subject.rows.n_rows,
        "nImages": looked.stats.n_images,
        "dIn": config.d_in,
        "dSae": config.d_sae,
        "architecture": config.architecture,
        "groups": list(config.group_sizes),
        "recipe": recipe_of(config),
        "steer": None if subject.is_made else steer_command(subject.path, config.metadata),
        "measures": [_column(measure) for measure in panel.measures],
        "names": panel.own_names if any(panel.own_names) else None,
        "words": [", ".join(word for word, _ in words) for words in panel.words] if any(panel.words) else None,
        "classes": None
        if classes is None
        else {"names": classes.names, "shares": shorts(classes.share_C), "best": best},
        "grid": [grid.rows, grid.columns] if isinstance(grid, PatchGrid) else None,
        "heatMax": None if looked.heat is None else floats(looked.row_max_S.numpy()),
        "noGrid": None if isinstance(grid, PatchGrid) else grid,
        "togetherImages": looked.firing.counted,
        "near": None
        if looked.near is None
        else {
            "images": looked.near.n_images,
            "rows": looked.near.n_rows,
            "explained": shorts(looked.near.explained),
        },
        "threshold": _threshold(subject.sae),
        "pooled": subject.table.rows_per_image > 1,
    }


def _threshold(sae: SparseAutoencoder) -> list[float | None] | None:
    """What an activation must exceed: one number, or one a latent; None where there is none."""
    if sae.config.architecture in ("topk", "relu"):
        return None
    return shorts(sae.threshold.detach().float().cpu().reshape(-1).tolist())


def _column(measure: Measure) -> dict[str, str]:
    return {"key": measure.key, "label": measure.label, "help": measure.help, "values": floats(measure.values)}


def recipe_of(config: Any) -> list[list[str]]:
    """Rows of name and value: what the SAE is, and what its metadata say of data and training."""
    rows = [["architecture", str(config.architecture)], ["d_in", str(config.d_in)], ["d_sae", str(config.d_sae)]]
    if config.k is not None:
        rows.append(["k", str(config.k)])
    if len(config.group_sizes) > 1:
        rows.append(["groups", ", ".join(map(str, config.group_sizes))])
    return [*rows, *_flat("", config.metadata)][:80]


def _flat(prefix: str, value: Any) -> Iterator[list[str]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), each)
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        yield [prefix, text if len(text) <= 300 else f"{text[:297]}..."]


def steer_command(path: str, metadata: dict[str, Any]) -> str:
    """With LATENT and ALPHA where a page writes the latent and its largest activation."""
    source = object_of(metadata.get("source"))
    tower = object_of(source.get("model")).get("spec")
    language_model = "hf:tiny-llava" if tower in ("hf:tiny-clip", "hf:tiny-llava") else "hf:LLAVA"  # the box has both
    layer = source.get("layer")
    where = "LAYER" if layer is None else str(layer)
    return (
        f"saevlm-fast steer --model {language_model} --sae {shlex.quote(path)} --layer {where} --image IMAGE.jpg "
        "--prompt 'What is shown in this image?' --latent LATENT --alpha ALPHA"
    )


def chunk_of(panel: Panel, start: int) -> list[dict[str, Any]]:
    """JSON of the latents start .. start + CHUNK - 1."""
    return [_latent(panel, latent) for latent in range(start, min(start + CHUNK, panel.looked.size))]


def _latent(panel: Panel, latent: int) -> dict[str, Any]:
    looked, stats = panel.looked, panel.looked.stats
    misses = [[panel.tile_of(i), short(value)] for i, value in zip(*looked.missed(latent))]
    found: dict[str, Any] = {"d": _beside(looked.decoder, latent), "m": misses}
    if int(stats.n_active_S[latent]) == 0:
        return found
    counts = stats.band_counts[latent].tolist()
    found |= {"t": _pictures(panel, looked.shown.tops(latent)), "s": [panel.tile_of(i) for i in stats.silent[latent]]}
    found["b"] = [[counts[band], _pictures(panel, looked.shown.band(latent, band))] for band in range(N_BANDS)]
    bins = stats.bins_SB[latent].numpy()
    filled = np.flatnonzero(bins)
    found["g"] = [int(filled[0]), bins[filled[0] : filled[-1] + 1].tolist()]
    found["f"] = _beside(looked.firing.together, latent)
    found["p"], found["k"] = _beside(looked.firing.parents, latent), _beside(looked.firing.children, latent)
    if (nearest := int(looked.sets.nearest_S[latent])) >= 0:
        found["u"] = nearest
    if latent in panel.steered:
        found["z"] = panel.steered[latent]
    if texts := [[name, of[latent]] for name, of in panel.texts.items() if latent in of]:
        found["n"] = texts
    if panel.words[latent]:
        found["w"] = panel.words[latent]
    if stats.classes_SC is not None:
        sums_C = stats.classes_SC[latent].numpy()
        best = np.argsort(-sums_C, kind="stable")[:_N_CLASSES]
        total = float(sums_C.sum())
        found["c"] = [[int(c), short(float(sums_C[c]) / total)] for c in best if sums_C[c] > 0]
    return found


def _beside(neighbours: Any, latent: int) -> list[list[Any]]:
    pairs = zip(neighbours.latents[latent].tolist(), neighbours.values[latent].tolist())
    return [[other, short(value)] for other, value in pairs if other >= 0]


def _pictures(panel: Panel, pairs: np.ndarray) -> list[list[Any]]:
    """[tile, activation, heat map] of each."""
    looked, found = panel.looked, []
    for w in pairs.tolist():
        picture: list[Any] = [panel.tile_of(int(looked.shown.images_W[w])), short(float(looked.shown.acts_W[w]))]
        if looked.heat is not None:
            picture.append(heat_text(*looked.heat.of(w)))
        found.append(picture)
    return found


def tiles_chunk(tiles: Tiles, start: int) -> list[list[Any]]:
    """JSON: [id, label, width, height, region] of each tile; a region that is the whole picture is left out."""
    found: list[list[Any]] = []
    for tile in range(start, min(start + TILES_A_CHUNK, len(tiles))):
        width, height = tiles.sizes[tile]
        row: list[Any] = [tiles.names[tile], tiles.labels[tile], width, height]
        if tiles.regions[tile] != (0.0, 0.0, 1.0, 1.0):
            row.append([round(each, 4) for each in tiles.regions[tile]])
        found.append(row)
    return found


def data_scripts(index: dict[str, Any], panels: list[Panel], tiles: Tiles) -> Iterator[tuple[str, str]]:
    """(path below data/, text) of every script of data."""
    yield "index.js", script("index", index)
    for start in range(0, len(tiles), TILES_A_CHUNK):
        number = start // TILES_A_CHUNK
        yield f"tiles-{number:04d}.js", script(f"tiles/{number}", tiles_chunk(tiles, start))
    for i, panel in enumerate(panels):
        for start in range(0, panel.looked.size, CHUNK):
            number = start // CHUNK
            yield f"s{i}/chunk-{number:04d}.js", script(f"s{i}/chunk/{number}", chunk_of(panel, start))


def write_folder(place: Path, title: str, scripts: Iterator[tuple[str, str]]) -> None:
    """index.html, app/ and data/ of a report in a folder."""
    (place / "app").mkdir(parents=True, exist_ok=True)
    for name in (*SCRIPTS, STYLE):
        _write(place / "app" / name, (ASSETS / name).read_text(encoding="utf-8"))
    for name, text in scripts:
        (place / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        _write(place / "data" / name, text)
    links = {
        "styles": [f"app/{STYLE}"],
        "scripts": ["app/data.js", "data/index.js", *(f"app/{n}" for n in SCRIPTS[1:])],
    }
    policy = "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src 'self' file: data:"
    _write(place / "index.html", _html(title, policy, links, {"styles": [], "scripts": []}))


def one_file(title: str, scripts: Iterator[tuple[str, str]], sprites: Path, tiles: Tiles) -> Iterator[str]:
    """The pieces of one HTML file with everything in it; the policy allows these scripts alone, by their hashes."""
    texts = [(ASSETS / "data.js").read_text(encoding="utf-8")]
    texts += [text for _, text in scripts]
    for sheet in range(tiles.n_sheets):
        file = sprites / sheet_name(sheet)
        if file.exists():
            data = base64.b64encode(file.read_bytes()).decode("ascii")
            texts.append(script(f"sheet/{sheet}", f"data:image/webp;base64,{data}"))
    texts += [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS[1:]]
    style = (ASSETS / STYLE).read_text(encoding="utf-8")
    hashes = " ".join(_hash(text) for text in texts)
    policy = f"default-src 'none'; script-src {hashes}; style-src {_hash(style)}; img-src data:"
    yield _html(title, policy, {"styles": [], "scripts": []}, {"styles": [style], "scripts": texts})


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"


def _html(title: str, policy: str, links: dict[str, Any], inline: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True)
    whole = {name: [Markup(text) for text in texts] for name, texts in inline.items()}  # ours, and chunks.script's
    policy += "; base-uri 'none'; form-action 'none'"
    return environment.get_template("page.html.jinja").render(
        title=title, policy=Markup(policy), links=links, inline=whole
    )


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
