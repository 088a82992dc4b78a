"""What another program writes in place of ours: files changed on purpose, whose digests say so or are not there."""

import json
import random

from saevlm_fast.files import sha256_file

DIGESTS = ("sha256", "weights_sha256")


def edit_record(path, **changes):
    """Changes entries of a JSON record and takes its digests away, as one of before, or of another maker, has none."""
    record = {name: value for name, value in json.loads(path.read_text()).items() if name not in DIGESTS}
    path.write_text(json.dumps(record | changes))
    return path


def flip(path, position):
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def redigest(store):
    """The index of a store with the digests of its files as they are now."""
    index = json.loads((store / "index.json").read_text())
    for shard in index["shards"]:
        shard["sha256"] = sha256_file(store / shard["file"])
        shard["items_sha256"] = sha256_file(store / shard["items"])
    edit_record(store / "index.json", shards=index["shards"])
    return store


# Anything wrong in a record -------------------------------------------------------------------------------------------

WRONG = [None, True, -1, 0, 1.5, 10**30, "", "x", [], {}, [[]], "\ud800", "../../x", 1 << 63]
RAW = ["1e400", "NaN", "-Infinity", "9" * 5000, "[" * 3000 + "]" * 3000, '{"a":' * 90 + "1" + "}" * 90]


def paths_in(value, path=()):
    """The way to every entry of a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from paths_in(value[key], (*path, key))


def mutations(text, seed):
    """The text with one entry of another kind, gone, or not JSON at all; the digests of it are taken away."""
    record = {name: value for name, value in json.loads(text).items() if name not in DIGESTS}
    draw = random.Random(seed)
    for path in list(paths_in(record))[1:]:
        for wrong in [*draw.sample(WRONG, 5), "gone", "raw"]:
            copy = json.loads(json.dumps(record))
            inside = copy
            for key in path[:-1]:
                inside = inside[key]
            if wrong == "gone":
                del inside[path[-1]]
            else:
                inside[path[-1]] = "RAW" if wrong == "raw" else wrong
            yield json.dumps(copy).replace('"RAW"', draw.choice(RAW)).encode()
    for cut in range(0, len(text), max(1, len(text) // 20)):
        yield text[:cut].encode()
    yield text.encode("utf-16")
    yield text.encode() + b"\x00"
    yield b"\xff" + text.encode()


def refusal(read, path, named=True):
    """What a reader says in one line (that names the path); None if it reads. Errors of other kinds are not caught."""
    try:
        read(path)
    except ValueError as error:
        said = str(error)
    else:
        return None
    assert "\n" not in said
    assert not named or str(path) in said
    return said
