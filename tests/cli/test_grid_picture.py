"""The picture of a grid: every SAE is a mark, and no label touches a mark or another label."""

import re

from saevlm_fast.cli.grid_picture import write_picture


def rows(n_places, ks=(5, 10, 20), **more):
    """Crowded on purpose: the places differ by a hair."""
    return [
        {
            "name": f"residual-{place}-cls/{architecture}-k{k}",
            "architecture": architecture,
            "d_sae": 512,
            "l0": k + 0.01 * place,
            "explained_variance": 0.5 + k / 50 + 0.001 * place + 0.01 * (architecture == "topk"),
            **more,
        }
        for place in range(n_places)
        for architecture in ("topk", "matryoshka")
        for k in ks
    ]


def boxes(svg):
    """(left, top, right, bottom) of the labels of points, and centres of marks behind the legend's."""
    labels = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class="small">(k\d+)</text>', svg)
    found = [(float(x), float(y) - 9, float(x) + 5.8 * len(text), float(y) + 2) for x, y, text in labels]
    marks = re.findall(r'<path class="mark" d="M([\d.]+),([\d.]+)a[^"]*" fill="[^"]*"><title>', svg)
    return found, [(float(x) + 4.5, float(y)) for x, y in marks]


def test_labels_touch_nothing_and_are_of_what_differs(tmp_path):
    write_picture(tmp_path / "grid.svg", rows(3), "by <somebody>")
    svg = (tmp_path / "grid.svg").read_text()
    labels, marks = boxes(svg)
    assert len(marks) == 18
    assert len(labels) >= 9
    for i, (left, top, right, bottom) in enumerate(labels):
        assert all(right <= a or c <= left or bottom <= b or d <= top for a, b, c, d in labels[:i])
        assert not any(left < x < right and top < y < bottom for x, y in marks)
    assert all(f"residual-{place}-cls, topk" in svg for place in range(3)), "the legend"
    assert "by &lt;somebody&gt;" in svg


def test_ticks_are_round_numbers_and_marks_have_names(tmp_path):
    write_picture(tmp_path / "grid.svg", rows(1))
    svg = (tmp_path / "grid.svg").read_text()
    assert all(f'class="small middle">{tick}</text>' in svg for tick in (5, 10, 15, 20))
    assert "<title>residual-0-cls/topk-k5</title>" in svg


def test_an_sae_without_a_score_is_left_out_of_the_panels_of_scores(tmp_path):
    made = rows(1, ms_mean=0.5)
    made[0]["ms_mean"] = None
    write_picture(tmp_path / "grid.svg", made)
    svg = (tmp_path / "grid.svg").read_text()
    assert svg.count("<title>residual-0-cls/topk-k5</title>") == 1
    assert svg.count("<title>residual-0-cls/topk-k10</title>") == 3
    assert "mean Monosemanticity Score" in svg
    made = [row | {"ms_mean": None} for row in made]
    write_picture(tmp_path / "none.svg", made)
    assert "Monosemanticity" not in (tmp_path / "none.svg").read_text()
