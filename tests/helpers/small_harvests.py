"""Harvests of a tiny tower over a few photos, and what is read from their stores."""

import os
import signal

import torch

from saevlm_fast.config import HarvestOptions
from saevlm_fast.data.codes import open_codes
from saevlm_fast.data.rows import open_activations
from saevlm_fast.data.store import read_index
from saevlm_fast.harvesting.config import HarvestConfig
from saevlm_fast.harvesting.run import harvest
from saevlm_fast.images.open import open_images
from saevlm_fast.towers.tokens import Tokens
from saevlm_fast.towers.tower import HookPoint
from tiny_tower import N_BLOCKS

N_IMAGES = 22
POINTS = (*(HookPoint("residual", layer) for layer in range(N_BLOCKS)), HookPoint("projection"))


def run_harvest(tower, photos, output, config=None, **options):
    config = config or HarvestConfig(POINTS, (Tokens.parse("cls"), Tokens.parse("random:3")), batch_size=4)
    options = {"workers": 0} | options
    return harvest(open_images(str(photos)), tower, config, HarvestOptions(output, **options))


def rows_and_items(path):
    store = open_activations(path)
    return store.rows(torch.arange(store.n_rows)), store.items().to_pydict()


def digests(directory):
    """(store, shard number, SHA-256 of its two files) of all stores in a directory: the rows and their order."""
    return sorted(
        (index.parent.name, shard.number, shard.sha256, shard.items_sha256)
        for index in directory.rglob("index.json")
        for shard in read_index(index.parent).shards
    )


def small_units():
    tokens = (Tokens.parse("cls"), Tokens.parse("random:3"))
    return HarvestConfig((HookPoint("residual", 0), HookPoint("projection")), tokens, batch_size=2, images_per_shard=4)


def stop_at_third(done, total, skipped):
    if done > 10:
        os.kill(os.getpid(), signal.SIGINT)


def codes_harvest(tower, photos, output, sae_directory, tokens, **settings):
    config = HarvestConfig((HookPoint("residual", 1),), (Tokens.parse(tokens),), batch_size=2, images_per_shard=4,
                           sae=sae_directory, **settings)  # fmt: skip
    run_harvest(tower, photos, output, config)
    return open_codes(output)


def dense_codes(store):
    """All codes of a store as a dense matrix [N, d_sae]."""
    return torch.cat([codes.dense() for _, codes in store.chunks(7)])


class Upset:
    """Preprocessing that fails for the picture whose first pixel is this."""

    def __init__(self, preprocess, pixel):
        self.preprocess, self.pixel = preprocess, pixel

    def __call__(self, pictures):
        if any(picture.getpixel((0, 0)) == self.pixel for picture in pictures):
            raise ValueError("no such luck")
        return self.preprocess(pictures)


def harvest_arguments(model, photos, output, *more):
    return (
        "harvest", "--model", f"hf:{model}", "--images", photos, "--output", output, "--layer", "0", "--point",
        "residual,projection", "--tokens", "cls,random:3", "--batch-size", 2, "--images-per-shard", 4, *more,
    )  # fmt: skip
