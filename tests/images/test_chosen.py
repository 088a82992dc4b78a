"""Images that a list of ids chooses."""

import pytest

from saevlm_fast.images.chosen import chosen_images
from saevlm_fast.images.open import open_images


def test_the_images_of_a_list_in_the_order_of_the_source(tmp_path):
    source = open_images("scenes:test:9")
    ids = [source.image_id(i) for i in (7, 2, 3)]
    (tmp_path / "kept.txt").write_text("".join(f"{name}\r\n" for name in ids) + "\n")
    chosen = chosen_images(source, tmp_path / "kept.txt")
    assert [chosen.image_id(i) for i in range(len(chosen))] == [source.image_id(i) for i in (2, 3, 7)]
    for i, number in enumerate((2, 3, 7)):
        assert chosen.read(i) == source.read(number)
        assert chosen.caption(i) == source.caption(number)
        assert chosen.label(i) == source.label(number)
    (tmp_path / "other.txt").write_text(f"{ids[0]}\n")
    assert len({s.fingerprint() for s in (source, chosen, chosen_images(source, tmp_path / "other.txt"))}) == 3


def test_lists_that_are_refused(tmp_path):
    source = open_images("scenes:test:3")
    file, name = tmp_path / "kept.txt", source.image_id(0)
    with pytest.raises(ValueError, match=r"only: .*kept\.txt is not a file"):
        chosen_images(source, file)
    for data, said in (
        (b"\n \n", "lists no id"),
        (f"{name}\n{name}\n".encode(), "lists an id twice"),
        (f"{name}\nx\ny\n".encode(), "lists 'x', which no image has, and 1 others"),
        (b"\xff\n", "not UTF-8"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            chosen_images(source, file)
