"""The loggers' real packages, offline: what they keep is what the run logged, and a resumed run goes on in it."""

import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from command import ROOT
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.errors import Interrupted
from saevlm_fast.training.many import Look, train_many
from saevlm_fast.training.run import train

pytestmark = pytest.mark.interop
X = PlantedConcepts(16, 8, 30, seed=1).sample(500)[0]
SAE = SAEConfig(16, 32, 3)
STEPS, CUT, CHECKPOINT = 12, 9, 6


def run(output, log_to, *, cut=None, resume=False):
    def on_step(step):
        if step == cut:
            raise Interrupted("enough")

    options = RunOptions(output, "cpu", log_every=1, checkpoint_every=CHECKPOINT, log_to=(log_to,), resume=resume)
    config = TrainConfig(steps=STEPS, batch_size=64, lr=1e-3)
    sheet = Image.new("RGB", (12, 8), "red")
    train(Activations.from_tensor(X), SAE, config, options, on_step=on_step, on_picture=lambda sae: sheet)


def cut_and_resumed(output, log_to):
    with pytest.raises(Interrupted):
        run(output, log_to, cut=CUT)
    run(output, log_to, resume=True)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(lines):
    return {line["step"]: line["losses/overall_loss"] for line in lines if "losses/overall_loss" in line}


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    lines = cut_and_resumed(tmp_path / "run", "tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("losses/overall_loss")]
    assert [step for step, _ in found] == list(range(1, STEPS + 1)), "steps that are taken again are there once"
    assert dict(found) == pytest.approx(losses(lines), rel=1e-6)
    assert events.Scalars("eval/l0")[0].value == pytest.approx(lines[-1]["eval/l0"])
    assert {"system/memory_gib", "system/rows_per_second", "metrics/l0"} <= set(events.Tags()["scalars"])
    (picture,) = events.Images("contact_sheet")
    assert (picture.width, picture.height, picture.step) == (12, 8, STEPS)
    assert b'"d_sae": 32' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_of_a_run_that_replaces_another(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path / "run", "tensorboard")
    old = set((tmp_path / "run" / "tensorboard").iterdir())
    options = RunOptions(tmp_path / "run", "cpu", log_every=1, log_to=("tensorboard",), force=True)
    train(Activations.from_tensor(X), SAE, TrainConfig(steps=5, batch_size=64), options)
    new = set((tmp_path / "run" / "tensorboard").iterdir())
    assert new
    assert not new & old
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("metrics/l0")] == list(range(1, 6))
    assert len(events.Scalars("eval/l0")) == 1


def test_trackio(tmp_path):
    """In a process of its own: trackio reads where it keeps things when it is imported."""
    pytest.importorskip("trackio")
    code = f"""
import json, sys
sys.path[:0] = {[str(ROOT / "tests" / "training"), str(ROOT / "tests" / "helpers"), str(ROOT)]}
from pathlib import Path
import test_watch_real as t
from trackio.sqlite_storage import SQLiteStorage
lines = t.cut_and_resumed(Path({str(tmp_path)!r}) / "run", "trackio")
(name,) = SQLiteStorage.get_runs("of a test")
print(json.dumps([name, lines, SQLiteStorage.get_logs("of a test", name),
                  SQLiteStorage.get_run_config("of a test", name)]), file=sys.__stderr__)
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "kept"), "TRACKIO_PROJECT": "of a test"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "trackio prints; stdout is the result's"
    name, lines, logs, config = json.loads(done.stderr.splitlines()[-1])
    assert name == json.loads((tmp_path / "run" / "watch.json").read_text())["name"]
    assert config["sae"]["d_sae"] == 32
    assert losses(logs) == pytest.approx(losses(lines))
    assert sorted(log["step"] for log in logs if "losses/overall_loss" in log) == list(range(1, STEPS + 1))
    assert [log["eval/l0"] for log in logs if "eval/l0" in log] == [lines[-1]["eval/l0"]]
    assert [log["contact_sheet"]["_type"] for log in logs if "contact_sheet" in log] == ["trackio.image"]
    assert all("system/memory_gib" in log for log in logs if "losses/overall_loss" in log)


def wandb_records(directory):
    """Every record of the offline runs in a directory, oldest first.

    Its files are LevelDB's logs: seven bytes of a header; blocks of 32 KiB of pieces, each after its checksum, length
    and kind (whole, first, middle, last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    for file in sorted(directory.rglob("run-*.wandb")):
        data, place, whole = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            length, kind = struct.unpack_from("<HB", data, place + 4)
            whole += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                yield Record.FromString(whole)
                whole = b""


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    """wandb keeps the environment of its first run in a process: it is shut down, so that each test has its own."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "of-a-test")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("wandb_offline")
def test_wandb(tmp_path):
    lines = cut_and_resumed(tmp_path / "run", "wandb")
    name = json.loads((tmp_path / "run" / "watch.json").read_text())["name"]
    logged, sheets, summary = {}, 0, {}
    for record in wandb_records(tmp_path / "wandb"):
        if record.HasField("run"):
            assert (record.run.run_id, record.run.project) == (name, "of-a-test")
        items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "losses/overall_loss" in items:
            logged[items["_step"]] = items["losses/overall_loss"]
            assert items["system/memory_gib"] > 0
        sheets += any("contact_sheet" in "/".join(item.nested_key) + item.key for item in record.history.item)
        for item in record.summary.update:
            summary[item.key or "/".join(item.nested_key)] = item.value_json
    assert logged == pytest.approx(losses(lines))
    assert sheets >= 1
    assert json.loads(summary["eval/l0"]) == lines[-1]["eval/l0"]


GRID = {"k2": SAEConfig(16, 32, 2), "k3": SAEConfig(16, 32, 3)}


def cut_and_resumed_grid(output, log_to):
    """Two SAEs at once, each with a sheet of its own; the lines of both."""

    def cut(step):
        if step == CUT:
            raise Interrupted("enough")

    def looks(saes):
        return {name: Look({"ms_mean": 0.5}, lambda: Image.new("RGB", (12, 8), "red")) for name in saes}

    known = {"log_every": 1, "checkpoint_every": CHECKPOINT, "log_to": log_to, "device": "cpu", "output": output}
    known |= {"steps": STEPS, "batch_size": 64, "lr": 1e-3, "on_finished": looks}
    with pytest.raises(Interrupted):
        train_many(Activations.from_tensor(X), GRID, on_step=cut, **known)
    train_many(Activations.from_tensor(X), GRID, resume=True, **known)
    files = {name: (output / name / "metrics.jsonl").read_text().splitlines() for name in GRID}
    return {name: [json.loads(line) for line in lines] for name, lines in files.items()}


def written_records(directory, seconds=30):
    """wandb_records once the run is among them: a process of wandb's own writes them, later on a busy machine."""
    until = time.monotonic() + seconds
    while True:
        records = list(wandb_records(directory))
        if any(record.HasField("run") for record in records) or time.monotonic() > until:
            return records
        time.sleep(0.2)


def named(output):
    return {json.loads((output / name / "watch.json").read_text())["name"]: name for name in GRID}


def test_tensorboard_of_a_grid(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for name, lines in cut_and_resumed_grid(tmp_path / "grid", "tensorboard").items():
        events = accumulator.EventAccumulator(str(tmp_path / "grid" / name / "tensorboard"))
        events.Reload()
        found = [(event.step, event.value) for event in events.Scalars("losses/overall_loss")]
        assert [step for step, _ in found] == list(range(1, STEPS + 1))
        assert dict(found) == pytest.approx(losses(lines), rel=1e-6)
        assert events.Scalars("eval/ms_mean")[0].value == 0.5
        assert len(events.Images("contact_sheet")) == 1
        assert b'"group": "grid-' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.usefixtures("wandb_offline")
def test_wandb_of_a_grid(tmp_path):
    lines = cut_and_resumed_grid(tmp_path / "grid", "wandb")
    names, groups, logged, sheets = named(tmp_path / "grid"), set(), {}, dict.fromkeys(GRID, 0)
    for file in sorted((tmp_path / "wandb").rglob("run-*.wandb")):
        records = written_records(file.parent)
        (run,) = {record.run.run_id for record in records if record.HasField("run")}
        groups |= {record.run.run_group for record in records if record.HasField("run")}
        for record in records:
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if "losses/overall_loss" in items:
                logged.setdefault(names[run], {})[items["_step"]] = items["losses/overall_loss"]
            keys = ["/".join(item.nested_key) + item.key for item in record.history.item]
            sheets[names[run]] += any("contact_sheet" in key for key in keys)
    assert len(groups) == 1
    assert next(iter(groups)).startswith("grid-")
    for name in GRID:
        assert logged[name] == pytest.approx(losses(lines[name]))
        assert sheets[name] >= 1


def test_trackio_of_a_grid(tmp_path):
    pytest.importorskip("trackio")
    code = f"""
import json, sys
sys.path[:0] = {[str(ROOT / "tests" / "training"), str(ROOT / "tests" / "helpers"), str(ROOT)]}
from pathlib import Path
import test_watch_real as t
from trackio.sqlite_storage import SQLiteStorage
lines = t.cut_and_resumed_grid(Path({str(tmp_path)!r}) / "grid", "trackio")
found = {{name: [SQLiteStorage.get_logs("of a test", name), SQLiteStorage.get_run_config("of a test", name)]
         for name in SQLiteStorage.get_runs("of a test")}}
print(json.dumps([lines, found]), file=sys.__stderr__)
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "kept"), "TRACKIO_PROJECT": "of a test"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines, found = json.loads(done.stderr.splitlines()[-1])
    names = named(tmp_path / "grid")
    assert found.keys() == names.keys()
    for run, (logs, _) in found.items():
        assert losses(logs) == pytest.approx(losses(lines[names[run]]))
        assert [log["eval/ms_mean"] for log in logs if "eval/ms_mean" in log] == [0.5]
        assert len([log for log in logs if "contact_sheet" in log]) == 1
    assert len({config["group"] for _, config in found.values()}) == 1


def test_wandb_disabled_is_no_hindrance(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run(tmp_path / "run", "wandb")
    assert (tmp_path / "run" / "cfg.json").is_file()


@pytest.mark.parametrize("log_to", ["wandb"])
def test_a_killed_run_goes_on_in_the_same_run(tmp_path, log_to):
    """kill -9, not Ctrl-C: nothing of the logger was closed."""
    pytest.importorskip(log_to)
    np.save(tmp_path / "x.npy", np.asarray(X))
    words = ["train", "--activations", "x.npy", "--output", "run", "--d-sae", "32", "--k", "3", "--device", "cpu"]
    words += ["--steps", "400", "--batch-size", "64", "--log-to", log_to, "--log-every", "50"]
    words += ["--checkpoint-every", "50"]
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "saevlm_fast", *words]
    with subprocess.Popen(call, cwd=tmp_path, env=environment, stdout=subprocess.PIPE) as process:
        while not list(tmp_path.glob("run/checkpoints/step_*")):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    name = (tmp_path / "run" / "watch.json").read_bytes()
    done = subprocess.run([*call, "--resume"], cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "watch.json").read_bytes() == name
