"""saevlm-fast train with several SAEs: comma lists and [[sweep]] tables, in one pass over the data.

OUTPUT/NAME/...        each SAE's run, as if it were trained alone; NAME is what differs (sweep.py)
OUTPUT/grid.json       the summary: of every SAE its settings and what was measured; grid.parquet the same table
OUTPUT/grid.svg        explained variance against L0; MS against both, where embeddings are given
OUTPUT/settings.toml   the command's settings
"""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saevlm_fast.cli.options import Plan
from saevlm_fast.cli.planning import check_writable, disk_figures, memory_figures, time_of_all
from saevlm_fast.cli.ranks import leads, n_processes, part_of_a_rank, ranks_options
from saevlm_fast.cli.record import SETTINGS_FILE, Record, interrupted_run
from saevlm_fast.cli.scenes import scenes
from saevlm_fast.cli.sweep import named
from saevlm_fast.cli.terminal import TrainBar, print_wide_table, say, tell
from saevlm_fast.cli.train_looks import StoreLooks
from saevlm_fast.errors import Interrupted, doubt, require
from saevlm_fast.training.memory import Written, most_memory_of, training_disk

if TYPE_CHECKING:
    import torch

    from saevlm_fast.cli.train_options import Run, TrainArguments
    from saevlm_fast.data.rows import Activations
    from saevlm_fast.training.many import Trained
    from saevlm_fast.training.process_group import MeshPeers

TABLES = TABLE_FILE, PARQUET_FILE, PICTURE_FILE = "grid.json", "grid.parquet", "grid.svg"


def runs_of(options: "TrainArguments", n_rows: int, d: int, path: Path) -> "dict[str, Run]":
    """What is trained, by name, on activations [n_rows, d]. ValueError: settings that do not fit the width."""
    from saevlm_fast.cli.train_options import Run

    found = {}
    for (name, member), table in zip(options.members().items(), options.sweep):
        with named(name, table):
            found[name] = Run.of(member, n_rows, d, path)
    return found


def check_outputs(options: "TrainArguments") -> None:
    """ValueError: something is there, and nothing says that it may be replaced or gone on with."""
    from saevlm_fast.outputs import check_absent
    from saevlm_fast.training.checkpoints import RUN_FILE, RunDirectory

    alone = (options.output / RUN_FILE).exists()
    require(not alone, f"output: {options.output} holds a run of one SAE; name another directory for several")
    used = [
        RunDirectory(member.output, member.checkpoint_every, member.resume, member.force).used()
        for member in options.members().values()
    ]
    members = {member.output.name for member in options.members().values()}
    runs = [path.parent.name for path in sorted(options.output.glob(f"*/{RUN_FILE}"))]
    if others := [name for name in runs if name not in members]:
        doubt(f"output: {options.output} also holds {', '.join(others)}, of other calls: the summary leaves them out")
    if not any(used) and not options.resume:
        files = (SETTINGS_FILE, *TABLES)
        check_absent([options.output / file for file in files], options.force)


def memory_of(runs: "Mapping[str, Run]", device: "torch.device", n_replicas: int = 1) -> dict[str, int]:
    """Bytes that each takes at most, by arithmetic, or a rank's part of it under torchrun; together they take the
    sum."""
    parts, n_ranks = {name: part_of_a_rank(run.sae, n_replicas) for name, run in runs.items()}, n_processes()
    return {name: most_memory_of(parts[name], run.config, run.n_rows, device, n_ranks) for name, run in runs.items()}


def plan_many(options: "TrainArguments", runs: "Mapping[str, Run]") -> Plan:
    """The SAEs with their memory, and the time of all their steps, one after the other."""
    from saevlm_fast.files import human_bytes
    from saevlm_fast.outputs import workplace
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.checkpoints import latest_checkpoint

    device = resolve_device(options.device)
    needed = memory_of(runs, device, options.data_parallel)
    check_writable(options.output)
    check_outputs(options)
    first, members = next(iter(runs.values())), options.members()
    newest = [latest_checkpoint(workplace(member.output)) for member in members.values() if options.resume]
    parts = [part_of_a_rank(run.sae, options.data_parallel) for run in runs.values()]
    figures = {
        "rows": first.n_rows,
        "steps": first.config.n_steps,
        "epochs": first.config.n_steps * first.batch_size / first.n_rows,
        "d_in": first.sae.d_in,
        "saes": [f"{name}: d_sae {run.sae.d_sae:,}, {human_bytes(needed[name])}" for name, run in runs.items()],
        "resumes_at": [checkpoint.name if checkpoint else "step 0" for checkpoint in newest] or None,
        **memory_figures(device, sum(needed.values())),
        **disk_figures(
            options.output,
            training_disk(*(run.sae for run in runs.values()), written=Written.by(device, n_processes())),
        ),
        **time_of_all(((part, run.config, run.n_rows) for part, run in zip(parts, runs.values())), device),
    }
    return Plan(sentence_of(runs), figures)


def sentence_of(runs: "Mapping[str, Run]") -> str:
    """For people."""
    first = next(iter(runs.values()))
    return (
        f"{len(runs)} SAEs of {first.sae.d_in} in one pass, on {first.n_rows:,} rows; {first.config.n_steps:,} steps "
        f"of {first.batch_size:,}, {first.path}: {', '.join(runs)}"
    )


def train_grid(
    options: "TrainArguments",
    data: "Activations",
    held_out: "Activations | None",
    runs: "Mapping[str, Run]",
    peers: "MeshPeers | None" = None,
) -> dict[str, Any] | None:
    """Trains them, and writes the summary, of ranks the first. The output is locked."""
    from saevlm_fast.files import human_bytes
    from saevlm_fast.runtime import resolve_device
    from saevlm_fast.training.many import nothing_more

    first, looks = leads(peers), None
    if first:
        check_outputs(options)
        looks = StoreLooks(options, held_out or data, _embeddings(options))
    ranks, whose = ("", "all together") if peers is None else (f"{peers.world} ranks: ", "a rank's parts of all")
    needed = sum(memory_of(runs, resolve_device(options.device), options.data_parallel).values())
    say(ranks + sentence_of(runs), f"memory: {human_bytes(needed)} of {whose}")
    records = _records(options, data) if first else []
    steps = next(iter(runs.values())).config.n_steps
    with TrainBar(steps) as bar, closing(_Log(bar, next(iter(runs)))) as log:

        def on_step(step: int) -> None:
            for record in records:
                record.write()
            bar.on_step(step)

        told: dict[str, Any] = {"validation": held_out, "on_log": log.on_log, "on_step": on_step, "on_note": tell}
        told["on_evaluated"] = bar.on_evaluated
        try:
            trained = _trained(options, data, runs, peers, on_finished=looks or nothing_more, **told)
        except Interrupted as error:
            raise interrupted_run(error, options.output, records, options.force, peers is not None) from None
    for record in records:
        record.write()
    if looks is None:
        return None
    read = held_out or data
    return summarise(options.output, trained, "validation" if held_out else "training", looks.note, read.n_rows)


def _records(options: "TrainArguments", data: "Activations") -> list[Record]:
    """Of each SAE's directory, and of all."""
    alone = [Record("train", member, member.output) for member in options.members().values()]
    return [*alone, Record("train", options, options.output, rows=data.n_rows, d_in=data.d)]


def _trained(
    options: "TrainArguments",
    data: "Activations",
    runs: "Mapping[str, Run]",
    peers: "MeshPeers | None",
    **told: Any,
) -> "dict[str, Trained]":
    """The training itself, by one process or by ranks."""
    from saevlm_fast.config import RunOptions
    from saevlm_fast.training.many import train_many
    from saevlm_fast.training.sharded_many import train_many_shared

    saes = {name: run.sae for name, run in runs.items()}
    recipes, where = {name: run.config for name, run in runs.items()}, options.part(RunOptions)
    if peers is None:
        return train_many(data, saes, recipes, where, **told)
    return train_many_shared(peers, data, saes, recipes, ranks_options(where, peers), **told)


class _Log:
    """The bar speaks of the first SAE, whose metrics are logged first."""

    def __init__(self, bar: TrainBar, first: str):
        self.bar, self.first = bar, first

    def on_log(self, name: str, step: int, metrics: dict[str, float]) -> None:
        """Called after every logged step of every SAE."""
        if name == self.first and step < (self.bar.total or 0):
            self.bar.on_log(step, metrics)

    def close(self) -> None:
        """When all steps are done, or none will be."""
        self.bar.close()


def _embeddings(options: "TrainArguments") -> "Activations | None":
    """Those that are named; of the box's scenes those of the box."""
    from saevlm_fast.data.rows import open_activations

    named = options.embeddings
    if named is None and options.activations is None and options.validation is None:
        named = scenes("test", device=options.device).embeddings
    return None if named is None else open_activations(named)


def evaluated_on(rows: float, kind: str, of: int | None) -> str:
    """Says whether the rows that were evaluated are a sample. kind: theirs. of: how many there are, if known."""
    if of is None or rows == of:
        return f"evaluation on {'' if of is None else 'all '}{rows:,} {kind} rows"
    return f"evaluation on {rows:,} {kind} rows, evenly spread over {of:,}"


def summarise(
    output: Path, trained: "Mapping[str, Trained]", kind: str, note: str, n_rows: int | None = None
) -> dict[str, Any]:
    """Table, files and picture; what --json prints.

    kind: of the rows that were evaluated. note: of MS. n_rows: of which these are some or all, if that is known.
    """
    from saevlm_fast.cli.grid_picture import write_picture
    from saevlm_fast.files import write_json_atomic

    rows = []
    scored = any("ms_mean" in each.metrics for each in trained.values())
    for name, each in trained.items():
        sae, metrics = each.sae.config, dict(each.metrics)
        metrics.pop("rows")
        row = {"name": name, "architecture": sae.architecture, "d_sae": sae.d_sae, "k": sae.k, **metrics}
        rows.append(row | ({"ms_mean": metrics.get("ms_mean")} if scored else {}))
    n_read = next(iter(trained.values())).metrics["rows"]
    say(evaluated_on(n_read, kind, n_rows))
    print_wide_table(tuple(rows[0]), [[_cell(value) for value in row.values()] for row in rows])
    write_json_atomic(output / TABLE_FILE, {"rows": n_read, "of": kind, "saes": rows, "note": note})
    _write_parquet(output / PARQUET_FILE, rows)
    write_picture(output / PICTURE_FILE, rows, note)
    say(note, f"wrote {output}")
    return {"output": str(output), "evaluation": {"rows": n_read, "of": kind}, "saes": rows}


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from saevlm_fast.files import atomic_write

    with atomic_write(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
