"""Loggers beside a run: told of everything, known again when it is resumed, and never in its way."""

import json
import os
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from command import run as run_command
from saevlm_fast.cli import main
from saevlm_fast.config import RunOptions, SAEConfig, TrainConfig
from saevlm_fast.data.rows import Activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.errors import Doubt, Interrupted
from saevlm_fast.training import beside, watch
from saevlm_fast.training.many import Look, train_many
from saevlm_fast.training.run import train
from tiny_tower import save_clip, save_photos

X = PlantedConcepts(16, 8, 30, seed=1).sample(500)[0]
ROWS = Activations.from_tensor(X)
SAE = SAEConfig(16, 32, 3)
SHEET = Image.new("RGB", (8, 8), "red")


class Recorded:
    """A logger that keeps what it is told, and breaks or hangs where it is asked to."""

    made: list["Recorded"]
    breaks = hangs = ""
    hanging, awake = threading.Event(), threading.Event()

    def __init__(self, run):
        self.run, self.told, self.directories = run, [], []
        type(self).made.append(self)
        self._do("start")

    def _do(self, what, *said):
        if what == self.breaks:
            raise RuntimeError(f"no {what} today\nsecond line")
        if what == self.hangs:
            self.hanging.set()
            self.awake.wait()
        self.told.append((what, *said))
        self.directories.append(self.run.directory())

    def log(self, step, metrics):
        self._do("eval" if "eval/l0" in metrics else "log", step, metrics)

    def picture(self, step, name, image):
        self._do("picture", step, name, image)

    def pause(self):
        self._do("pause")

    def close(self, failed):
        self._do("close", failed)


class Other(Recorded):
    """A second one, which works."""


@pytest.fixture
def recorded(monkeypatch):
    """wandb and trackio are these loggers."""
    Recorded.made, Other.made = [], []
    Recorded.breaks = Other.breaks = Recorded.hangs = Other.hangs = ""
    Recorded.hanging, Recorded.awake = threading.Event(), threading.Event()
    monkeypatch.setattr(watch, "imported", lambda name: None)
    monkeypatch.setattr(watch, "LOGGERS", {"wandb": Recorded, "trackio": Other})
    monkeypatch.setattr(beside, "hanging", [])
    yield Recorded
    Recorded.awake.set()


@pytest.fixture
def impatient(recorded, monkeypatch):
    """Half a second for what hangs; as long as they need for those that have not come so far, as on a busy machine."""
    settle = beside.Beside.settle

    def settled(self, done, deadline):
        while not (done.is_set() or (self._name == "wandb" and recorded.hanging.is_set())):
            done.wait(0.01)
        return settle(self, done, deadline)

    monkeypatch.setattr(beside, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(beside.Beside, "settle", settled)


def run(output=None, *, log_to=("wandb", "trackio"), on_step=lambda step: None, **options):
    options = RunOptions(output, "cpu", log_every=4, log_to=log_to, **options)
    config = TrainConfig(steps=12, batch_size=64, lr=1e-3)
    return train(ROWS, SAE, config, options, on_step=on_step, on_picture=lambda sae: SHEET)


def test_a_logger_is_told_of_settings_metrics_the_machine_and_the_sheet(recorded, tmp_path):
    _, metrics = run(tmp_path / "run")
    (made,) = recorded.made
    assert [what for what, *_ in made.told] == ["start", "log", "log", "log", "pause", "eval", "picture", "close"]
    assert made.run.config["sae"]["d_sae"] == 32
    assert made.run.config["train"]["steps"] == 12
    steps = [told[1] for told in made.told if told[0] == "log"]
    assert steps == [4, 8, 12]
    last = made.told[3][2]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {name: last[name] for name in lines[2] if name != "step"} == {
        k: v for k, v in lines[2].items() if k != "step"
    }
    assert last["system/memory_gib"] > 0.01
    assert last["system/rows_per_second"] == pytest.approx(64 * last["system/steps_per_second"])
    assert not any(name.startswith("system/") for line in lines for name in line)
    assert made.told[5][1:] == (12, {f"eval/{name}": value for name, value in metrics.items()})
    assert made.told[6][1:] == (12, "contact_sheet", SHEET)
    assert made.told[7] == ("close", False)


@pytest.mark.parametrize("breaks", ["start", "log", "pause", "eval", "picture", "close"])
def test_a_logger_that_fails_warns_once_and_the_run_is_the_same(recorded, tmp_path, breaks):
    plain, _ = run(tmp_path / "plain", log_to=("jsonl",))
    recorded.breaks = breaks
    with pytest.warns(Doubt) as warned:
        sae, _ = run(tmp_path / "run")
    (text,) = [str(each.message) for each in warned]
    assert warned[0].filename == __file__, "who called train"
    assert text.startswith("log_to: wandb failed at ")
    assert f"RuntimeError: no {breaks} today)" in text
    assert bool((sae.W_enc == plain.W_enc).all())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "plain" / "metrics.jsonl").read_bytes()
    whole = ["start", "log", "log", "log", "pause", "eval", "picture", "close"]
    assert [what for what, *_ in Other.made[0].told] == whole


@pytest.mark.parametrize(
    ("hangs", "at"),
    [
        ("start", "start"),
        ("log", "step 4"),
        ("pause", "the end of the steps"),
        ("eval", "the evaluation"),
        ("picture", "the contact sheet"),
        ("close", "the end"),
    ],
)
def test_a_logger_that_hangs_is_left_behind(recorded, impatient, tmp_path, hangs, at):
    recorded.hangs = hangs
    with pytest.warns(Doubt) as warned:
        run(tmp_path / "run")
    (text,) = [str(each.message) for each in warned]
    assert text == f"log_to: wandb was still at {at} after 0.5 s of waiting for it; the run goes on without it"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "eval/l0" in lines[-1]
    assert [what for what, *_ in Other.made[0].told][-3:] == ["eval", "picture", "close"]
    assert beside.hanging == ["wandb"]
    told = len(recorded.made[0].told)
    recorded.awake.set()
    for thread in threading.enumerate():
        if thread.name == "log_to wandb":
            thread.join(120)
    assert len(recorded.made[0].told) <= told + 1, "it did what it was at, and nothing more"


def test_steps_do_not_wait_for_a_logger(recorded, tmp_path):
    """One that is slow has all that it was told in the end; one that is too far behind is left out."""
    recorded.hangs = "log"
    run(tmp_path / "run", on_step=lambda step: recorded.awake.set() if step == 12 else None)
    assert [told[1] for told in recorded.made[0].told if told[0] == "log"] == [4, 8, 12]
    logger = beside.Beside("slow", lambda: recorded.awake)
    recorded.awake.clear()
    for step in range(beside.MOST_BEHIND + 2):
        logger.tell(f"step {step}", lambda awake: awake.wait())
    assert logger.failure is not None
    assert logger.failure.startswith("is 1,000 calls behind, still at")
    assert beside.hanging == ["slow"]


def test_of_several_saes_a_silent_logger_is_waited_for_once(recorded, impatient, tmp_path):
    recorded.hangs = "start"
    options = RunOptions(tmp_path / "grid", "cpu", log_to=("wandb", "trackio"))
    with pytest.warns(Doubt, match="wandb was still at start") as warned:
        train_many(ROWS, dict.fromkeys("abc", SAE), TrainConfig(steps=2, batch_size=64), options)
    assert len(warned) == 1
    assert len(recorded.made) == 1
    assert [made.told[-1] for made in Other.made] == [("close", False)] * 3


def test_who_does_not_want_to_wait_waits_for_none(recorded, tmp_path, monkeypatch):
    """Ctrl-C while a logger of one of several SAEs is waited for: it is left out of all of them at once."""
    recorded.hangs, waits, settle = "log", [], beside.Beside.settle

    def interrupted(self, done, deadline):
        if self._now == "start":
            return settle(self, done, deadline)
        waits.append(self._now)
        raise Interrupted("interrupted")

    monkeypatch.setattr(beside.Beside, "settle", interrupted)
    options = RunOptions(tmp_path / "grid", "cpu", log_to=("wandb",))
    with pytest.raises(Interrupted):
        train_many(ROWS, dict.fromkeys("abc", SAE), TrainConfig(steps=2, batch_size=64, lr=1e-3), options)
    assert len(waits) == 1
    assert beside.hanging == ["wandb"] * 3


@pytest.mark.parametrize("why", [Interrupted("enough"), ValueError("a fault")])
def test_several_saes_that_end_early_are_closed_at_once(recorded, tmp_path, monkeypatch, why):
    """Each close comes after the others have begun, so that slow ones do not add up."""
    together = threading.Barrier(3, timeout=120)
    monkeypatch.setattr(Recorded, "close", lambda self, failed: (together.wait(), self._do("close", failed)))

    def stop(step):
        raise why

    options = RunOptions(tmp_path / "grid", "cpu", log_to=("wandb",))
    with pytest.raises(type(why)):
        train_many(ROWS, dict.fromkeys("abc", SAE), TrainConfig(steps=2, batch_size=64), options, on_step=stop)
    assert [made.told[-1] for made in recorded.made] == [("close", isinstance(why, ValueError))] * 3


def test_stdout_is_as_it_was_whoever_ends_first(monkeypatch, capsys):
    """Two runs in two threads, of which the first that began ends first; a progress bar that outlives its run."""
    whole = sys.stdout
    first, second = beside.quiet_stdout(), beside.quiet_stdout()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    kept = sys.stdout
    second.__exit__(None, None, None)
    sys.stdout = kept
    speaker = threading.Thread(target=print, args=("heard",))
    speaker.start()
    speaker.join()
    sys.stdout = whole
    said = capsys.readouterr()
    assert (said.out, said.err) == ("heard\n", "")


def test_the_command_ends_where_a_logger_hangs(recorded, impatient, tmp_path, monkeypatch, capsys):
    """Its package may wait for it when Python ends; what it prints is not the result."""
    np.save(tmp_path / "x.npy", np.asarray(X))
    recorded.hangs = "close"
    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(Other, "close", lambda self, failed: print("words of a package"))
    words = ("--activations", tmp_path / "x.npy", "--output", tmp_path / "out", "--steps", 2, "--d-sae", 32, "--k", 3)
    monkeypatch.setattr(sys, "argv", ["saevlm-fast", "train", *map(str, words), "--json", "--log-to", "wandb,trackio"])
    with pytest.raises(SystemExit):
        main()
    assert ends == [0]
    said = capsys.readouterr()
    assert json.loads(said.out)["output"]
    assert "words of a package" in said.err
    assert "wandb was still at the end" in said.err
    monkeypatch.setattr("saevlm_fast.cli.run_app", lambda app, name: 1 / 0)
    with pytest.raises(SystemExit):
        main()
    assert ends == [0, 1]
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)  # %run in a notebook
    with pytest.raises(SystemExit):
        main()
    assert ends == [0, 1]


def test_other_threads_of_a_notebook_print_where_they_did(recorded, tmp_path, monkeypatch, capsys):
    """Where a run is in a thread, what the notebook prints meanwhile is not a logger's."""
    monkeypatch.setattr(Other, "close", lambda self, failed: print("words of a package"))
    is_training, has_printed = threading.Event(), threading.Event()

    def in_the_middle(step):
        is_training.set()
        has_printed.wait(120)

    kept = {"log_to": ("trackio",), "on_step": in_the_middle}
    trained = threading.Thread(target=run, args=(tmp_path / "run",), kwargs=kept)
    trained.start()
    assert is_training.wait(120)
    print("words of the notebook")
    has_printed.set()
    trained.join(120)
    assert capsys.readouterr() == ("words of the notebook\n", "words of a package\n")


def test_a_sheet_that_fails_is_a_warning(recorded, tmp_path):
    options = RunOptions(tmp_path / "run", "cpu", log_to=("wandb",))
    with pytest.warns(Doubt, match="no contact sheet could be made"):
        train(ROWS, SAE, TrainConfig(steps=2, batch_size=64), options, on_picture=lambda sae: 1 / 0)
    assert "picture" not in [what for what, *_ in recorded.made[0].told]


def test_no_sheet_is_made_that_nobody_sees(tmp_path):
    options = RunOptions(tmp_path / "run", "cpu")
    train(ROWS, SAE, TrainConfig(steps=2, batch_size=64), options, on_picture=lambda sae: 1 / 0)


def stop_at(step):
    def on_step(now):
        if now == step:
            raise Interrupted("enough")

    return on_step


def test_a_resumed_run_is_the_same_to_a_logger(recorded, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path / "run", on_step=stop_at(8), checkpoint_every=6)
    run(tmp_path / "run", resume=True, checkpoint_every=6)
    first, second = recorded.made
    assert first.told[-1] == ("close", False)
    assert first.run.name == second.run.name
    assert first.run.name.startswith("run-")
    assert (first.run.n_steps, second.run.n_steps) == (0, 6)
    run(tmp_path / "other" / "run")
    assert recorded.made[2].run.name != first.run.name


def test_a_damaged_name_costs_the_name_alone(recorded, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path / "run", on_step=stop_at(8), checkpoint_every=6)
    (tmp_path / "run" / "watch.json").write_text("{")
    with pytest.warns(Doubt, match="goes on under another name"):
        run(tmp_path / "run", resume=True, checkpoint_every=6)


def test_a_replaced_run_has_another_name_and_no_file_is_open_when_it_moves(recorded, tmp_path):
    output = tmp_path / "run"
    run(output)
    (output / "tensorboard").mkdir()
    (output / "tensorboard" / "events.out.tfevents.1.host.2.0").touch()
    (output / "notes.txt").touch()
    run(output, force=True)
    first, second = recorded.made
    assert second.run.name.startswith("run-")
    assert first.run.name != second.run.name
    assert second.directories[4] == output / ".replacement", "paused while it is there"
    assert second.directories[5] == output
    assert json.loads((output / "watch.json").read_text())["name"] == second.run.name
    assert not (output / "tensorboard").exists()
    assert (output / "notes.txt").exists()


def test_an_error_of_the_run_is_told_and_raised(recorded, tmp_path):
    bad = np.full((500, 16), 1e30, np.float32) * np.linspace(1, 2, 500, dtype=np.float32)[:, None]
    config = TrainConfig(steps=20, batch_size=64, lr=1e38, warmup_steps=0)
    with pytest.raises(ValueError, match="NaN or inf"):
        train(bad, SAE, config, RunOptions(None, "cpu", log_to=("wandb",)))
    assert recorded.made[0].told[-1] == ("close", True)


def test_other_processes_of_a_run_log_nothing(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run()
    assert recorded.made == []


def test_warnings_reach_the_terminal_in_one_line(recorded, tmp_path):
    np.save(tmp_path / "x.npy", np.asarray(X))
    recorded.breaks = "log"
    arguments = {"--activations": tmp_path / "x.npy", "--output": tmp_path / "out", "--steps": 4, "--d-sae": 32}
    arguments |= {"--k": 3, "--device": "cpu", "--log-to": "wandb", "--log-every": 1}
    text = run_command("train", *(word for pair in arguments.items() for word in pair))
    assert text.count("warning: log_to: wandb failed at step 1 (RuntimeError: no log today)") == 1
    assert "second line" not in text


def test_each_of_several_saes_is_a_run_of_its_own_in_one_group(recorded, tmp_path):
    options = RunOptions(tmp_path / "grid", "cpu", log_every=4, log_to=("wandb",))
    config, saes = TrainConfig(steps=8, batch_size=64, lr=1e-3), {"a": SAE, "b": SAEConfig(16, 64, 3)}
    looks = {"b": Look({"ms_mean": 0.25}, lambda: SHEET)}
    trained = train_many(ROWS, saes, config, options, on_finished=lambda saes: looks)
    for made, name, d_sae in zip(recorded.made, "ab", (32, 64), strict=True):
        picture = ["picture"] if name == "b" else []
        assert [what for what, *_ in made.told] == ["start", "log", "log", "pause", "eval", *picture, "close"]
        assert made.run.name.startswith(f"{name}-")
        assert made.run.config["sae"]["d_sae"] == d_sae
        assert made.told[4][2]["eval/l0"] == trained[name].metrics["l0"]
    assert trained["b"].metrics["ms_mean"] == recorded.made[1].told[4][2]["eval/ms_mean"] == 0.25
    groups = {made.run.group for made in recorded.made} | {made.run.config["group"] for made in recorded.made}
    assert len(groups) == 1
    assert next(iter(groups)).startswith("grid-")
    train_many(ROWS, saes, config, RunOptions(tmp_path / "grid", "cpu", log_to=("wandb",), resume=True))
    assert [made.run.name for made in recorded.made[2:]] == [made.run.name for made in recorded.made[:2]]
    assert {made.run.group for made in recorded.made} <= groups
    train_many(ROWS, {"a": SAE}, config, RunOptions(tmp_path / "one", "cpu", log_to=("wandb",)))
    assert recorded.made[-1].run.group is None


@pytest.fixture(scope="module")
def from_photos(tmp_path_factory):
    """Words of a run from photos through a small tower, by two SAEs at two places."""
    folder = tmp_path_factory.mktemp("small")
    tower, photos = save_clip(folder / "clip"), save_photos(folder / "photos", 20)
    words = ("train", "--model", f"hf:{tower}", "--images", photos, "--device", "cpu", "--workers", 0, "--steps", 4)
    words += ("--batch-size", 8, "--image-batch", 8, "--d-sae", 32, "--k", "3,4", "--log-every", 2)
    return words


def test_one_pass_shows_images_and_is_the_same_with_a_logger_that_fails(recorded, from_photos, tmp_path):
    words = (*from_photos, "--layer", 2, "--tokens", "cls,patches")
    run_command(*words, "--output", tmp_path / "plain")
    recorded.breaks = "log"
    text = run_command(*words, "--output", tmp_path / "run", "--log-to", "wandb,trackio")
    assert text.count("warning: log_to: wandb failed at step 2 (RuntimeError: no log today)") == 1, "once for all"
    names = [f"residual-2-{tokens}/k{k}" for tokens in ("cls", "patches") for k in (3, 4)]
    assert len(Other.made) == len(names)
    for made in Other.made:
        whole = ["start", "log", "log", "pause", "eval", "picture", "close"]
        assert [what for what, *_ in made.told] == whole
        assert "eval/ms_mean" in made.told[4][2]
        step, name, image = made.told[5][1:]
        assert (step, name) == (4, "contact_sheet")
        assert len(image.getcolors(1 << 20)) > 100, "photos are in it"
    assert len({made.run.group for made in Other.made}) == 1
    for name in names:
        made = [made for made in Other.made if made.run.name.startswith(name.replace("/", "-"))]
        assert len(made) == 1
        for file in ("sae_weights.safetensors", "metrics.jsonl"):
            assert (tmp_path / "run" / name / file).read_bytes() == (tmp_path / "plain" / name / file).read_bytes()


def test_a_grid_from_a_store_shows_the_store_s_images(recorded, from_photos, tmp_path):
    run_command(*from_photos, "--layer", 2, "--output", tmp_path / "run", "--keep-store", tmp_path / "kept")
    words = ("train", "--activations", tmp_path / "kept", "--device", "cpu", "--steps", 2, "--batch-size", 8)
    run_command(*words, "--d-sae", 32, "--k", "3,4", "--output", tmp_path / "grid", "--log-to", "wandb")
    for made in recorded.made:
        (picture,) = [told[3] for told in made.told if told[0] == "picture"]
        assert len(picture.getcolors(1 << 20)) > 100
