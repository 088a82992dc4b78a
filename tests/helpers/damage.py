"""What another program writes in place of ours: files changed on purpose, whose digests say so or are not there."""

import json

from saevlm_fast.files import sha256_file

DIGESTS = ("sha256", "weights_sha256")


def edit_record(path, **changes):
    """Changes entries of a JSON record and takes its digests away, as one of before, or of another maker, has none."""
    record = {name: value for name, value in json.loads(path.read_text()).items() if name not in DIGESTS}
    path.write_text(json.dumps(record | changes))
    return path


def redigest(store):
    """The index of a store with the digests of its files as they are now."""
    index = json.loads((store / "index.json").read_text())
    for shard in index["shards"]:
        shard["sha256"] = sha256_file(store / shard["file"])
        shard["items_sha256"] = sha256_file(store / shard["items"])
    edit_record(store / "index.json", shards=index["shards"])
    return store
