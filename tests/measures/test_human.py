"""Agreement with people: on an archive of the released layout, made here."""

import csv
import json
import math

import numpy as np
import pytest

from command import files_below, run, run_json
from saevlm_fast.measures import human

K, N, PAIRS = 12, 60, 80
LAYOUT = ("k_x", "k_y", "R_user", "MS_x_dino", "MS_y_dino", "MS_x_clip", "MS_y_clip")


def brute_force(acts_N, emb_NE):
    r = (acts_N - acts_N.min()) / (acts_N.max() - acts_N.min())
    u = emb_NE / np.linalg.norm(emb_NE, axis=1, keepdims=True)
    i, j = np.triu_indices(len(r), 1)
    return ((u @ u.T)[i, j] * r[i] * r[j]).sum() / (r[i] * r[j]).sum()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """benchmark/archive/*.csv with ._ files, and embeddings of the images; people follow the score, mostly."""
    root = tmp_path_factory.mktemp("human")
    folder = root / "benchmark" / "archive"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    emb = {name: generator.normal(size=(N, 6)) + np.eye(6)[np.arange(N) % 6] * 3 for name in ("dino", "clip")}
    ids = 7 * np.arange(K) + 3
    acts = np.maximum(generator.normal(size=(K, N)), 0)
    for k in range(K):  # the later, the more of one kind
        acts[k, np.arange(N) % 6 == k % 6] += 0.5 * k
    ms = {name: np.array([brute_force(row, each) for row in acts]) for name, each in emb.items()}
    x = generator.integers(0, K, PAIRS)
    y = (x + generator.integers(1, K, PAIRS)) % K
    chose_x = (ms["dino"][x] > ms["dino"][y]) ^ (generator.random(PAIRS) < 0.2)
    with open(folder / "pairs.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(LAYOUT)
        for a, b, chose in zip(x, y, chose_x):
            scores = [f"{ms[name][k]:.6f}" for name in ("dino", "clip") for k in (a, b)]
            writer.writerow([ids[a], ids[b], ids[a] if chose else ids[b], *scores])
    with open(folder / "activations.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["k", *(f"a_{i + 1}" for i in range(N))])
        writer.writerows([[k, *(f"{value:.6g}" for value in row)] for k, row in zip(ids, acts)])
        writer.writerow([999, *([0] * N)])  # in no pair
    tops = np.argsort(-acts, 1)[:, :16]
    with open(folder / "top16_images.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["k", *(f"x_{i + 1}" for i in range(16))], *([k, *row] for k, row in zip(ids, tops))]
        )
    for name in ("pairs.csv", "activations.csv"):
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7")
    for name, each in emb.items():
        np.save(root / f"{name}.npy", each.astype(np.float32))
    return root, {"ids": ids, "acts": acts, "ms": ms, "x": x, "y": y, "chose_x": chose_x, "tops": tops, "emb": emb}


def test_the_layout_is_read(archive):
    root, made = archive
    found = human.read_benchmark(root / "benchmark")
    assert (found.neurons == made["ids"]).all()
    assert (found.x_P == made["x"]).all()
    assert (found.chose_x_P == made["chose_x"]).all()
    np.testing.assert_allclose(found.of_neurons("clip"), made["ms"]["clip"], atol=1e-6)
    np.testing.assert_allclose(human.read_activations(found), made["acts"], rtol=1e-5)


def test_choices_by_letters_are_the_same(archive, tmp_path):
    root, made = archive
    text = (root / "benchmark" / "archive" / "pairs.csv").read_text().splitlines()
    lines = [text[0]]
    for line, chose in zip(text[1:], made["chose_x"]):
        cells = line.split(",")
        lines.append(",".join([*cells[:2], "x" if chose else "y", *cells[3:]]))
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    assert (human.read_benchmark(tmp_path).chose_x_P == made["chose_x"]).all()


def test_scores_are_made_again_and_the_order_is_verified(archive):
    root, made = archive
    from saevlm_fast.data.rows import open_activations

    found = human.read_benchmark(root / "benchmark")
    acts = human.read_activations(found)
    variants = human.ms_variants(acts, open_activations(root / "dino.npy"))
    np.testing.assert_allclose(variants["paper"], made["ms"]["dino"], atol=1e-4)
    assert human.verify_order(found, variants["paper"])[0] == "dino"
    np.save(root / "shuffled.npy", np.random.default_rng(1).permutation(made["emb"]["dino"]).astype(np.float32))
    shuffled = human.ms_variants(acts, open_activations(root / "shuffled.npy"))["paper"]
    with pytest.raises(ValueError, match="another order"):
        human.verify_order(found, shuffled)
    u = made["emb"]["clip"] / np.linalg.norm(made["emb"]["clip"], axis=1, keepdims=True)
    cosine = (u[made["tops"]] @ u[made["tops"]].transpose(0, 2, 1)).sum((1, 2))
    grid = human.top_cosine(found, open_activations(root / "clip.npy"))
    np.testing.assert_allclose(grid, (cosine - 16) / (16 * 15), atol=1e-6)


def test_agreement_by_hand(archive):
    root, made = archive
    found = human.read_benchmark(root / "benchmark")
    score = made["ms"]["clip"].copy()
    score[0], score[1] = math.nan, score[2]
    got = human.agreement(found, score)
    agree, bins, ties, undefined = [], {}, 0, 0
    gaps = np.abs(np.round(made["ms"]["dino"][made["x"]], 6) - np.round(made["ms"]["dino"][made["y"]], 6))
    for a, b, chose, gap in zip(made["x"], made["y"], made["chose_x"], gaps):
        values = score[a], score[b]
        undefined += any(math.isnan(each) for each in values)
        ties += values[0] == values[1]
        half = any(math.isnan(each) for each in values) or values[0] == values[1]
        agree.append(0.5 if half else float((values[0] > values[1]) == chose))
        bins.setdefault(int(gap / 0.1 + 1e-9), []).append(agree[-1])
    assert got["pooled"]["value"] == pytest.approx(np.mean(agree), abs=1e-12)
    assert got["macro"]["value"] == pytest.approx(np.mean([np.mean(each) for each in bins.values()]), abs=1e-12)
    assert (got["ties"], got["n_undefined"]) == (ties, undefined)
    assert sum(each["n"] for each in got["bins"]) == PAIRS
    low, high = got["pooled"]["interval"]
    assert low < got["pooled"]["value"] < high


def test_a_coin_and_the_choices_themselves(archive):
    found = human.read_benchmark(archive[0] / "benchmark")
    coin = human.agreement(found, np.zeros(K))
    assert (coin["pooled"]["value"], coin["ties"]) == (0.5, PAIRS)
    table = human.against_dino(found, found.of_neurons("dino"))
    assert table == {"only_this": 0, "only_released": 0, "p": 1.0}
    opposite = human.against_dino(found, -found.of_neurons("dino"))
    assert opposite["only_this"] + opposite["only_released"] == PAIRS
    assert opposite["p"] < 1e-3


def test_the_logistic_fit_against_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    generator = np.random.default_rng(0)
    gap = generator.random(500)
    agree = (generator.random(500) < 1 / (1 + np.exp(-3 * gap))).astype(float)
    expected = LogisticRegression(C=1e8, tol=1e-10, max_iter=1000).fit(gap[:, None], agree)
    found = human._logistic(gap, agree)
    assert found["slope"] == pytest.approx(float(expected.coef_[0, 0]), rel=1e-3)
    assert found["intercept"] == pytest.approx(float(expected.intercept_[0]), abs=1e-3)


def test_the_command(archive, tmp_path):
    root, made = archive
    with open(tmp_path / "mine.csv", "w", newline="") as file:
        csv.writer(file).writerows([["k", "score"], *zip(made["ids"][1:], made["ms"]["dino"][1:])])
    words = ("human-agreement", "--benchmark", root / "benchmark", "--output", tmp_path / "a.json", "--device", "cpu")
    more = ("--embeddings", f"{root / 'dino.npy'},{root / 'clip.npy'}", "--scores", tmp_path / "mine.csv")
    more += ("--grid-embeddings", root / "clip.npy")
    assert run_json(*words, *more, "--dry-run")["pairs"] == PAIRS
    assert [*files_below(tmp_path)] == [tmp_path / "mine.csv"]
    text = run(*words, *more)
    found = json.loads((tmp_path / "a.json").read_text())
    assert {*found["scores"]} >= {"released, dino", "n_active", "max_activation", "random", "mean cosine of the grid"}
    assert {each["released"] for each in found["verified"].values()} == {"dino", "clip"}
    same = found["scores"][f"paper, {root / 'dino.npy'}"]["pooled"]["value"]
    assert same == pytest.approx(found["scores"]["released, dino"]["pooled"]["value"], abs=0.03)
    assert "random" in text
    assert (tmp_path / "a.json.settings.toml").is_file()
    assert "already exists" in run(*words, code=2)
    run(*words, "--force")
    wrong = run(*words, "--force", "--embeddings", root / "shuffled.npy", code=2)
    assert wrong.startswith("error: embeddings: ")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("pairs.csv", lambda text: text.replace("R_user", "user"), "no column"),
        ("pairs.csv", lambda text: text.split("\n")[0], "no pairs"),
        ("pairs.csv", lambda text: text.replace("\n", "\n3,10,77,0,0,0,0\n", 1), "R_user of line 2"),
        ("pairs.csv", lambda text: text.replace("\n", "\n3,3,3,0,0,0,0\n", 1), "with itself"),
        ("pairs.csv", lambda text: text.replace("\n", "\n3,10\n", 1), "line 2 has 2 cells"),
        ("pairs.csv", lambda text: text.replace("\n", "\n3,10,x,nan,0,0,0\n", 1), "not finite"),
        ("activations.csv", lambda text: text.replace("\n10,", "\n11,"), "no line of 1 neurons"),
        ("activations.csv", lambda text: text.replace("\n10,", "\n3,"), "stands twice"),
        ("activations.csv", lambda text: text.replace("\n10,", "\n10,5,"), "activations, not"),
        ("activations.csv", lambda text: text.replace("\n10,", "\n10,x"), "activations.csv"),
    ],
)
def test_damage_is_named(archive, tmp_path, name, change, message):
    for file in (archive[0] / "benchmark" / "archive").glob("[!.]*.csv"):
        text = file.read_text().replace("\r\n", "\n")
        (tmp_path / file.name).write_text(change(text) if file.name == name else text)
    with pytest.raises(ValueError, match=message) as caught:
        human.read_activations(human.read_benchmark(tmp_path))
    assert name in str(caught.value)


def test_scores_in_a_file(archive, tmp_path):
    found = human.read_benchmark(archive[0] / "benchmark")
    file = tmp_path / "s.csv"
    file.write_text("3,0.5\n10,\n")
    values = human.read_scores(file, found)
    assert values[0] == 0.5
    assert np.isnan(values[1:]).all()
    for text in ("k,score\n3,a\n", "", "k,score\n1,2\n", "k,score\n3,1\n3,2\n", "k,score\n3\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"scores: .*s\.csv"):
            human.read_scores(file, found)
