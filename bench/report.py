"""A table from benchmark JSON: `python bench/report.py FILE.json [...]`. Ratios are medians over interleaved pairs."""

import json
import sys

HEADER = ["operation", "case", "dtype", "way", "median ms", "rate", "/ encoder GEMM", "speed-up over"]
RATES = ("GFLOP/s", "GB/s", "rows/s", "images/s")


def table_row(result: dict) -> list[str]:
    """One benchmark as the cells of HEADER."""
    info = result["extra_info"]
    rate = next((f"{info[unit]:,.0f} {unit}" for unit in RATES if unit in info), "")
    floor = info.get("this_over_encoder_gemm")
    others = [name for name in ("dense", "double_loop") if f"{name}_over_this" in info]
    return [
        info["operation"],
        info["case"],
        info["dtype"],
        info["impl"],
        f"{1e3 * result['stats']['median']:,.2f}",
        rate,
        f"{floor:.2f}" if floor else "",
        ", ".join(f"{name} {info[f'{name}_over_this']:,.2f}x" for name in others),
    ]


def print_table(path: str) -> None:
    with open(path) as file:
        results = json.load(file)["benchmarks"]
    if not results:
        print(f"{path}: no results")
        return
    first = results[0]["extra_info"]
    print(f"{path}: " + ", ".join(f"{key} {first[key]}" for key in ("device", "threads", "torch", "triton")))
    rows = [HEADER, *sorted(table_row(result) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print_table(argument)
