"""Tables and plots from benchmark JSON, of pytest-benchmark, bench_peers.py, profile_step.py, whole_run.py
and whole_harvest.py.

    python -m bench.report FILE.json [...]                       every result as a text table
    python -m bench.report FILE.json [...] --markdown T.md       the tables that docs/speed.md shows, below its marker
    python -m bench.report FILE.json [...] --plot P.png          the same as a picture (matplotlib, extra [peers])
    python -m bench.report FILE.json [...] --merge M.json        all of them in one file, which this reads as well

Ratios are medians over interleaved pairs.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from bench.goals import HEADER as goals_header
from bench.goals import goal_rows

HEADER = ["operation", "case", "dtype", "way", "median ms", "rate", "/ encoder GEMM", "beside others"]
RATES = ("GFLOP/s", "GB/s", "rows/s", "images/s")
STEP, BY_N = "training step", "score by number of images"
ENVIRONMENT = ("device", "driver", "cpu", "threads", "torch", "triton", "commit")
OURS, FLOOR = "saevlm-fast", "encoder GEMM"

MARKER = "<!-- bench/report.py writes what follows -->"

Result = dict  # one of pytest-benchmark's "benchmarks"
Run = dict  # what whole_run.py or whole_harvest.py writes


def seconds(result: Result) -> float:
    """Of the whole work, where only a part of it was run."""
    return result["extra_info"].get("seconds_of_all", result["stats"]["median"])


def table_row(result: Result) -> list[str]:
    """One benchmark as the cells of HEADER."""
    info = result["extra_info"]
    cells = [info["operation"], info["case"], info["dtype"], info["impl"]]
    if "failed" in info:
        return [*cells, "failed", "", "", info["failed"]]
    rate = next((f"{info[unit]:,.0f} {unit}" for unit in RATES if unit in info), "")
    floor = info.get("this_over_encoder_gemm")
    beside = [
        f"{name} {info[f'{name}_over_this']:,.2f}x"
        for name in ("dense", "double_loop", "block_loop")
        if f"{name}_over_this" in info
    ]
    if "this_over_ours" in info:
        beside.append(f"{info['this_over_ours']:.2f} of ours")
    return [*cells, f"{1e3 * seconds(result):,.2f}", rate, f"{floor:.2f}" if floor else "", ", ".join(beside)]


def print_table(path: Path, results: list[Result]) -> None:
    if not results:
        print(f"{path}: no results")
        return
    print(f"{path}: {environment(results)}")
    rows = [HEADER, *sorted(table_row(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


def environment(results: list[Result]) -> str:
    """Where the results come from; what differs between them is given as a range or a list."""
    infos = [result["extra_info"] for result in results]
    parts = []
    for key in ENVIRONMENT:
        values = dict.fromkeys(str(info[key]) for info in infos if key in info)
        if values:
            parts.append(f"{key} {' or '.join(values)}")
    loads = [info["load_average"] for info in infos if "load_average" in info]
    if loads:
        parts.append(f"load average {min(loads):.1f} to {max(loads):.1f}")
    stolen = [info["stolen_share"] for info in infos if "stolen_share" in info]
    if stolen:
        parts.append(f"{100 * min(stolen):.0f} to {100 * max(stolen):.0f} % of the CPUs' time stolen by the host")
    return ", ".join(parts)


def tables(results: list[Result], runs: list[Run]) -> list[str]:
    """In Markdown: a GPU's goals, training steps beside other libraries, a step by its kernels, the score against the
    number of images, whole runs, and what else was measured."""
    steps = [result for result in results if is_peer_step(result)]
    profiles = [result for result in results if "kernels" in result["extra_info"]]
    scores = [result for result in results if result["extra_info"]["operation"] == BY_N]
    others = [result for result in results if result not in steps and result not in scores]
    goals = goal_rows(results, runs)
    parts = [markdown_table(goals_header, goals)] if goals else []
    if steps:
        parts += [environment(steps) + ".", peer_table(steps), duties_list(steps)]
    if scores:
        parts += [environment(scores) + ".", score_table(scores)]
    trained, harvested = [run for run in runs if not is_harvest(run)], [run for run in runs if is_harvest(run)]
    parts += [run_table(trained)] if trained else []
    parts += [harvest_table(harvested)] if harvested else []
    parts += [kernel_table(profile) for profile in profiles]
    if others:
        parts += [environment(others) + ".", markdown_table(HEADER, sorted(table_row(result) for result in others))]
    return parts


def is_peer_step(result: Result) -> bool:
    return "duties" in result["extra_info"]


def peer_table(results: list[Result]) -> str:
    header = ["SAE", "d_sae", "batch", "library", "steps/s", "peak memory", "time of ours", "time of the encoder GEMM"]
    rows = []
    for result in sorted(results, key=step_order):
        info = result["extra_info"]
        cells = [info["operation"].removesuffix(" " + STEP), f"{info['shape']['d_sae']:,}", f"{info['shape']['B']:,}"]
        name = f"{info['impl']} {info.get('version', '')}".strip()
        if "failed" in info:
            rows.append([*cells, name, f"failed: {info['failed']}", "", "", ""])
            continue
        measured = [f"{1 / seconds(result):.3g}", f"{info['peak_bytes'] / 2**30:.2f} GiB"]
        measured += [f"{info['this_over_ours']:.2f}", f"{info['this_over_encoder_gemm']:.2f}"]
        rows.append([*cells, name, *measured])
    return markdown_table(header, rows)


def step_order(result: Result) -> tuple[str, int, float]:
    info = result["extra_info"]
    return info["operation"], info["shape"]["d_sae"], info.get("this_over_ours", float("inf"))


def duties_list(results: list[Result]) -> str:
    duties = {result["extra_info"]["impl"]: result["extra_info"]["duties"] for result in results}
    return "\n".join(f"- {name}: {text}." for name, text in duties.items())


def score_table(results: list[Result]) -> str:
    """Seconds and peak memory, a row for every number of images."""
    ways = list(dict.fromkeys(result["extra_info"]["impl"] for result in results))
    rows = []
    for n_images, row in sorted(by_images(results).items()):
        rows.append([f"{n_images:,}", *(score_cell(row[way]) if way in row else "" for way in ways)])
    return markdown_table(["images", *ways], rows)


def is_harvest(run: Run) -> bool:
    return "harvests" in run


def harvest_table(runs: list[Run]) -> str:
    """Whole harvests beside the forward alone, on batches that are ready in the device's memory."""
    header = ["tower", "dtype", "batch", "workers", "images/s", "forward alone", "share", "device", "commit"]
    rows = []
    for run in runs:
        settings = [run["settings"][name] for name in ("tower", "dtype", "batch_size")]
        alone = next(iter(run["forward"]["images_per_second"].values()))
        for one in run["harvests"]:
            rate = one["images_per_second"]["long run"]
            cells = [str(one["workers"]), f"{rate:,.0f}", f"{alone:,.0f}", f"{100 * rate / alone:.0f} %"]
            rows.append([*settings, *cells, run["device"], run["commit"]])
    return markdown_table(header, rows)


def kernel_table(profile: Result) -> str:
    """Where the time of one captured step goes, the longest kernels first."""
    info = profile["extra_info"]
    launches = sum(each["launches"] for each in info["kernels"])
    title = (
        f"{info['operation']}, {info['case']}: {1e3 * seconds(profile):.3f} ms a replay, of which "
        f"{info['kernels_us'] / 1e3:.3f} ms in {launches:.0f} kernels."
    )
    rows = [[each["kernel"], f"{each['us']:.1f}", f"{each['launches']:g}"] for each in info["kernels"]]
    return title + "\n\n" + markdown_table(["kernel", "us", "launches"], rows)


def by_images(results: Iterable[Result]) -> dict[int, dict[str, Result]]:
    """Number of images -> way -> result."""
    table: dict[int, dict[str, Result]] = {}
    for result in results:
        info = result["extra_info"]
        table.setdefault(info["shape"]["N"], {})[info["impl"]] = result
    return table


def score_cell(result: Result) -> str:
    info = result["extra_info"]
    if "seconds_of_all" in info:
        return f"{float(f'{seconds(result):.2g}'):,.0f} s (extrapolated)"
    return f"{seconds(result):.3g} s, {info['peak_bytes'] / 2**30:.2f} GiB"


RUN_SETTINGS = ("architecture", "d_in", "d_sae", "batch_size", "steps")
RUN_HEADER = (
    "SAE,d_in,d_sae,batch,steps,data on,page cache,dead at the end,loop,steps/s,eager,step,data,checkpoints,logs,"
    "step / whole run,memory,"
    "load average,device,commit"
).split(",")


def run_table(runs: list[Run]) -> str:
    """Whole runs: shares of the training loop, the step's of all with start, export and evaluation, and memory that is
    not page cache."""
    return markdown_table(RUN_HEADER, [run_row(run) for run in runs])


def run_row(run: Run) -> list[str]:
    settings, spent = run["settings"], run["seconds"]
    loop, steps = spent["loop"], int(settings["steps"])
    shares = [spent["step"], spent["data"], spent["checkpoint"], spent["log"] + spent["metrics"]]
    memory = [round(n_bytes / 2**20) for n_bytes in run["anonymous_bytes_at_step"].values()]
    cache = "the whole file"
    if settings["page_cache"] != "None":
        cache = f"{int(settings['page_cache']) >> 20} of {run['file_bytes'] >> 20} MiB"
    eager = f"{100 * run['eager_share']:.1f} %" if "eager_share" in run else ""
    dead = list(run.get("dead_latents", {}).values())
    return [
        *(settings[name] for name in RUN_SETTINGS),
        *(settings.get("data_on", ""), cache, f"{dead[-1]:,.0f}" if dead else ""),
        *(f"{loop:,.0f} s", f"{steps / loop:,.1f}", eager),
        *(f"{100 * share / loop:.1f} %" for share in shares),
        *(f"{100 * run['step_share_of_run']:.1f} %", f"{min(memory)} to {max(memory)} MiB"),
        *(f"{run['load_average']:.1f}", run["device"], run.get("commit", "unknown")),
    ]


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def plot(results: list[Result], path: Path) -> None:
    """Steps per second of every library by architecture and size, and seconds of the score by number of images."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    steps = [result for result in results if is_peer_step(result) and result["stats"]]
    scores = [result for result in results if result["extra_info"]["operation"] == BY_N]
    peers = sorted({result["extra_info"]["impl"] for result in steps} - {OURS, FLOOR})
    colours = {OURS: "black", FLOOR: "lightgrey"} | {peer: f"C{i}" for i, peer in enumerate(peers)}
    panels: list[Callable[[Any], None]] = [
        partial(draw_bars, results=some, colours=colours) for some in by_d_sae(steps)
    ]
    panels += [partial(draw_lines, results=scores)] if scores else []
    if not panels:
        raise ValueError("files: no training steps beside other libraries and no score by number of images to draw")
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for panel, axis in zip(panels, axes.flat):
        panel(axis)
    origins = [f"{name}: {environment(of)}" for name, of in (("steps", steps), ("score", scores)) if of]
    figure.suptitle("\n".join(origins), fontsize=9)
    if steps:
        patches = [plt.Rectangle((0, 0), 1, 1, color=colour, label=way) for way, colour in colours.items()]
        figure.legend(handles=patches, ncols=len(patches), loc="outside lower center", fontsize=9)
    figure.savefig(path, dpi=150)


def by_d_sae(results: list[Result]) -> list[list[Result]]:
    sizes = sorted({result["extra_info"]["shape"]["d_sae"] for result in results})
    return [[result for result in results if result["extra_info"]["shape"]["d_sae"] == size] for size in sizes]


def draw_bars(axis, results: list[Result], colours: dict[str, str]) -> None:
    """One d_sae: bars for every architecture, a colour for every library."""
    groups = sorted({result["extra_info"]["operation"] for result in results})
    for place, group in enumerate(groups):
        bars = sorted((r for r in results if r["extra_info"]["operation"] == group), key=seconds)
        for i, result in enumerate(bars):
            rate, x = 1 / seconds(result), place + 0.8 * (i + 0.5) / len(bars) - 0.4
            axis.bar(x, rate, 0.8 / len(bars), color=colours[result["extra_info"]["impl"]])
            axis.annotate(f"{rate:.2g}", (x, rate), ha="center", va="bottom", fontsize=7)
    shape = results[0]["extra_info"]["shape"]
    axis.set(title=f"Training step, {shape['d_sae']:,} latents, batch {shape['B']:,}", ylabel="steps per second")
    axis.set_xticks(range(len(groups)), [group.removesuffix(" " + STEP) for group in groups])


def draw_lines(axis, results: list[Result]) -> None:
    """A line for every way, on logarithmic axes; the streamed one is thick, what was not run to its end is dashed."""
    for way in dict.fromkeys(result["extra_info"]["impl"] for result in results):
        of_way = [result for result in results if result["extra_info"]["impl"] == way]
        points = sorted((result["extra_info"]["shape"]["N"], seconds(result)) for result in of_way)
        if any("seconds_of_all" in result["extra_info"] for result in of_way):
            style: dict[str, Any] = {"label": f"{way} (extrapolated)", "linestyle": "--", "markerfacecolor": "none"}
        else:
            style = {"label": way, "linewidth": 3 if way == "streamed" else 1}
        axis.plot(*zip(*points), marker="o", **style)
    axis.set(title="Monosemanticity Score", xlabel="images", ylabel="seconds", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def read(path: Path) -> tuple[list[Result], list[Run]]:
    """Its results and whole runs, or itself if it is a run. ValueError: not as today's benches write them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    try:
        if "step_share_of_loop" in content or is_harvest(content):
            tables([], [content])
            return [], [content]
        for result in content["benchmarks"]:
            table_row(result)
        runs = content.get("runs", [])
        tables(content["benchmarks"], runs)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a result of this project's benches: no {error}") from None
    return content["benchmarks"], runs


def write_markdown(path: Path, parts: list[str]) -> None:
    """The tables; below the marker, if the file is there and has one. ValueError: there are none."""
    if not parts:
        raise ValueError("files: no steps beside other libraries, no score by number of images, no whole run to show")
    above = path.read_text(encoding="utf-8") if path.exists() else ""
    above = above.partition(MARKER)[0] + MARKER + "\n\n" if MARKER in above else ""
    path.write_text(above + "\n\n".join(parts) + "\n", encoding="utf-8")


def report(options: argparse.Namespace) -> None:
    by_file = {path: read(path) for path in options.files}
    results = [result for of_file, _ in by_file.values() for result in of_file]
    runs = [run for _, of_file in by_file.values() for run in of_file]
    if options.merge:
        options.merge.write_text(json.dumps({"benchmarks": results, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        write_markdown(options.markdown, tables(results, runs))
    if options.plot:
        plot(results, options.plot)
    if not (options.markdown or options.plot or options.merge):
        for path, (of_file, _) in by_file.items():
            print_table(path, of_file)
        print("\n\n".join(tables([], runs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--markdown", type=Path, help="write tables there instead of printing")
    parser.add_argument("--merge", type=Path, help="write everything into one JSON file")
    parser.add_argument("--plot", type=Path, help="draw a picture: .png, .svg or .pdf")
    try:
        report(parser.parse_args())
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"--plot: {error}; pip install 'saevlm-fast[peers]' brings it")


if __name__ == "__main__":
    main()
