"""Worker processes where Python no longer forks by itself (3.14), or was told not to: scripts without a guard run."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import saevlm_fast as sf
from saevlm_fast.images import batches
from saevlm_fast.images.batches import default_workers

ROOT = Path(__file__).resolve().parents[2]
OWN = multiprocessing.get_all_start_methods()[0]  # Python's: fork, and from 3.14 on forkserver
SCRIPT = """
import multiprocessing
import saevlm_fast as sf
{before}
if {method!r}:
    multiprocessing.set_start_method({method!r})
stored = sf.harvest("hf:tiny-clip", "scenes:test:5", layer=3{workers})
print(len(stored.rows(__import__("torch").arange(5))), multiprocessing.get_start_method(allow_none=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux alone")
@pytest.mark.parametrize(
    ("method", "before", "workers"),
    [
        (None, "", ""),
        ("spawn", "", ""),
        ("fork", "", ", workers=1"),
        (None, "", ", workers=1"),
        (None, "multiprocessing.Lock()", ", workers=1"),  # as tqdm makes one; Python's own way is then no longer None
    ],
)
def test_a_script_without_a_guard_harvests(tmp_path, method, before, workers):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(method=method, before=before, workers=workers))
    done = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # What nobody chose is still anybody's choice.
    assert done.stdout.split() == ["5", OWN if before else str(method)]


@pytest.mark.parametrize(
    ("platform", "method", "own", "beside_cpu"),
    [
        ("linux", None, "fork", 1),
        ("linux", "fork", "fork", 1),
        ("linux", "forkserver", "fork", 0),
        ("linux", "spawn", "fork", 0),
        ("linux", None, "forkserver", 1),
        ("linux", "fork", "forkserver", 1),
        ("linux", "forkserver", "forkserver", 1),
        ("linux", "spawn", "forkserver", 0),
        ("darwin", None, "spawn", 0),
        ("darwin", "spawn", "spawn", 0),
    ],
)
def test_beside_a_cpu_there_is_a_worker_where_it_is_a_fork(monkeypatch, platform, method, own, beside_cpu):
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: [own, "others"])
    monkeypatch.setattr(batches.sys, "platform", platform)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: method)
    assert default_workers(on_gpu=False, processes=1) == beside_cpu
    assert default_workers(on_gpu=True, processes=1) >= 1


def test_a_harvest_draws_nothing_from_the_users_generator():
    before = torch.get_rng_state()
    for workers in (0, 1):
        sf.harvest("hf:tiny-clip", "scenes:test:5", layer=3, workers=workers)
    assert torch.equal(torch.get_rng_state(), before)
