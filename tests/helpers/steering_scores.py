"""A LLaVA with an SAE to score, and its commands."""

from command import run

LAYER, N_IMAGES, S, DEAD, ALPHA = 2, 40, 48, 7, 30.0


def score_words(box, output, *more):
    places = {"model": f"hf:{box / 'llava'}", "sae": box / "sae", "images": box / "photos", "codes": box / "codes"}
    places |= {"embeddings": box / "embeddings", "text-model": f"hf:{box / 'clip'}", "output": output}
    chosen = {"layer": LAYER, "alpha": ALPHA, "ask": 2, "max-new-tokens": 2, "device": "cpu"}
    given = [word for name, value in (places | chosen).items() for word in (f"--{name}", value)]
    return "steering-score", *given, *more


def score_command(box, output, *more, code=0):
    return run(*score_words(box, output, *more), code=code)


def steer_command(box, *more, code=0):
    photo = next((box / "photos").rglob("*.png"))
    return run("steer", "--model", f"hf:{box / 'llava'}", "--sae", box / "sae", "--layer", LAYER, "--image", photo,
               "--prompt", "What colour is the object?", "--device", "cpu", "--max-new-tokens", 3, *more,
               code=code)  # fmt: skip
