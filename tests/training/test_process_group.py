"""What is said of ranks that are gone."""

import pytest

from saevlm_fast.training.process_group import lost

UNKNOWN = "NCCL communicator was aborted on rank 2: " + "a long story " * 40 + "ends here"


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:34324", "its connection to rank 2"),
        ("[../gloo/transport/tcp/pair.cc:547] Read error [127.0.0.1]:1: Connection reset by peer", "its connection to"),
        (
            "[../gloo/transport/tcp/pair.cc:460] Timed out waiting 8000ms for recv operation",
            "rank 2 has waited in vain",
        ),
        ("Application timeout caused pair closure", "rank 2 has waited in vain"),
        (UNKNOWN + "\nException raised from somewhere", f"rank 2 met: {UNKNOWN}"),
    ],
)
def test_a_lost_rank_is_told_of_in_our_words_or_in_whole_ones_of_others(raw, cause):
    said = lost(RuntimeError(raw), 2, 4, 8.0)
    head = "another of the 4 ranks has ended, or has not answered for 8 s (collective_timeout): "
    assert said.startswith(head + cause)
    assert ("pair.cc" in said, said.endswith("ends here")) == (False, raw.startswith(UNKNOWN))
