"""Compiles Triton kernels for GPUs that are not here, and reads what each costs: registers, spills, shared memory.

Needs no GPU, no driver and no libcuda: triton.compile(ASTSource(...), GPUTarget(...)) and Triton's own cuobjdump.
It runs in worker processes without TRITON_INTERPRET, because Triton reads that variable once, at import, and the test
process has it set. A worker stays until the tests end, and pays its imports once; compiled kernels land in Triton's own
cache.

    cases = [Case("saevlm_fast.kernels.sparse_decode_triton", "decode_kernel", target,
                  signature={"out_ptr": "*fp32", "n_rows": "i32", "d_in": "i32:16"},
                  constexprs={"BLOCK_D": 1024}, num_warps=4) for target in TARGETS]
    for case, used in zip(cases, compile_cases(cases)):
        assert used.spill_bytes == 0, (case, used)

Signature types are Triton's ("*bf16", "i64", "fp32"). As the JIT does for what torch hands it, pointers are taken to be
divisible by 16; an integer is only when its type says so ("i32:16"). An integer that is 1 at run time is a constexpr to
the JIT: put it in constexprs. A constexpr string such as "tl.float32" stands for that object.
"""

import atexit
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "gfx942")
SHARED_LIMIT_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}


@dataclass(frozen=True)
class Case:
    """One kernel at one configuration for one target."""

    module: str
    function: str
    target: str
    signature: dict[str, str]
    constexprs: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None

    def __str__(self) -> str:
        return f"{self.function}{self.constexprs} w{self.num_warps} s{self.num_stages} {self.target}"


@dataclass(frozen=True)
class Resources:
    """What the compiled kernel uses: registers a thread, bytes of spills (local memory) a thread, shared bytes a block.

    gfx942 counts its spilled registers (VGPR + SGPR) as 4 bytes each.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int


# Of pytest-xdist's processes each has workers of its own: there is one a core of them already.
PROCESSES = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2


def compile_cases(cases: list[Case], processes: int = PROCESSES) -> list[Resources]:
    """Compiles every case; RuntimeError names the first that does not compile or does not fit in shared memory."""
    shares = [list(range(i, len(cases), processes)) for i in range(min(processes, len(cases)))]
    workers = [_worker(i) for i in range(len(shares))]
    for share, worker in zip(shares, workers):
        assert worker.stdin is not None
        worker.stdin.write(json.dumps([asdict(cases[i]) for i in share]) + "\n")
        worker.stdin.flush()
    results: dict[int, Resources] = {}
    for number, (share, worker) in enumerate(zip(shares, workers)):
        assert worker.stdout is not None
        line = worker.stdout.readline()
        if not line:
            del _workers[number]
            raise RuntimeError(f"static compile worker ended with exit code {worker.wait()}; stderr says why")
        answer = json.loads(line)
        if isinstance(answer, str):
            raise RuntimeError(f"static compile worker failed:\n{answer[-4000:]}")
        results.update(zip(share, (Resources(**used) for used in answer)))
    for i, case in enumerate(cases):
        if results[i].shared_bytes > SHARED_LIMIT_BYTES[case.target]:
            raise RuntimeError(f"{case}: {results[i]} exceeds {SHARED_LIMIT_BYTES[case.target]} bytes of shared memory")
    return [results[i] for i in range(len(cases))]


# Bytes that Triton before 3.8 spills: of 8,192 candidates in 512 threads, and scalars into lanes of vector registers.
_SPILLED_BEFORE_3_8 = {("topk_of_groups_kernel", "sm_80"): 24, ("redo_topk_kernel", "gfx942"): 184}


def assert_no_spills(cases: list[Case], processes: int = PROCESSES) -> list[Resources]:
    """compile_cases, and an AssertionError listing every case that spills, but for what is known of an old Triton."""
    used = compile_cases(cases, processes)
    known = _SPILLED_BEFORE_3_8 if tuple(map(int, version("triton").split(".")[:2])) < (3, 8) else {}
    limits = [known.get((case.function, case.target), 0) for case in cases]
    spilled = [
        f"{case}: {resources}" for case, resources, most in zip(cases, used, limits) if resources.spill_bytes > most
    ]
    assert not spilled, "\n".join(spilled)
    return used


@functools.cache
def _own_cache() -> dict[str, str]:
    """Nothing; where Triton's own cache cannot be made, as without a home, the environment of another one."""
    try:
        Path(os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache").expanduser().mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        folder = tempfile.TemporaryDirectory()
        atexit.register(folder.cleanup)
        return {"TRITON_CACHE_DIR": folder.name}
    return {}


_workers: dict[int, subprocess.Popen[str]] = {}


def _worker(number: int) -> subprocess.Popen[str]:
    """It reads one line of cases after the other, and answers each with a line."""
    if number not in _workers:
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
        env |= _own_cache()
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        _workers[number] = subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdin=pipe, stdout=pipe)
    return _workers[number]


@atexit.register
def _end_workers() -> None:
    for worker in _workers.values():
        worker.kill()
        worker.wait()


def _compile(case: Case) -> Resources:
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.function)
    target = GPUTarget("hip", "gfx942", 64) if case.target == "gfx942" else GPUTarget("cuda", int(case.target[3:]), 32)
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in case.constexprs:
            signature[name] = "constexpr"
            continue
        signature[name], _, divisor = case.signature[name].partition(":")
        if signature[name].startswith("*") or divisor == "16":
            attrs[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): _resolve(value) for name, value in case.constexprs.items()}
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None and target.backend == "cuda":
        options["maxnreg"] = case.maxnreg
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs, attrs),
        target=target,
        options=options,
    )
    registers, spill_bytes = _read_gfx(compiled) if case.target == "gfx942" else _read_cubin(compiled)
    return Resources(registers, spill_bytes, compiled.metadata.shared)


def _resolve(value):
    if isinstance(value, str) and value.startswith("tl."):
        import triton.language as tl

        return getattr(tl, value[3:])
    return value


def _read_cubin(compiled) -> tuple[int, int]:
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    # A kernel's stack frame holds its spills (and nothing else, in Triton); LOCAL is the older name for the same bytes.
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, max(stack, local)


def _read_gfx(compiled) -> tuple[int, int]:
    asm = compiled.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    vgprs, *spilled = (int(re.search(rf"\.{name}:\s*(\d+)", asm)[1]) for name in names)
    return vgprs, 4 * sum(spilled)


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a compiler prints is no answer
    for line in sys.stdin:
        try:
            answer: object = [_compiled(Case(**fields)) for fields in json.loads(line)]
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


def _compiled(case: Case) -> dict[str, int]:
    try:
        return asdict(_compile(case))
    except Exception as error:
        raise RuntimeError(f"{case} does not compile") from error


if __name__ == "__main__":
    main()
