"""doctor: facts, a self-test that can fail, a report that names nobody; what is broken hides nothing else."""

import getpass
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from command import run, run_json
from saevlm_fast.doctor import machine, self_test, words
from saevlm_fast.errors import Interrupted
from saevlm_fast.kernels import cpu_loops

CPU = torch.device("cpu")
QUICK = [name for name in self_test.CHECKS if name not in ("harvest", "training")]


@pytest.fixture
def only_quick_checks(monkeypatch):
    monkeypatch.setattr(self_test, "CHECKS", {name: self_test.CHECKS[name] for name in QUICK[:2]})


def test_everything_is_right_here(monkeypatch, tmp_path):
    monkeypatch.setenv("SAEVLM_FAST_CACHE", str(tmp_path))
    result = run_json("doctor", "--device", "cpu")
    checks = result["self_test"]["checks"]
    assert result["ok"] is True
    assert [check["name"] for check in checks] == list(self_test.CHECKS)
    assert all(check["ok"] for check in checks), checks
    assert result["facts"].keys() == machine.SECTIONS.keys()
    assert not [name for name, section in result["facts"].items() if "error" in section]
    assert result["facts"]["device"]["torch"] == torch.__version__
    assert result["facts"]["libraries"]["transformers"]["supported"] is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: Xeon(R) 8480+\nflags\t\t: fpu\n", "Xeon(R) 8480+"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n", "CPU implementer 0x41, CPU part 0xd40"),
        (None, "a name of the platform"),
    ],
)
def test_the_processor_is_named(monkeypatch, tmp_path, text, expected):
    """Linux has no name of an ARM one; where there is no Linux, Python may know it."""
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(machine.platform, "processor", lambda: "a name of the platform")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert machine.program()["processor"] == expected


# Every op of the self-test with one number wrong in what it gives, or ending in an error of its own.
BROKEN = {
    "topk encode": ("topk_encode.topk_encode", lambda codes: (codes[0] * 1.01, codes[1])),
    "screened encode": ("topk_encode_screened.topk_encode_screened", lambda codes: (codes[0], codes[1].flip(0))),
    "batch topk encode": ("topk_encode.batch_topk_encode", lambda codes: (codes[0], codes[1] ^ 1, codes[2])),
    "threshold encode": ("topk_encode.threshold_encode", lambda codes: (-codes[0], *codes[1:])),
    "sparse decode": ("sparse_decode.sparse_decode", lambda x: 2 * x),
    "gather dot": ("sparse_decode.gather_dot", lambda x: x.flip(0)),
    "segment sum": ("segment_sum.segment_sum", lambda x: x[:-1]),
    "latent range": ("latent_range.latent_range", lambda x: (x[0], x[1] + 1e-9, x[2])),
    "streamed cosine": ("streamed_cosine.streamed_cosine_update", lambda x: 1 / 0),
    "pairwise sums": ("pairwise_similarity.pairwise_sums", lambda x: (x[0] * (1 + 1e-6), x[1])),
    "scaled rows": ("scaled_rows.scaled_sum", lambda x: x.float().half()),
    "latent update": ("latent_gradient.clip_coefficient", lambda x: x * torch.nan),
    "score": ("streamed_cosine.streamed_cosine_update", None),
}


@pytest.mark.parametrize("name", QUICK)
def test_a_broken_kernel_fails_its_check_and_no_other(name, monkeypatch):
    if name == "quick gelu":
        pytest.skip("on a CPU there is no kernel for it")
    place, damage = BROKEN[name]
    module_name, _, function = place.partition(".")
    module = __import__(f"saevlm_fast.kernels.{module_name}", fromlist=[function])
    if damage is None:
        monkeypatch.setattr("saevlm_fast.scoring.monosemanticity.score", lambda *given, **more: 1 / 0)
    else:
        own = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *given, **more: damage(own(*given, **more)))
    beside = {name, QUICK[QUICK.index(name) - 1], "sparse decode"}
    failed = [check.name for check in self_test.self_test(CPU, beside) if not check.ok]
    assert failed == [name]


def test_exit_code_1_when_a_check_fails(only_quick_checks, monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setitem(self_test.CHECKS, "topk encode", broken)
    text = run("doctor", "--device", "cpu", code=1)
    assert "- FAILED: topk encode (RuntimeError: CUDA error: an illegal memory access" in text
    assert "- ok: screened encode" in text
    assert "**self-test** on cpu: 1 of 2 right" in text
    assert ("- saevlm-fast: " in text, "- free in the working directory: " in text) == (True, True)
    result = run_json("doctor", "--device", "cpu")
    assert (result["ok"], [check["ok"] for check in result["self_test"]["checks"]]) == (False, [False, True])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU screens by its kernels")
def test_without_numba_a_cpu_does_not_screen_and_it_is_said(only_quick_checks, monkeypatch):
    monkeypatch.setattr(cpu_loops, "numba_is_here", lambda: False)
    assert machine.device()["screening"] == "none: there is no numba"
    assert "not run: there is no numba" in run("doctor", "--device", "cpu")


def test_facts_only_takes_no_self_test(monkeypatch):
    monkeypatch.setattr(self_test, "self_test", lambda *given, **more: 1 / 0)
    assert run_json("doctor", "--facts-only")["self_test"] is None
    assert "self-test" not in run("doctor", "--facts-only")
    assert "device: 'tpu' is not a device" in run("doctor", "--device", "tpu", code=2)


def test_a_library_that_is_missing_or_broken_is_said_and_hides_nothing(only_quick_checks, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(machine, "memory", lambda: 1 / 0)
    monkeypatch.setitem(machine.SECTIONS, "memory", machine.memory)
    own = machine.importlib.import_module

    def broken(name, *more):
        if name == "open_clip":
            raise AttributeError(f"module at {Path.home()}/lib has no attribute 'x'")
        return own(name, *more)

    monkeypatch.setattr(machine.importlib, "import_module", broken)
    result = run_json("doctor", "--device", "cpu")
    assert result["ok"] is True  # the self-test needs none of them on a CPU
    assert result["facts"]["towers"]["transformers"]["loads"] is True
    assert result["facts"]["device"]["triton"].startswith("does not load: ")
    problems = "\n".join(result["problems"])
    for part in (
        "memory: ZeroDivisionError: division by zero",
        "timm does not load, so there are no timm: towers: ModuleNotFoundError",
        "open_clip does not load, so there are no open_clip: towers: AttributeError: module at ~/lib has no attribute",
    ):
        assert part in problems


def test_versions_against_those_that_are_supported(monkeypatch):
    needs = [
        "torch>=999",
        "numpy>=1",
        "nothing-of-that-name>=2; python_version > '3'",
        "absent>=1; extra == 'measures'",
    ]
    monkeypatch.setattr(machine.importlib.metadata, "requires", lambda name: needs)
    found = machine.libraries()
    assert [each["supported"] for each in found.values()] == [False, True, False]
    lines = machine.problems({"libraries": found})
    assert lines == [
        f"torch is {found['torch']['version']}; needed is >=999",
        "nothing-of-that-name is not installed; needed is >=2",
    ]


def test_a_busy_machine_and_a_full_disk_are_in_the_way():
    found = {"threads": {"cores": 8, "cores_allowed": 2, "load": 4.1}, "disk": {"temporary_files_free_bytes": 10**9}}
    busy, full = machine.problems(found)
    assert busy.startswith("load 4.1 on 2 cores: other programs are at work")
    assert full.startswith("disk: 1.0 GB free (temporary files)")
    assert machine.problems({"threads": {"cores": 8, "load": 4.1}, "disk": {"here_free_bytes": 10**10}}) == []


def test_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "saevlm_fast.doctor.self_test", None)
    text = run("doctor", code=1)
    assert re.search(r"- FAILED: torch \(ModuleNotFoundError: .*self_test", text)
    assert "**memory**" in text


def test_limits_of_a_container(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert (machine.container_memory(), machine.container_cores()) == ((None, None), None)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.container_memory() == (None, None)
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1073741824\n")
    (tmp_path / "memory" / "memory.usage_in_bytes").write_text("1000\n")
    assert machine.container_memory() == (1 << 30, 1000)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert machine.container_cores() == 1.5
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert machine.container_cores() is None
    (tmp_path / "memory.max").write_text("2147483648\n")
    (tmp_path / "memory.current").write_text("5\n")
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    assert (machine.container_memory(), machine.container_cores()) == ((2 << 30, 5), 4)
    assert machine.memory()["container_limit_bytes"] == 2 << 30


def test_the_size_of_a_cache(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1" * 10)
    (tmp_path / "a" / "link").symlink_to("nowhere")
    size, whole = machine.size_of(tmp_path)
    assert (size - len("nowhere"), whole) == (10, True)
    assert machine.size_of(tmp_path, seconds=-1)[1] is False
    assert machine.size_of(tmp_path / "none") == (0, True)


def test_a_report_names_nobody(monkeypatch):
    monkeypatch.setattr(getpass, "getuser", lambda: "alice")
    monkeypatch.setattr(Path, "home", lambda: Path("/data/people/alice"))
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    text = words.anonymous(
        {"error": [f"/data/people/alice/x.py and /home/bob/y of alice, {secret}, https://bob:pw@host/z; malice stays"]}
    )["error"][0]
    assert text == "~/x.py and /home/***/y of ***, ***, https://***@host/z; malice stays"
    assert words.anonymous(f"{sys.prefix}/lib") == "<python>/lib"
    assert words.anonymous({"n": 3, "none": None}) == {"n": 3, "none": None}


def test_nothing_of_this_machine_is_in_the_report(only_quick_checks, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnopqrstuvwxyz")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = run("doctor", "--device", "cpu") + json.dumps(run_json("doctor", "--device", "cpu"))
    assert "OMP_NUM_THREADS" in text
    for private in (str(Path.cwd()), str(Path.home()) + "/", "hf_abc", str(Path(sys.prefix))):
        assert private not in text


def test_interrupted_is_no_failed_check(monkeypatch):
    def interrupted(*given):
        raise Interrupted("interrupted")

    monkeypatch.setitem(self_test.CHECKS, "score", interrupted)
    with pytest.raises(Interrupted):
        self_test.self_test(CPU, ["score"])
    monkeypatch.setitem(machine.SECTIONS, "disk", interrupted)
    with pytest.raises(Interrupted):
        machine.facts()
