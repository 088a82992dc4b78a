"""What a page shows in a browser, read from it."""

import re

import numpy as np
from planted_scenes import COLOUR, N, patch_shares

from saevlm_fast.box.scenes import COLOURS, Scenes


def rows(tab, column=0):
    """Texts of a column, from top to bottom."""
    cells = tab.eval_on_selector_all(
        ".rows .row", "(rows, i) => rows.map((row) => [row.offsetTop, row.children[i].textContent])", column
    )
    return [text for _, text in sorted(cells)]


def cells_of(tab, measure):
    """Texts of a measure's row."""
    rows = tab.eval_on_selector_all(
        ".measures tbody tr", "rows => rows.map((row) => [...row.children].map((cell) => cell.textContent))"
    )
    return next(row for row in rows if row[0] == measure)


def headers(tab):
    return tab.eval_on_selector_all("[role=columnheader]", "cells => cells.map((cell) => cell.dataset.key)")


# The truth: which scenes have a red object, and where.
def truth():
    return patch_shares(Scenes(0, "test").batch(0, N))[..., COLOURS.index(COLOUR)]


def shown_heat(tab):
    """(image, [patches]) of the top images, as the page has decoded them."""
    found = tab.evaluate(
        """async ([sae, latent]) => {
            const chunk = await SAEVLM.load(`s${sae}/chunk/0`);
            const pictures = [];
            for (const [tile, act, heat] of chunk[latent].t) {
                const map = new Array(64).fill(0), packed = SAEVLM.bytes(heat);
                for (let i = 0; i < packed.length; i += 3) map[packed[i] + 256 * packed[i + 1]] = packed[i + 2];
                pictures.push([(await Pictures.tile(tile)).name, act, map]);
            }
            return pictures;
        }""",
        [int((re.search(rf"\b{name}=(\d+)", tab.url) or [0, 0])[1]) for name in ("sae", "latent")],
    )
    return [(name, act, np.array(heat, float)) for name, act, heat in found]
