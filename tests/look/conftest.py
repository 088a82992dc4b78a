"""The pages of an SAE whose latents were planted by hand."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted_scenes import browser_path, plant

from command import run
from saevlm_fast.config import SAEConfig
from saevlm_fast.sae import SparseAutoencoder


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    """photos, store, embeddings, sae: helpers/planted_scenes.py."""
    root = tmp_path_factory.mktemp("planted")
    plant(root)
    return root


@pytest.fixture(scope="session")
def report(planted, tmp_path_factory) -> Path:
    """The pages."""
    output = tmp_path_factory.mktemp("report") / "pages"
    words = ("--sae", planted / "sae", "--activations", planted / "store", "--embeddings", planted / "embeddings")
    text = run("report", *words, "--output", output, "--device", "cpu")
    assert "left out: names: no --text-model (with --embeddings) and no --names" in text
    assert "left out: heat maps" not in text
    assert "left out: MS" not in text
    assert re.search(r"16 latents, \d+ of \d+ images shown, .* MB; open ", text)
    return output


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, report):
    """Opens a page; in the end nothing may have been said on the console, and nothing asked of anybody else."""
    said, contexts = [], []

    def open_page(hash="", page=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1300, "height": 900}} | options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        tab.on("request", lambda request: outside(request.url))
        tab.goto(f"file://{page or report / 'index.html'}{hash}")
        tab.wait_for_selector("body.ready")
        return tab

    def outside(url):
        if not url.startswith((f"file://{report.parent}", "data:", "file:///tmp")):
            said.append(url)

    yield open_page
    for context in contexts:
        context.close()
    assert not said


@pytest.fixture(scope="module")
def controlled(planted, tmp_path_factory):
    """A report with a control SAE, a taxonomy, a table of scores with a text, and results of steering."""
    root = tmp_path_factory.mktemp("controlled")
    control = SparseAutoencoder(SAEConfig(12, 16, 3, "topk"))
    control.reset_parameters(1)
    control.save_pretrained(root / "control")
    (root / "taxonomy.json").write_text(json.dumps({"even": ["all", "even"], "<b>odd</b>": ["all", "odd"]}))
    (root / "scores.csv").write_text("latent,best_label,best_f1\n3,<i>red</i>,0.5\n")
    row = {"latent": [3], "answer": ["a <b>red</b> thing"], "answer_share": [0.25]}
    row |= {"steered": [0.9], "sign_flip": [0.1], "steered_empty": [0.0], "sign_flip_empty": [0.5]}
    pq.write_table(pa.table(row), root / "steering.parquet")
    words = ("--sae", planted / "sae", "--control-sae", root / "control", "--activations", planted / "store")
    more = ("--embeddings", planted / "embeddings", "--taxonomy", root / "taxonomy.json")
    tables = ("--scores", root / "scores.csv", "--steering", root / "steering.parquet")
    run("report", *words, *more, *tables, "--output", root / "r", "--device", "cpu")
    return root / "r" / "index.html"
