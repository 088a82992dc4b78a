"""Facts about a machine and an installation. Each is found by itself: one that cannot be found hides no other.

Nothing here names a user, a host or a path: what is found may be pasted into an issue.
"""

import importlib
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saevlm_fast import __version__
from saevlm_fast.doctor.words import said

TOWER_LIBRARIES = {"transformers": "hf:", "open_clip": "open_clip:", "timm": "timm:"}  # and what they load
CPUINFO = Path("/proc/cpuinfo")
_EXTRAS = ("datasets", "remote", "watch")
_CACHE_SECONDS = 3.0  # of looking at one cache
_LITTLE_DISK = 2 * 10**9
_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "SAEVLM_FAST_SCREENING", "TRITON_INTERPRET"),
    *("TRANSFORMERS_OFFLINE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"),
)  # whose values are no paths


def facts(on_fact: Callable[[str], None] = lambda name: None) -> dict[str, dict[str, Any]]:
    """Sections of facts by name, JSON; a section that cannot be found is {"error": why}. on_fact: told before each."""
    found: dict[str, dict[str, Any]] = {}
    for name, look in SECTIONS.items():
        on_fact(name)
        try:
            found[name] = look()
        except Exception as error:  # whatever is broken is what this is for
            found[name] = {"error": said(error)}
    return found


def program() -> dict[str, Any]:
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {
        "saevlm_fast": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "variables": variables or None,
    }


def _processor() -> str:
    """Its name; Linux has numbers alone of an ARM one, by which people can look it up."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
    if "model name" in facts:
        return facts["model name"]
    numbers = ", ".join(f"{name} {facts[name]}" for name in ("CPU implementer", "CPU part") if name in facts)
    return numbers or platform.processor() or platform.machine() or "unknown"


def device() -> dict[str, Any]:
    """torch, triton and the GPUs; what float32 products and dtypes there are; whether encoders screen."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    try:
        import triton

        found["triton"] = triton.__version__
    except Exception as error:
        found["triton"] = f"does not load: {said(error)}"
    found["gpus"] = [_gpu(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    found["chosen"] = "cuda" if found["gpus"] else "cpu"
    found["screening"] = _screening(bool(found["gpus"]))
    return found


def _gpu(number: int) -> dict[str, Any]:
    import torch

    properties, (free, total) = torch.cuda.get_device_properties(number), torch.cuda.mem_get_info(number)
    with torch.cuda.device(number):
        dtypes = ["float32", "float16", *(["bfloat16"] if torch.cuda.is_bf16_supported() else [])]
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": total,
        "free_bytes": free,
        "dtypes": dtypes,
    }


def _screening(on_gpu: bool) -> str:
    """How encoders find candidates before float32 decides."""
    from saevlm_fast.kernels.cpu_loops import numba_is_here
    from saevlm_fast.kernels.low_product_speed import VARIABLE, low_products_pay

    if on_gpu:
        return "on the GPU, by its kernels"
    if not numba_is_here():
        return "none: there is no numba"
    by = VARIABLE if os.environ.get(VARIABLE) else "measured on this processor"
    return f"bfloat16 products, {by}" if low_products_pay() else f"none: float32 products, {by}"


def libraries() -> dict[str, Any]:
    """Version of every package that this one needs, whether it is one that is supported; extras only where present."""
    from packaging.requirements import Requirement

    found: dict[str, Any] = {}
    for text in importlib.metadata.requires("saevlm-fast") or ():
        needed = Requirement(text)
        always = needed.marker is None or needed.marker.evaluate({"extra": ""})
        if not always and not any(needed.marker.evaluate({"extra": name}) for name in _EXTRAS):  # type: ignore[union-attr]
            continue
        try:
            version = importlib.metadata.version(needed.name)
        except importlib.metadata.PackageNotFoundError:
            if always:
                found[needed.name] = {"version": None, "needed": str(needed.specifier), "supported": False}
            continue
        supported = needed.specifier.contains(version, prereleases=True)
        if always or needed.name not in found:
            found[needed.name] = {"version": version, "needed": str(needed.specifier), "supported": supported}
    return found


def towers() -> dict[str, Any]:
    """Whether the libraries that bring towers can be imported, and which names they load."""
    found: dict[str, Any] = {}
    for name, prefix in TOWER_LIBRARIES.items():
        try:
            module = importlib.import_module(name)
            found[name] = {"loads": True, "names": prefix, "version": getattr(module, "__version__", None)}
        except Exception as error:
            found[name] = {"loads": False, "names": prefix, "error": said(error)}
    return found


def memory() -> dict[str, Any]:
    """Of the machine, and of the container if it has a limit of its own."""
    limit, used = container_memory()
    found: dict[str, Any] = {"container_limit_bytes": limit, "container_used_bytes": used}
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:  # not Linux
        return {"total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), **found}
    kilobytes = {line.partition(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) > 1}
    return {
        "total_bytes": 1024 * kilobytes["MemTotal"],
        "available_bytes": 1024 * kilobytes["MemAvailable"],
        **found,
    }


_CGROUP = Path("/sys/fs/cgroup")


def container_memory() -> tuple[int | None, int | None]:
    """(limit, use) of this process's control group, version 2 or 1; None where there is no limit."""
    for limit_file, use_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit = _number_in(_CGROUP / limit_file)
        if limit is not None and limit < 1 << 60:  # version 1 writes a number near 2^63 for none
            return limit, _number_in(_CGROUP / use_file)
    return None, None


def container_cores() -> float | None:
    """Cores that the control group's quota is worth; None where there is none."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        quota_1, period_1 = (_number_in(_CGROUP / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        return quota_1 / period_1 if quota_1 and period_1 and quota_1 > 0 else None
    return None if quota == "max" else int(quota) / int(period)


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def threads() -> dict[str, Any]:
    import torch

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "cores": os.cpu_count(),
        "cores_allowed": allowed,
        "cores_of_the_container": container_cores(),
        "torch_threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def disk() -> dict[str, Any]:
    """Free space where results, temporary files and caches go."""
    import tempfile

    places = {"here": Path(), "temporary files": Path(tempfile.gettempdir()), **cache_places()}
    found: dict[str, Any] = {}
    for name, path in places.items():
        there = next((each for each in (path, *path.absolute().parents) if each.exists()), Path("/"))
        found[f"{name.replace(' ', '_')}_free_bytes"] = shutil.disk_usage(there).free
    return found


def caches() -> dict[str, Any]:
    """Size of every cache; at least, where there are too many files to look at."""
    found: dict[str, Any] = {}
    for name, path in cache_places().items():
        size, whole = size_of(path)
        found[name] = {"bytes": size, "whole": whole} if path.exists() else None
    return found


def cache_places() -> dict[str, Path]:
    """Of this program, of models, and of compiled kernels."""
    from huggingface_hub import constants

    from saevlm_fast.files import cache_directory

    home = Path.home()
    return {
        "saevlm-fast": cache_directory(),
        "models": Path(constants.HF_HUB_CACHE),
        "triton kernels": Path(os.environ.get("TRITON_CACHE_DIR", home / ".triton" / "cache")),
        "torch weights": Path(os.environ.get("TORCH_HOME", home / ".cache" / "torch")),
    }


def size_of(path: Path, seconds: float = _CACHE_SECONDS) -> tuple[int, bool]:
    """Bytes of all files below, each link for itself; and whether all were looked at in that time."""
    total, end = 0, time.monotonic() + seconds
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:
                continue  # gone meanwhile
        if time.monotonic() > end:
            return total, False
    return total, True


SECTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "program": program,
    "device": device,
    "libraries": libraries,
    "towers": towers,
    "memory": memory,
    "threads": threads,
    "disk": disk,
    "caches": caches,
}


def problems(found: dict[str, dict[str, Any]]) -> list[str]:
    """What of the facts is likely to be in the way, one line each."""
    lines = [f"{name}: {section['error']}" for name, section in found.items() if "error" in section]
    for name, library in found.get("libraries", {}).items():
        if isinstance(library, dict) and not library["supported"]:
            has = "is not installed" if library["version"] is None else f"is {library['version']}"
            lines.append(f"{name} {has}; needed is {library['needed'] or 'any version'}")
    for name, library in found.get("towers", {}).items():
        if isinstance(library, dict) and not library["loads"]:
            lines.append(f"{name} does not load, so there are no {library['names']} towers: {library['error']}")
    device_ = found.get("device", {})
    if str(device_.get("triton", "")).startswith("does not load") and device_.get("gpus"):
        lines.append(f"triton {device_['triton']}, so the GPU's kernels do not run")
    threads_ = found.get("threads", {})
    cores, load = threads_.get("cores_allowed") or threads_.get("cores"), threads_.get("load")
    if cores and load and load > 2 * cores:
        lines.append(f"load {load} on {cores} cores: other programs are at work, so whatever is timed takes longer")
    for name, free in found.get("disk", {}).items():
        if isinstance(free, int) and free < _LITTLE_DISK:
            place = name.removesuffix("_free_bytes").replace("_", " ")
            lines.append(f"disk: {free / 1e9:.1f} GB free ({place}), too little for most stores and models")
    return lines
