"""Blocks of steering scores on the disk: as they were written, or refused in one line that says what to do."""

import pytest

from damage import mutations, refusal
from saevlm_fast.steering.table import MEASURES, read_block, write_block

NUMBERS = ("answer_share", *MEASURES)
ROWS = [
    {"latent": 5, "n_top": 16, "other_latent": 8, "answer": "a \u732b"} | dict.fromkeys(NUMBERS, 0.1),
    {"latent": 7, "n_top": 0} | dict.fromkeys(("other_latent", "answer", *NUMBERS)),
]


@pytest.fixture
def block(tmp_path):
    write_block(tmp_path / "block_000000.json", ROWS)
    return tmp_path / "block_000000.json"


def test_a_block_is_read_as_it_was_written(block):
    assert read_block(block, [5, 7]) == ROWS
    assert "of latents [5, 7]..., not [5, 8]..." in refusal(lambda path: read_block(path, [5, 8]), block)


def test_every_altered_byte_is_an_error(block):
    whole = block.read_bytes()
    for position in range(len(whole)):
        block.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << position % 8]) + whole[position + 1 :])
        said = refusal(lambda path: read_block(path, [5, 7]), block)
        assert said.endswith("; delete that file and its latents are scored again")


def test_anything_wrong_is_one_line_or_read(block):
    refused = 0
    for damaged in mutations(block.read_text(), 4):
        block.write_bytes(damaged)
        refused += refusal(lambda path: read_block(path, [5, 7]), block) is not None
    assert refused > 100
