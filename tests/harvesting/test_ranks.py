"""The command, and its ranks in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from forked import Forked
from small_harvests import digests, harvest_arguments, run_harvest, small_units
from torchrun import bound_socket

from command import run
from saevlm_fast.data.store import read_index, verify
from saevlm_fast.harvesting import run as run_module
from saevlm_fast.harvesting.stores import HarvestStores
from tiny_tower import save_photos


# From here on: the command, in processes of its own.
def rank_of(rank, world, port, arguments, log):
    """The command as one of torchrun's processes: torchrun's environment."""
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return Forked(arguments, log, environment)


def start_ranks(world, arguments, logs, of_the_last=()):
    """of_the_last: what the last one is told besides."""
    bound = bound_socket()
    port = bound.getsockname()[1]
    told = [*[arguments] * (world - 1), [*arguments, *of_the_last]]
    ranks = [rank_of(rank, world, port, told[rank], logs / f"rank-{rank}.log") for rank in range(world)]
    ranks[0].bound = bound  # as long as it may need it
    for rank in ranks:
        rank.start()
    return ranks


def halt(monkeypatch, after, of_ranks):
    """Ranks that have done so many images do no more: they are there to be ended."""
    forward = run_module._Loop._forward

    def halting(self, *given):
        if self.summary.n_done_here >= after and self.ranks.rank in of_ranks:
            time.sleep(600)
        forward(self, *given)

    monkeypatch.setattr(run_module._Loop, "_forward", halting)


def test_the_command_prints_what_it_did(model, photos, whole, tmp_path):
    text = run(*harvest_arguments(model, photos, tmp_path / "out"))
    for word in ("22 images", "residual-0-cls", "residual-0-random3", "projection", "images/s", "waiting"):
        assert word in text
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--layer", "3"), "layer"),
        (("--layer", "x"), "layer: 'x' is not a whole number"),
        (("--point", "nose"), "point"),
        (("--tokens", "random:0"), "tokens"),
        (("--tokens", "random:17"), "tokens"),
        (("--model", "CLIP"), "model"),
        (("--images", "/nowhere"), "/nowhere"),
        (("--max-skipped", "2"), "max_skipped: 2.0 must be between 0 and 1"),
        (("--device", "tpu"), "device"),
    ],
)
def test_bad_input_ends_in_one_line(model, photos, tmp_path, change, message):
    arguments = list(harvest_arguments(model, photos, tmp_path / "out"))
    if change[0] in arguments:
        arguments[arguments.index(change[0]) + 1] = change[1]
    else:
        arguments += change
    *before, error = run(*arguments, code=2).splitlines()
    assert error.startswith("error:")
    assert message in error
    assert len(before) <= 1  # what model and images were found
    assert not (tmp_path / "out").exists()


def test_ranks_share_the_work_and_give_the_same_rows(model, photos, whole, tmp_path):
    ranks = start_ranks(2, harvest_arguments(model, photos, tmp_path / "out"), tmp_path)
    for rank in ranks:
        rank.join(120)
    said = "".join(rank.log.read_text() for rank in ranks)
    assert [rank.exitcode for rank in ranks] == [0, 0], said
    assert digests(tmp_path / "out") == digests(whole)
    assert said.count("wrote") == 3  # one rank speaks
    for index in (tmp_path / "out").rglob("index.json"):
        verify(index.parent)


def test_torchrun_gives_a_process_what_a_rank_has_here(tmp_path):
    """Its environment, and the command as a module's words."""
    (tmp_path / "told.py").write_text(
        "import json, os, sys\n"
        "names = [name for name in os.environ if 'RANK' in name or 'WORLD' in name or name.startswith('MASTER_')]\n"
        "told = {name: os.environ[name] for name in names} | {'words': sys.argv[1:]}\n"
        "open(os.environ['RANK'] + '.json', 'w').write(json.dumps(told))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "told", "harvest", "--layer", "1"], cwd=tmp_path, timeout=300, check=True)
    for number in range(2):
        told = json.loads((tmp_path / f"{number}.json").read_text())
        assert told.pop("words") == ["harvest", "--layer", "1"]
        here = rank_of(number, 2, int(told["MASTER_PORT"]), [], tmp_path / "log").environment
        here |= {"MASTER_ADDR": told["MASTER_ADDR"]}  # a name of this machine
        assert {name: told[name] for name in here} == here


def test_a_rank_that_fails_ends_the_others_in_one_line(model, spoiled_photos, tmp_path, monkeypatch):
    """Only rank 1 meets an image that cannot be used. No group is left, whose threads could end a rank by a signal."""
    photos, _ = spoiled_photos
    destroy = dist.destroy_process_group
    monkeypatch.setattr(
        dist, "destroy_process_group", lambda: (tmp_path / f"gone-{os.environ['RANK']}").touch() or destroy()
    )
    words = harvest_arguments(model, photos, tmp_path / "out", "--limit", 4, "--images-per-shard", 2)
    ranks = start_ranks(2, words, tmp_path)
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [130, 2]
    waiting, failing = (rank.log.read_text() for rank in ranks)
    assert "error: max_skipped: 1 of 4 images could not be used" in failing
    assert "another of the 2 ranks has ended" in waiting
    assert "RuntimeError" not in waiting + failing
    assert sorted(path.name for path in tmp_path.glob("gone-*")) == ["gone-0", "gone-1"]


def test_a_rank_that_comes_late_finds_the_store_of_which_rank_0_was_refused_the_first_shard(
    model, photos, tmp_path, monkeypatch
):
    """Its own words are of the rank that has ended, and of no store that is gone."""
    prepared, write = HarvestStores.check_prepared, HarvestStores._write_shard

    def late(self, rank):
        for _ in range(600):
            if (tmp_path / "refused").exists():
                break
            time.sleep(0.1)
        time.sleep(1)
        prepared(self, rank)
        (tmp_path / "found").touch()

    def refuse(self, unit, store, writer, rows):
        if os.environ["RANK"] == "0":
            rows[0].values.fill_(torch.inf)
        try:
            write(self, unit, store, writer, rows)
        finally:
            (tmp_path / "refused").touch()

    monkeypatch.setattr(HarvestStores, "check_prepared", late)
    monkeypatch.setattr(HarvestStores, "_write_shard", refuse)
    ranks = start_ranks(2, harvest_arguments(model, photos, tmp_path / "out"), tmp_path)
    for rank in ranks:
        rank.join(120)
    first, other = (rank.log.read_text() for rank in ranks)
    assert [rank.exitcode for rank in ranks] == [2, 130], first + other
    assert re.search(r"error: .*shard-00000\.safetensors as float\d+: row 0, column 0 is inf", " ".join(first.split()))
    assert "another of the 2 ranks has ended" in other
    assert (tmp_path / "found").exists()
    assert "index.json" not in other


@pytest.mark.parametrize(
    ("of_the_last", "message"),
    [
        (("--layer", "1"), "layer: (0, 1) for rank 1, but (0,) for rank 0; every rank needs the same command"),
        (("--output", "{}/elsewhere"), "elsewhere/harvest.json is not there for rank 1; all ranks need the same disk"),
    ],
)
def test_ranks_that_were_started_apart_are_refused(model, photos, tmp_path, of_the_last, message):
    apart = [word.format(tmp_path) for word in of_the_last]
    ranks = start_ranks(2, harvest_arguments(model, photos, tmp_path / "out"), tmp_path, apart)
    for rank in ranks:
        rank.join(120)
    assert ranks[1].exitcode == 2
    assert message in ranks[1].log.read_text()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.distributed
def test_a_rank_that_hangs_ends_the_others_within_the_timeout(model, tmp_path, monkeypatch):
    photos = save_photos(tmp_path / "photos", 200)
    halt(monkeypatch, 60, of_ranks=[1])
    words = harvest_arguments(model, photos, tmp_path / "out", "--collective-timeout", 5)
    ranks = start_ranks(2, words, tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out" / "projection").glob("shard-*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        ranks[0].join(120)
        said = ranks[0].log.read_text()
        assert ranks[0].exitcode == 130, said
        assert "another of the 2 ranks has not answered for 5 s (collective_timeout): rank 1; continue with" in said
    finally:
        ranks[1].kill()
        ranks[1].join()


def test_killed_ranks_are_resumed_by_one_process(tower, model, tmp_path, monkeypatch):
    photos = save_photos(tmp_path / "photos", 200)
    run_harvest(tower, photos, tmp_path / "whole", small_units())
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        halt(patch, 60, of_ranks=[0, 1])
        ranks = start_ranks(2, harvest_arguments(model, photos, output), tmp_path)
    deadline = time.monotonic() + 120
    while len(list((output / "projection").glob("shard-*.safetensors"))) < 3:
        assert all(rank.is_alive() for rank in ranks)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.join()
    assert not read_index(output / "projection").complete
    summary = run_harvest(tower, photos, output, small_units(), resume=True)
    assert 0 < summary.n_done_here < 200
    assert digests(output) == digests(tmp_path / "whole")
