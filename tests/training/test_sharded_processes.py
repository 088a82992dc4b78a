"""`torchrun -m saevlm_fast.cli train`: real processes over gloo, on one machine and as two nodes of it."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from test_sharded_run import check_same_sae
from torchrun import Torchrun, bound_socket, messages

from saevlm_fast.config import RunOptions, SAEConfig, SAESize, TrainConfig
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.synthetic import PlantedConcepts
from saevlm_fast.training.checkpoints import checkpoints
from saevlm_fast.training.one_pass import train_from_images
from saevlm_fast.training.run import train
from tiny_tower import save_clip, save_photos

pytestmark = pytest.mark.distributed
SAE, RECIPE = SAEConfig(32, 129, 6, "batch_topk"), {"batch_size": 256, "lr": 3e-3, "seed": 1}
OURS = "another of the 3 ranks has ended, or has not answered for"


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, PlantedConcepts(32, 16, 60, seed=3).sample(3000)[0])
    return path


@pytest.fixture(scope="module")
def alone(matrix, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    config = TrainConfig(steps=50, **RECIPE)
    train(open_activations(matrix), SAE, config, RunOptions(output, "cpu", log_every=10))
    return output


def words(matrix, output, steps=50, *more):
    return [
        *("train", "--activations", matrix, "--output", output, "--d-sae", 129, "--k", 6, "--steps", steps),
        *("--batch-size", 256, "--lr", 3e-3, "--seed", 1, "--device", "cpu", "--log-every", 10, *more),
    ]


def two_nodes(place, *arguments):
    """A torchrun each, of one rank."""
    bound = bound_socket()
    meet = ["--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={bound.getsockname()[1]}"]
    nodes = [
        Torchrun(of_node, 1, place / f"log{node}", (*meet, f"--node-rank={node}"))
        for node, of_node in enumerate(arguments)
    ]
    nodes[0].bound = bound  # as long as it may need it
    return nodes


@pytest.mark.parametrize("nodes", [1, 2], ids=["two ranks", "two nodes"])
def test_the_run_of_one_process(alone, matrix, tmp_path, nodes):
    arguments = words(matrix, tmp_path / "run")
    if nodes == 1:
        with Torchrun(arguments, 2, tmp_path / "log") as run:
            code, said = run.end()
    else:
        first, second = two_nodes(tmp_path, arguments, arguments)
        with first, second:
            code, said = first.end()
            assert second.end()[0] == 0, second.said()
            assert "wrote" not in second.said()
    assert code == 0, said
    assert said.count("wrote") == 1  # one rank speaks
    assert "2 ranks: batch_topk SAE 32 -> 129" in said
    check_same_sae(tmp_path / "run", alone)
    assert len(list(checkpoints(tmp_path / "run")[-1].glob("train_state_*_of_0002.safetensors"))) == 2


@pytest.mark.parametrize(("replicas", "parts"), [(2, 2), (2, 1)])
def test_replicas_make_the_run_of_one_process(alone, matrix, tmp_path, replicas, parts):
    data_on = "device" if parts == 2 else "auto"
    arguments = words(matrix, tmp_path / "run", 50, "--data-parallel", replicas, "--data-on", data_on)
    with Torchrun(arguments, replicas * parts, tmp_path / "log") as run:
        code, said = run.end()
    assert code == 0, said
    assert f"{replicas * parts} ranks, {replicas} replicas: batch_topk SAE 32 -> 129" in said
    check_same_sae(tmp_path / "run", alone)
    newest = checkpoints(tmp_path / "run")[-1]
    assert sum(file.stat().st_size for file in newest.glob("train_state_*")) < 1.1 * 129 * 32 * 24, "written twice"


def test_mono_loss_of_two_replicas_is_that_of_one_process(matrix, tmp_path):
    config = TrainConfig(steps=20, mono_weight=0.3, **RECIPE)
    train(open_activations(matrix), SAE, config, RunOptions(tmp_path / "alone", "cpu"))
    arguments = words(matrix, tmp_path / "run", 20, "--data-parallel", 2, "--mono-weight", 0.3)
    with Torchrun(arguments, 2, tmp_path / "log") as run:
        code, said = run.end()
    assert code == 0, said
    check_same_sae(tmp_path / "run", tmp_path / "alone")


def test_a_grid_of_two_ranks(alone, matrix, tmp_path):
    """Its members are the SAEs that are trained alone; the summary is written once."""
    arguments = [*words(matrix, tmp_path / "grid"), "--k", "6,3", "--embeddings", matrix]
    with Torchrun(arguments, 2, tmp_path / "log") as run:
        code, said = run.end()
    assert code == 0, said
    assert "2 ranks: 2 SAEs of 32 in one pass" in said
    assert said.count("wrote") == 1
    summary = json.loads((tmp_path / "grid" / "grid.json").read_text())
    assert [sae["name"] for sae in summary["saes"]] == ["k6", "k3"]
    assert all(0 < sae["ms_mean"] <= 1 for sae in summary["saes"])
    check_same_sae(tmp_path / "grid" / "k6", alone)
    assert {"cfg.json", "settings.toml", "run.json"} <= {path.name for path in (tmp_path / "grid" / "k3").iterdir()}


def test_one_pass_goes_on_after_a_kill(tmp_path):
    """Two replicas of an SAE, trained while images pass and are kept: rank 1 is killed; both go on, and end as one
    process does, by held-out images too."""
    tower, photos = save_clip(tmp_path / "clip"), save_photos(tmp_path / "photos", 60)
    arguments = [
        *("train", "--model", f"hf:{tower}", "--images", photos, "--layer", 2, "--tokens", "random:3", "--workers", 0),
        *("--d-sae", 65, "--k", 4, "--steps", 60, "--batch-size", 16, "--buffer", "90", "--image-batch", 7),
        *("--lr", 3e-3, "--device", "cpu", "--checkpoint-every", 2, "--scored-images", 20),
        *("--validation-images", save_photos(tmp_path / "held out", 10)),
    ]
    shared = [*arguments, "--output", tmp_path / "run", "--data-parallel", 2, "--collective-timeout", 60]
    shared += ["--keep-store", tmp_path / "kept"]
    with Torchrun(shared, 2, tmp_path / "log") as run:
        run.wait_for(tmp_path / "run")
        os.kill(run.ranks()[1], signal.SIGKILL)
        code, said = run.end()
    assert code != 0
    (message,) = messages(said)
    assert message.startswith("another of the 2 ranks has ended, or has not answered for")
    with Torchrun([*shared, "--resume"], 2, tmp_path / "log") as run:
        code, said = run.end()
    assert code == 0, said
    assert said.count("wrote") == 1
    assert "2 ranks: 1 SAE on" in said
    assert "evaluation on 30 validation rows" in said
    known = {"steps": 60, "batch_size": 16, "lr": 3e-3, "device": "cpu", "output": tmp_path / "alone"}
    known |= {"layer": 2, "tokens": "random:3", "workers": 0, "buffer": "90", "image_batch": 7}
    train_from_images(f"hf:{tower}", photos, {"": SAESize(d_sae=65, k=4)}, keep_store=tmp_path / "theirs", **known)
    check_same_sae(tmp_path / "run", tmp_path / "alone")
    ours, theirs = open_activations(tmp_path / "kept"), open_activations(tmp_path / "theirs")
    assert ours.n_rows == theirs.n_rows == 180
    assert torch.equal(ours.rows(torch.arange(180)), theirs.rows(torch.arange(180)))


def test_a_bad_option_on_one_node_ends_the_other_at_once(matrix, tmp_path):
    """Its timeout is 600 s, by which that one would be waited for."""
    arguments = words(matrix, tmp_path / "run", 50)
    waiting, failing = two_nodes(tmp_path, arguments, [*arguments, "--lr", "-1"])
    with waiting, failing:
        assert failing.end()[0] != 0
        code, said = waiting.end(300)
    assert "lr: -1.0 must be" in failing.said()
    assert code != 0
    assert not messages(said), "the other has spoken"
    assert not (tmp_path / "run").exists()


def test_replicas_that_do_not_divide_the_ranks_are_refused_once(matrix, tmp_path):
    with Torchrun(words(matrix, tmp_path / "run", 50, "--data-parallel", 2), 3, tmp_path / "log") as run:
        code, said = run.end()
    assert code != 0
    assert messages(said) == ["error: data_parallel: 2 replicas must divide the ranks that torchrun started, 3"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_replica_that_is_gone_or_hangs_ends_all(alone, matrix, tmp_path, number):
    """Of 2 replicas of 2 ranks the last one; the rest wait for it in different groups. Three ranks go on."""
    more = "--checkpoint-every", 2, "--collective-timeout", 10
    arguments = words(matrix, tmp_path / "run", 50, *more)
    with Torchrun([*arguments, "--data-parallel", 2], 4, tmp_path / "log") as run:
        run.wait_for(tmp_path / "run")
        os.kill(run.ranks()[3], number)
        end = time.monotonic() + 120
        while not messages(run.said()):
            assert time.monotonic() < end
            time.sleep(0.2)
        (message,) = messages(run.said())
    assert message.startswith("another of the 4 ranks has ended, or has not answered for 10 s (collective_timeout)")
    if number == signal.SIGKILL:
        with Torchrun([*arguments, "--resume", "--data-parallel", 3], 3, tmp_path / "log") as run:
            code, said = run.end()
        assert code == 0, said
        check_same_sae(tmp_path / "run", alone)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_all_and_the_run_goes_on(alone, matrix, tmp_path, rank):
    """3 ranks, one of which is killed; 2 go on, and end where one process ends that was never killed."""
    arguments = words(matrix, tmp_path / "run", 50, "--checkpoint-every", 2, "--data-on", "device")
    with Torchrun(arguments, 3, tmp_path / "log") as run:
        run.wait_for(tmp_path / "run")
        os.kill(run.ranks()[rank], signal.SIGKILL)
        code, said = run.end()
    assert code != 0
    (message,) = messages(said)
    assert message.startswith(OURS)
    assert "--resume" in message
    with Torchrun([*arguments, "--resume"], 2, tmp_path / "log") as run:
        code, said = run.end()
    assert code == 0, said
    assert "resume: " in said
    check_same_sae(tmp_path / "run", alone)


def test_a_rank_that_hangs_is_an_error_within_the_timeout(matrix, tmp_path):
    arguments = words(matrix, tmp_path / "run", 5000, "--checkpoint-every", 5, "--collective-timeout", 8)
    with Torchrun(arguments, 3, tmp_path / "log") as run:
        run.wait_for(tmp_path / "run")
        os.kill(run.ranks()[1], signal.SIGSTOP)
        end = time.monotonic() + 180
        while not messages(run.said()):
            assert time.monotonic() < end
            time.sleep(0.2)
        (message,) = messages(run.said())
    assert message.startswith(f"{OURS} 8 s (collective_timeout)")


def test_a_rank_that_is_killed_before_the_first_step_is_one_sentence(matrix, tmp_path):
    """While the first weights are drawn, which takes a while of so many latents."""
    arguments = [*words(matrix, tmp_path / "run", 50), "--d-sae", 400_000]
    with Torchrun(arguments, 2, tmp_path / "log") as run:
        end = time.monotonic() + 120
        while "2 ranks: " not in run.said():
            assert time.monotonic() < end, run.said()
            time.sleep(0.02)
        os.kill(run.ranks()[1], signal.SIGKILL)
        code, said = run.end()
    assert code != 0
    (message,) = messages(said)
    assert message.startswith("another of the 2 ranks has ended, or has not answered for 600 s (collective_timeout)")
    assert message.endswith("its connection to rank 0 is closed")
    assert "pair.cc" not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_ranks_after_the_same_step(matrix, tmp_path, number):
    """Ctrl-C, which torchrun passes on to ranks that have had it already; and SIGTERM to torchrun."""
    with Torchrun(words(matrix, tmp_path / "run", 5000, "--checkpoint-every", 10), 2, tmp_path / "log") as run:
        run.wait_for(tmp_path / "run")
        os.killpg(run.process.pid, number) if number == signal.SIGINT else os.kill(run.process.pid, number)
        _, said = run.end()
    (message,) = messages(said)
    step = int(message.split()[3].rstrip(";"))
    assert message.startswith(f"interrupted after step {step}; continue with: torchrun ... -m saevlm_fast.cli train")
    assert checkpoints(tmp_path / "run")[-1].name == f"step_{step:08d}"


def test_what_one_rank_alone_meets_is_one_message(matrix, tmp_path):
    """A row that is not finite, in rank 1's share of some batch."""
    rows = np.load(matrix)
    rows[2999, 3] = np.nan  # rows of a batch ascend: the last rank reads it
    np.save(tmp_path / "bad.npy", rows)
    with Torchrun(words(tmp_path / "bad.npy", tmp_path / "run"), 2, tmp_path / "log") as run:
        _, said = run.end()
    (message,) = messages(said)
    assert "row 2999" in message
    assert "exitcode  : 2" in said


def test_a_command_of_one_process_says_so_once(tmp_path):
    with Torchrun(["synthetic", tmp_path / "out"], 2, tmp_path / "log") as run:
        _, said = run.end()
    (message,) = messages(said)
    assert message.startswith("error: synthetic: runs in one process, and torchrun started 2 (WORLD_SIZE)")
