"""saevlm-fast name: the nearest words of every latent, by the text tower of the embeddings' own model."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.looking import LookArguments, Looked, timed
from saevlm_fast.cli.options import Plan, command
from saevlm_fast.cli.planning import check_writable, disk_figures, memory_figures
from saevlm_fast.cli.record import Record, settings_path
from saevlm_fast.cli.terminal import Bar, print_table, say, tell, warn
from saevlm_fast.settings import setting

if TYPE_CHECKING:
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.look.names import Named

_SHOWN = 10  # lines of the table on the screen


@dataclass(frozen=True, kw_only=True)
class NameArguments(LookArguments):
    """Options of `saevlm-fast name`."""

    title = "Names"
    embeddings: Path = setting(
        help="Image embeddings of the text model's CLIP, row i of image i: store or file.", remote=True
    )
    text_model: str = setting(help="hf:NAME_OR_DIR or open_clip:ARCH/PRETRAINED_OR_FILE.", place="model")
    output: Path = setting(help="Names: FILE.parquet, FILE.csv or FILE.json.")
    words: Path | None = setting(None, help="Vocabulary, one word a line.", shown="1,479 concrete words, built in")
    template: str = setting("a photo of {}", help="What the text model is told of a word.")
    n: int = setting(5, help="Words of each latent.", at_least=1)
    seed: int = setting(0, help="Of the control.", at_least=0)


def check(options: NameArguments) -> None:
    """ValueError: the output may not be written, or is there."""
    from saevlm_fast.outputs import check_absent
    from saevlm_fast.scoring.tables import check_scores_path

    check_writable(options.output)
    check_scores_path(options.output)
    check_absent([options.output, settings_path(options.output)], options.force)


def _opened(options: NameArguments) -> "tuple[Looked, Activations]":
    from saevlm_fast.data.rows import open_activations
    from saevlm_fast.provenance import other_text_model

    embeddings = open_activations(options.embeddings)
    if (doubt := other_text_model(embeddings, options.text_model)) is not None:
        warn(f"{doubt}; names across two models mean little")
    return Looked.of(options), embeddings


def plan(options: NameArguments) -> Plan:
    """What would be named; the time from the second batch of rows."""
    from saevlm_fast.look.names import N_CONTROL, point, vocabulary

    check(options)
    looked, embeddings = _opened(options)
    words = vocabulary(options.words, options.template)
    d_sae, n = looked.sae.config.d_sae, looked.rows.n_rows
    run = lambda on: point(  # noqa: E731
        looked.rows, looked.encoder, embeddings, options.pool, batch_rows=options.batch_size, on_images=on
    )
    sums = 8 * (d_sae + min(d_sae, N_CONTROL)) * embeddings.d
    return Plan(
        f"{options.n} of {len(words.words):,} words for each of {d_sae:,} latents of {options.sae}",
        {
            "rows": n,
            "latents": d_sae,
            "words": len(words.words),
            **memory_figures(looked.sae.b_dec.device, sums),
            **disk_figures(options.output, d_sae * (48 + 24 * options.n)),
            "time_seconds": timed(run, embeddings.n_rows),
        },
    )


@command("name", plan=plan)
def name(options: NameArguments) -> dict[str, Any]:
    """The nearest words of every latent in the images' own CLIP, held against the names of random directions."""
    from saevlm_fast.outputs import output_lock

    with output_lock(options.output, directory=False):
        check(options)
        return _name(options)


def _name(options: NameArguments) -> dict[str, Any]:
    from saevlm_fast.look.names import known_words, name_latents, point, vocabulary
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.scoring.tables import write_table
    from saevlm_fast.towers.text import load_text_encoder

    words = vocabulary(options.words, options.template)
    looked, embeddings = _opened(options)
    encoder = load_text_encoder(options.text_model, resolve_device(options.device), on_message=tell)
    words, n_unknown = known_words(words, encoder)
    if n_unknown:
        tell(f"words: {n_unknown:,} left out that {options.text_model} does not know; {len(words.words):,} are left")
    with Bar("name", embeddings.n_rows, "images") as bar:
        pointed = point(
            looked.rows,
            looked.encoder,
            embeddings,
            options.pool,
            batch_rows=options.batch_size,
            seed=options.seed,
            on_images=bar.update,
        )
    named = name_latents(pointed, encoder, words, options.n)
    metadata = {
        "sae": str(options.sae),
        "text_model": options.text_model,
        "words": str(options.words or "built in"),
        "template": options.template,
        "control_floor": repr(named.floor),
    }
    write_table(named.table(options.n).replace_schema_metadata(metadata), options.output)
    Record("name", options, options.output, words=len(words.words), images=embeddings.n_rows).write()
    return _told(options, named)


def _told(options: NameArguments, named: "Named") -> dict[str, Any]:
    import numpy as np

    from saevlm_fast.look.names import CHANCE

    own = [latent for latent in range(len(named.names)) if named.own(latent) is not None]
    silent = sum(not each for each in named.names)
    best = sorted(own, key=lambda latent: -named.names[latent][0].score)[:_SHOWN]
    rows = [
        (", ".join(word.word for word in named.names[latent][: options.n]), str(latent), _number(named, latent))
        for latent in best
    ]
    print_table(("nearest words", "latent", "score"), rows, plain=True)
    scores = np.array([name.score for name in named.control])
    control = float(np.median(scores)) if len(scores) else float("nan")
    say(
        f"{len(own):,} of {len(named.names):,} latents have a name of their own; {silent:,} have no direction at all.",
        f"Control: {len(scores):,} directions of the same activations on other images; their best words score "
        f"{control:.3f} (median). Words that score below {named.floor:.3f} are no name: one control in "
        f"{1 / CHANCE:.0f} scores above it.",
        f"wrote {options.output}",
    )
    return {
        "output": str(options.output),
        "latents": len(named.names),
        "named": len(own),
        "without_direction": silent,
        "control": {"directions": len(scores), "median": control, "floor": named.floor},
        "best": [{"latent": latent, "words": [word.word for word in named.names[latent]]} for latent in best],
    }


def _number(named: "Named", latent: int) -> str:
    return f"{named.names[latent][0].score:.3f}"
