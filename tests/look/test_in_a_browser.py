"""The pages in a real browser, from file://, without a network: headless Chromium by playwright."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pages import cells_of, headers, rows, shown_heat, truth
from planted_scenes import GRID, HOSTILE, N, browser_path

from command import run
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder

pytestmark = pytest.mark.browser
playwright = pytest.importorskip("playwright.sync_api")
if browser_path() is None:
    pytest.skip("no browser on this machine", allow_module_level=True)


def test_it_sorts_filters_and_searches(visit):
    tab = visit()
    assert tab.inner_text(".count") == "16 of 16 latents"
    for click, order in ((1, 1), (2, -1)):
        del click
        tab.click('[data-key="latent"] button')
        assert rows(tab) == [str(i) for i in range(16)][::order]
    tab.click('[data-key="density"] button')
    density = [float(text) for text in rows(tab, [*headers(tab)].index("density"))]
    assert density == sorted(density, reverse=True)
    tab.click("text=+ Filter")
    tab.select_option(".filter select", "density")
    tab.fill('.filter input[placeholder="min"]', "0.001")
    assert tab.inner_text(".count") == "12 of 16 latents"
    tab.fill("#search", "nothing like it")
    assert tab.inner_text(".count") == "0 of 16 latents"
    tab.fill("#search", "5")
    assert rows(tab) == ["5"]
    tab.reload()
    assert rows(tab) == ["5"], "the address holds search and filters"


def test_any_measure_sorts_and_is_then_a_column(visit, planted, tmp_path):
    columns = {f"m{i}": [float((latent * 7) % 16 + i) for latent in range(16)] for i in range(9)}
    table = {"latent": list(range(16)), "__proto__": [1.0] * 16} | columns
    pq.write_table(pa.table(table), tmp_path / "scores.parquet")
    words = pa.table({"latent": [5, 3], "name": ["red", None], "word_1": ["red", "sea"], "score_1": [0.4, 0.1]})
    pq.write_table(words, tmp_path / "names.parquet")
    more = ("--scores", tmp_path / "scores.parquet", "--names", tmp_path / "names.parquet", "--device", "cpu")
    run("report", "--sae", planted / "sae", "--activations", planted / "store", "--output", tmp_path / "LATENT", *more)
    tab = visit(page=tmp_path / "LATENT" / "index.html")
    assert tab.inner_text("#detail h2").startswith("Latent 5"), "the strongest that has a name is opened"
    assert "m8" not in headers(tab)
    tab.select_option('[aria-label="Sort by"]', "m8")
    assert tab.get_attribute('[aria-sort="descending"]', "data-key") == "m8"
    assert rows(tab)[:2] == ["9", "2"]
    tab.select_option('[aria-label="Sort by"]', "latent")
    assert "m8" not in headers(tab)
    tab.fill("#search", "sea")
    assert rows(tab) == ["3"], "words are found where they are no names"


def test_a_neighbour_of_a_pinned_latent_is_of_its_own_sae(visit, planted, tmp_path):
    shutil.copytree(planted / "sae", tmp_path / "other")
    saes = ("--sae", planted / "sae", "--sae", tmp_path / "other")
    run("report", *saes, "--activations", planted / "store", "--output", tmp_path / "r", "--device", "cpu")
    tab = visit("#latent=3&pin=1.5", page=tmp_path / "r" / "index.html")
    tab.click(".pinned .link >> nth=0")
    assert "sae=1" in tab.url


def test_a_picture_that_fires_on_no_patch_says_so(visit):
    """On CLS alone: its map is empty."""
    figure = "(heat) => Pictures.figure([0, 1.5, heat], { grid: [8, 8], latent: 3 }).textContent"
    tab = visit()
    assert [tab.evaluate(figure, heat) for heat in ("", "AAD/")] == ["1.50 (no patch)", "1.50"]


def test_the_copied_command_is_of_this_latent_wherever_the_sae_is(visit, planted, tmp_path):
    place = tmp_path / "LATENT of ALPHA"
    shutil.copytree(planted / "sae", place)
    run("report", "--sae", place, "--activations", planted / "store", "--output", tmp_path / "r", "--device", "cpu")
    tab = visit("#latent=3", page=tmp_path / "r" / "index.html")
    tab.click("text=Copy steer command")
    text = tab.inner_text(".toast")
    assert "LATENT of ALPHA' --layer" in text
    assert re.search(r"--latent 3 --alpha [\d.]+$", text)


@pytest.mark.parametrize("form", [(), ("--single-file",)])
def test_pictures_that_are_left_out_are_asked_of_nobody(form, visit, planted, tmp_path):
    page = tmp_path / ("one.html" if form else "r")
    words = ("--sae", planted / "sae", "--activations", planted / "store", "--device", "cpu", "--images", "none")
    run("report", *words, *form, "--output", page)
    tab = visit("#latent=3", page=page if form else page / "index.html")
    tab.wait_for_selector(".picture canvas[data-missing]")


def test_numbers_stand_beside_those_of_the_control(visit, controlled):
    tab = visit("#latent=3", page=controlled)
    tab.wait_for_selector(".measures td")
    heads = tab.eval_on_selector_all(".measures thead th", "cells => cells.map((cell) => cell.textContent)")
    assert heads == ["measure", "value", "among all", "percentile", "in control"]
    cells = tab.eval_on_selector_all(
        ".measures tbody tr", "rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    held = {row[0]: row[4] for row in cells}
    own = {row[0]: row[3] for row in cells}
    expected = tab.evaluate(
        """() => {
            const { floats, get } = SAEVLM;
            const of = (sae) => [...floats(get("index").saes[sae].measures.find((m) => m.key === "mean").values)];
            const value = of(0)[3];
            return [0, 1].map((sae) => {
                const known = of(sae).filter((v) => !Number.isNaN(v));
                if (sae === 0) known.splice(known.indexOf(value), 1);
                const below = known.filter((v) => v < value).length, equal = known.filter((v) => v === value).length;
                return Math.round((100 * (below + equal / 2)) / known.length);
            });
        }"""
    )
    assert [own["mean"], held["mean"]] == [str(each) for each in expected]
    assert held["MS"].isdigit()
    assert "depth" in held
    text = tab.inner_text("#detail")
    assert "MS by projection; below it its interval" in text
    assert re.search(r"MS\t[\d.]+\s+[\d.]+ to [\d.]+", text)
    assert "<i>red</i>" in text
    assert "a <b>red</b> thing" in text
    assert re.search(r"sign flip\t0.100\t50 %", text)
    assert "fire on the same" not in text
    tab.goto(f"file://{controlled}#view=overview")
    tab.wait_for_selector("article")
    assert tab.locator("article").count() == 2
    assert "control" in tab.inner_text("article >> nth=1")
    assert re.search(r"explained variance, of 5,760 rows\s+\d", tab.inner_text("article >> nth=0"))


def test_percentiles_of_what_is_equal_and_of_very_few(visit, planted, tmp_path):
    """Equal numbers are in the middle, neither the best nor the worst; of two of a control nothing is above 100."""
    few = SparseAutoencoder(SAEConfig(12, 2, 1, "topk"))
    few.save_pretrained(tmp_path / "few")
    pq.write_table(pa.table({"latent": range(16), "same": [1.0] * 16}), tmp_path / "scores.parquet")
    words = ("--sae", planted / "sae", "--activations", planted / "store", "--control-sae", tmp_path / "few")
    run("report", *words, "--scores", tmp_path / "scores.parquet", "--output", tmp_path / "r", "--device", "cpu")
    tab = visit("#latent=3", page=tmp_path / "r" / "index.html")
    tab.wait_for_selector(".measures td")
    assert cells_of(tab, "same")[3] == "50"
    held = tab.locator(".measures tbody tr td:last-child").all_inner_texts()
    assert all(0 <= int(text) <= 100 for text in held if text.isdigit())
    assert len(set(held)) > 1


def test_a_class_written_from_right_to_left_leaves_numbers_alone(visit, planted, tmp_path):
    """What is drawn, not what is in the text: the digits of a percentage stand after the name, in their order."""
    ids = [f"a/{i:04d}.png" for i in range(N - 1)] + [f"a/{HOSTILE}"]
    names = ["\u202eabc", "\u05e9\u05dc"] * (N // 2)
    pq.write_table(pa.table({"image": ids, "side": names}), tmp_path / "labels.parquet")
    words = ("--sae", planted / "sae", "--activations", planted / "store", "--labels", tmp_path / "labels.parquet")
    run("report", *words, "--output", tmp_path / "r", "--device", "cpu")
    tab = visit("#latent=3", page=tmp_path / "r" / "index.html")
    tab.wait_for_selector(".titles .chip")
    places = tab.evaluate(
        """() => {
            const text = document.querySelector(".titles .chip").firstChild, range = document.createRange();
            return [...text.data].map((letter, i) => {
                range.setStart(text, i);
                range.setEnd(text, i + 1);
                return [letter, range.getBoundingClientRect().left];
            });
        }"""
    )
    digits = [(letter, left) for letter, left in places if letter.isdigit() or letter == "%"]
    assert len(digits) >= 3
    assert [left for _, left in digits] == sorted(left for _, left in digits)
    assert min(left for _, left in digits) > max(left for letter, left in places if letter.isalpha())


def test_points_of_several_saes_lie_on_the_same_axes(visit, controlled):
    tab = visit("#view=overview")
    tab.goto(f"file://{controlled}#view=overview")
    tab.wait_for_selector("article")
    tab.evaluate(
        """() => {
            window.drawn = [];
            const fill = CanvasRenderingContext2D.prototype.fillText;
            CanvasRenderingContext2D.prototype.fillText = function (text, x) {
                const wide = this.measureText(text).width;
                const left = this.textAlign === "right" ? x - wide : this.textAlign === "center" ? x - wide / 2 : x;
                window.drawn.push([this.canvas, text, left]);
                fill.apply(this, arguments);
            };
        }"""
    )
    tab.select_option("label:has-text('Up') select", "mean")
    axes = tab.evaluate(
        """() => [...document.querySelectorAll("canvas.scatter")].map((canvas) =>
            window.drawn.filter(([of]) => of === canvas).map(([, text]) => text))"""
    )
    assert len(axes) == 2
    assert axes[0] == axes[1]
    assert len(axes[0]) == 10
    assert tab.evaluate("Math.min(...window.drawn.map(([, , left]) => left))") >= 0, "no sign is cut off"


def test_near_misses_and_what_a_threshold_is(visit, planted, tmp_path):
    """Latent 3 reads red: it fires where a whole patch is, 4, and nearly where most of one is."""
    sae = SparseAutoencoder(SAEConfig(12, 16, 3, "batch_topk"))
    sae.load_state_dict(SparseAutoencoder.from_pretrained(planted / "sae").state_dict(), strict=False)
    sae.threshold.fill_(3.9)
    sae.save_pretrained(tmp_path / "sae")
    words = ("--sae", tmp_path / "sae", "--activations", planted / "store", "--device", "cpu")
    run("report", *words, "--output", tmp_path / "r")
    tab = visit("#latent=3", page=tmp_path / "r" / "index.html")
    tab.wait_for_selector("h3:text('Near misses')")
    part = tab.locator(".part", has=tab.locator("h3:text('Near misses')"))
    values = [float(text) for text in part.locator(".act").all_inner_texts()]
    assert values == sorted(values, reverse=True)
    assert 3 < values[0] <= 3.9
    assert "It fires above 3.90, the line." in tab.inner_text("#detail")
    assert tab.locator("line.cut").count() == 1
    run("report", *words, "--output", tmp_path / "mean", "--pool", "mean")
    tab = visit("#latent=3", page=tmp_path / "mean" / "index.html")
    tab.wait_for_selector("h3:text('Activations')")
    assert "It fires above" not in tab.inner_text("#detail"), "the mean of an image's rows may be below"


def test_the_steer_command_follows_the_strength(visit, controlled):
    tab = visit("#latent=3", page=controlled)
    tab.wait_for_selector(".command")
    once = float(tab.inner_text(".command").split("--alpha ")[1])
    tab.select_option('[aria-label="Strength"]', "-1")
    assert float(tab.inner_text(".command").split("--alpha ")[1]) == -once
    tab.click("text=Copy >> nth=-1")
    assert f"--latent 3 --alpha -{once:g}" in tab.inner_text(".toast")


def test_stars_are_kept_and_exported(visit):
    tab = visit("#latent=3")
    tab.wait_for_selector("[aria-label='Star this latent']")
    tab.keyboard.press("s")
    tab.reload()
    tab.wait_for_selector("body.ready")
    tab.check("#stars")
    assert rows(tab) == ["★ 3"]
    with tab.expect_download() as caught:
        tab.click("text=Export stars")
    saved = json.loads(Path(caught.value.path()).read_text())
    (latent,) = saved["saes"][0]["latents"]
    assert latent["latent"] == 3
    assert latent["density"] > 0


def test_a_blind_check_mixes_both_and_counts_them_apart(visit, controlled):
    tab = visit("#view=blind", page=controlled)
    n_all = int(re.search(r"0 of (\d+) judged", tab.inner_text("#overview"))[1])
    assert n_all >= 4
    assert not re.search(r"Latent \d|control SAE|activation", tab.inner_html("#overview"))
    for i in range(4):
        tab.wait_for_selector(f"text={i} of {n_all} judged")
        tab.wait_for_selector("#overview .picture canvas[data-image]")
        tab.keyboard.press(str(1 + i % 2))
    tab.wait_for_selector(f"text=4 of {n_all} judged")
    tab.keyboard.press("j")
    tab.keyboard.press("s")
    assert "view=blind" in tab.url, "keys of the list are none of this view"
    tab.click("text=Start anew")
    tab.wait_for_selector("text=Forget all 4?")
    tab.click("text=Count")
    table = tab.eval_on_selector_all(".plain tbody tr", "rows => rows.map((row) => row.children[1].textContent)")
    assert table == ["2", "2"]
    with tab.expect_download() as caught:
        tab.click("text=Save verdicts")
    verdicts = json.loads(Path(caught.value.path()).read_text())["verdicts"]
    assert sorted((each["control"], each["verdict"] in ("one", "several")) for each in verdicts) == [
        *[(False, True)] * 2,
        *[(True, True)] * 2,
    ]


def test_a_link_leads_to_a_latent_and_keys_go_on(visit):
    tab = visit("#latent=7&sort=latent&desc=0")
    assert tab.inner_text("h2") == "Latent 7"
    tab.keyboard.press("j")
    assert "latent=8" in tab.url
    tab.keyboard.press("k")
    tab.keyboard.press("k")
    assert tab.inner_text("h2") == "Latent 6"
    tab.keyboard.press("s")
    tab.check("#stars")
    assert rows(tab) == ["★ 6"]
    tab.keyboard.press("o")
    assert tab.is_visible("#overview article")
    tab.keyboard.press("/")
    tab.evaluate("location.hash = '#latent=9'")
    tab.wait_for_selector("h2:text-is('Latent 9')")
    assert visit("#latent=99&sae=7&sort=x&f=a:b").inner_text(".count") == "16 of 16 latents"


@pytest.mark.parametrize("hash", ["#latent=16", "#latent=-1", "#latent=3&sae=7", "#latent=<b>"])
def test_a_link_that_leads_nowhere_says_so_and_shows_no_other_latent(hash, visit):
    tab = visit(hash)
    assert "There is no latent" in tab.inner_text("#detail .problem")
    assert tab.locator(".picture").count() == 0
    tab.keyboard.press("j")
    tab.wait_for_selector(".picture")
    assert tab.locator(".problem").count() == 0


def test_a_planted_latent_shows_its_images_and_its_heat_lies_on_the_object(visit):
    share = truth().numpy()

    def mass_on_objects(latent):
        pictures = shown_heat(visit(f"#latent={latent}"))
        assert len(pictures) > 10
        places = [N - 1 if HOSTILE in name else int(name[2:6]) for name, _, _ in pictures]
        inside = [heat[share[i] > 0].sum() / heat.sum() for i, (_, _, heat) in zip(places, pictures)]
        return places, float(np.mean(inside))

    places, mass = mass_on_objects(3)
    assert all(share[i].max() > 0 for i in places), "every top image has a red object"
    strongest = np.sort(share.max(1))[::-1][: len(places)]
    np.testing.assert_allclose(np.sort(share[places].max(1))[::-1], strongest, atol=1e-6)
    assert mass == 1.0, "a latent that reads red objects lights up where they are and nowhere else"
    _, control = mass_on_objects(5)
    base = float((share > 0).mean())
    assert control < 3 * base < 0.5, "one of noise lights up anywhere"


def test_heat_of_a_random_control_lies_anywhere(visit, planted, tmp_path):
    """An SAE of random directions, made for the report: its latents' heat is not on red objects, as latent 3's is."""
    words = ("--sae", planted / "sae", "--activations", planted / "store", "--control-sae", "untrained")
    run("report", *words, "--output", tmp_path / "r", "--device", "cpu")
    page, share = tmp_path / "r" / "index.html", truth().numpy()

    def masses(hash):
        pictures = shown_heat(visit(hash, page=page))
        places = [N - 1 if HOSTILE in name else int(name[2:6]) for name, _, _ in pictures]
        return [heat[share[i] > 0].sum() / heat.sum() for i, (_, _, heat) in zip(places, pictures) if heat.sum()]

    assert np.mean(masses("#latent=3")) == 1.0
    tab = visit("#sae=1&latent=0", page=page)
    alive = tab.evaluate(
        """() => [...SAEVLM.floats(SAEVLM.get("index").saes[1].measures.find((m) => m.key === "n_active").values)]"""
    )
    control = [np.mean(masses(f"#sae=1&latent={i}")) for i in np.argsort(alive)[-4:].tolist()]
    assert np.mean(control) < 0.8
    tab.wait_for_selector(".buttons")
    assert "steer" not in tab.inner_text("#detail").lower(), "an SAE without a directory steers nothing"


def test_the_heat_is_drawn_on_the_picture_where_it_belongs(visit):
    """The canvas itself: patches that light up differ from the picture without, the others do not."""
    tab = visit("#latent=3")
    tab.wait_for_selector(".picture canvas[data-image]")
    tab.wait_for_timeout(300)
    box = tab.locator(".picture").first.bounding_box()
    clip = {key: round(box[key]) for key in ("x", "y", "width", "height")}
    from io import BytesIO

    from PIL import Image

    def pixels():
        return np.asarray(Image.open(BytesIO(tab.screenshot(clip=clip))).convert("RGB")).astype(int)

    with_heat = pixels()
    tab.uncheck('input[data-heat="heat"]')
    tab.mouse.move(0, 0)
    tab.wait_for_timeout(300)
    bare = pixels()
    differs = np.abs(with_heat - bare).max(2) > 12
    name = tab.get_attribute(".picture canvas", "data-image")
    share = truth()[int(name[2:6])].view(GRID, GRID).numpy()
    side = differs.shape[0] // GRID
    cells = differs[: side * GRID, : side * GRID].reshape(GRID, side, GRID, side)[:, 3:-3, :, 3:-3].mean((1, 3))
    assert (share[cells > 0.5] > 0).all(), "only where the object is"
    assert (cells[share > 0.3] > 0.5).all(), "everywhere where much of it is"
    tab.check('input[data-heat="edge"]')
    tab.mouse.move(0, 0)
    tab.wait_for_timeout(300)
    changed = np.abs(pixels() - bare).max(2)[: side * GRID, : side * GRID] > 12
    changed = changed.reshape(GRID, side, GRID, side).mean((1, 3))
    near = np.pad(share >= 0.5 * share.max(), 1)
    near = np.lib.stride_tricks.sliding_window_view(near, (3, 3)).any((2, 3))
    assert changed.any()
    assert changed.max() < 0.7, "a line"
    assert near[changed > 0.02].all(), "around the object alone"
    tab.check('input[data-heat="own"]')
    assert "each one's largest" in tab.inner_text(".legend")


def test_names_of_files_and_classes_stay_text(visit, report):
    tab = visit("#latent=3")
    found = tab.evaluate("""async () => {
        const [last] = [await SAEVLM.load("tiles/0")];
        return last.findIndex((tile) => tile[0].includes("onerror"));
    }""")
    assert found >= 0
    tab.evaluate(
        "(tile) => document.querySelector('.pictures').append(Pictures.figure([tile, 1], { grid: null, latent: 3 }))",
        found,
    )
    tab.wait_for_selector(".pictures .picture[title*='onerror']")
    tab.locator(".pictures").first.locator(".picture").last.click()
    assert HOSTILE in tab.inner_text("dialog p")
    assert tab.locator("img").count() == 0
    assert tab.locator("main b:not(.bandhead b)").count() == 0
    assert "<b>odd</b>" in tab.inner_text("#detail")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 420])
@pytest.mark.parametrize("view", ["#latent=3", "#view=overview", "#view=blind"])
@pytest.mark.skipif("AXE" not in os.environ, reason="AXE names no axe.min.js")
def test_no_serious_fault_of_accessibility(scheme, width, view, visit, controlled):
    """Also after another measure was chosen to sort by, with a filter open."""
    tab = visit(view, page=controlled, color_scheme=scheme, bypass_csp=True, viewport={"width": width, "height": 900})
    if view == "#latent=3":
        tab.select_option('[aria-label="Sort by"]', "mean")
        tab.click("text=+ Filter")
    tab.wait_for_timeout(400)
    tab.evaluate(Path(os.environ["AXE"]).read_text())
    found = tab.evaluate("axe.run({ preload: false }).then((result) => result.violations)")
    bad = [
        (each["id"], [node["html"][:120] for node in each["nodes"][:3]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert not bad
    wide = "(nodes) => nodes.filter((node) => node.scrollWidth > node.clientWidth + 1).map((node) => node.textContent)"
    assert tab.eval_on_selector_all(".part, .card, #overview, #detail, html", wide) == [], "nothing hangs over the side"


def test_a_single_file_works_alone(visit, planted, tmp_path):
    words = ("--sae", planted / "sae", "--activations", planted / "store", "--device", "cpu")
    run("report", *words, "--single-file", "--output", tmp_path / "one.html")
    tab = visit("#latent=3", page=tmp_path / "one.html")
    tab.wait_for_selector(".picture canvas[data-image]")
    assert tab.inner_text("h2").startswith("Latent 3")
    assert not tab.locator("canvas[data-missing]").count()
