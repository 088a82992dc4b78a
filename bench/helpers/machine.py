"""What a number depends on beside its bench: the machine, the versions, and which code it was."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path

import torch


def describe(device: torch.device | str) -> dict[str, str | int | float]:
    """device, driver (a GPU's), cpu, threads, load_average, torch, triton, commit ("... dirty" if changed), date."""
    device = torch.device(device)
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        **({"driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")} if gpu else {}),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "triton": next((found.version for found in distributions(name="triton")), "not installed"),
        "commit": _output("git", "describe", "--always", "--dirty= dirty", "--exclude=*"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cpu_ticks() -> tuple[float, float]:
    """(taken by the host for others, of all CPUs together) since this machine started; Linux, 0 elsewhere."""
    path = Path("/proc/stat")
    ticks = [float(word) for word in path.read_text().split("\n")[0].split()[1:9]] if path.exists() else [0.0] * 8
    return ticks[7], sum(ticks)


def stolen_share(before: tuple[float, float]) -> float:
    """The share of the CPUs' time since `before` = cpu_ticks() that the host gave to others; 0 where not counted."""
    stolen, total = (now - then for now, then in zip(cpu_ticks(), before))
    return stolen / total if total else 0.0


def status_bytes(name: str) -> int:
    """Of this process, on Linux: VmRSS, VmHWM, RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _output(*command: str) -> str:
    """What a program prints; "unknown" where it is not there or not at home (a plain copy of the files has no git)."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
