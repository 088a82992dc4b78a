"""Harvests in several threads of one process."""

import subprocess
import sys

CODE = """
import threading, torch, saevlm_fast as sf
before, found = torch.backends.cudnn.conv.fp32_precision, []
def work():
    found.append(next(sf.harvest("hf:tiny-clip", "scenes:test:12", layer=3).chunks(99))[1])
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 3 and all(torch.equal(each, found[0]) for each in found)
assert torch.backends.cudnn.conv.fp32_precision == before
torch.export.export(torch.nn.Linear(2, 2), (torch.randn(1, 2),))  # refuses settings that contradict each other
"""


def test_threads_load_and_harvest_side_by_side_and_leave_torch_as_it_was():
    """In a process of its own, which has imported nothing: transformers' first imports are part of it."""
    done = subprocess.run([sys.executable, "-c", CODE], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "Exception in thread" not in done.stderr
