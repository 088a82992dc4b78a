"""Trains tiny-clip, then tiny-llava, on scenes drawn as they go; writes their cards.

One command: `python -m saevlm_fast.box_training all`.

Step s of a run depends on the seed and s alone and its checkpoint is whole or absent, so a killed run goes on where its
last checkpoint was taken. The learning rate is constant after its warm-up and falls to zero over the last quarter of
--steps, which a resumed run may change.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saevlm_fast.activations import prefetch
from saevlm_fast.box_cards import ASSETS, RECORD, write_cards
from saevlm_fast.box_language import CHAT, EOS, IMAGE, Question, partial_descriptions, questions
from saevlm_fast.box_models import (
    N_PATCHES,
    PIXEL_MEAN,
    PIXEL_STD,
    build_clip,
    build_llava,
    build_tokenizer,
    clip_processor,
    llava_processor,
)
from saevlm_fast.files import atomic_directory, atomic_write, write_json_atomic
from saevlm_fast.scenes import SceneBatch, Scenes

CHECKPOINT = "checkpoint.pt"
_TURNS = 4  # questions on one image in a training conversation
_WARMUP = 150
_EASY_STEPS, _SPARE = 1500, 3
_REPORT_EVERY, _SAVE_EVERY = 20, 100
_CLIP_SEED, _LLAVA_SEED = 0, 1  # which part of the seed's randomness each stage uses


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], as the image processor does it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def _rng(seed: int, stage: int, step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stage, step])))


def clip_batch(tokenizer: Any, seed: int, step: int, batch_size: int) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Pixels [N, 3, H, W], tokens of the rich and of the poor descriptions, which scene each of the M describes [M],
    and which descriptions are not wrong for which scene, bool [N, M]."""
    scenes = _clip_scenes(seed, step, batch_size)
    descriptions = partial_descriptions(scenes, _rng(seed, _CLIP_SEED, step))
    texts = descriptions.texts()
    tokens = [  # poor ones are short: padded apart from the rich ones they cost a third
        tokenizer(texts[start : start + batch_size], padding=True, return_tensors="pt")["input_ids"]
        for start in range(0, len(texts), batch_size)
    ]
    return (
        pixels(scenes.images),
        tokens,
        torch.from_numpy(descriptions.scene),
        torch.from_numpy(descriptions.fit(scenes)),
    )


def _clip_scenes(seed: int, step: int, batch_size: int) -> SceneBatch:
    """The first of _SPARE * batch_size scenes; to begin with, those with fewest objects: shapes are learned faster."""
    first, n = step * batch_size * _SPARE, batch_size * (_SPARE if step < _EASY_STEPS else 1)
    scenes = Scenes(seed).batch(first, n)
    return scenes.take(scenes.setting[:, 2].argsort(kind="stable")[:batch_size]) if step < _EASY_STEPS else scenes


def clip_loss(model: Any, batch: tuple[Tensor, list[Tensor], Tensor, Tensor]) -> Tensor:
    """The contrastive loss; a description that happens to fit another scene counts neither for nor against it."""
    images, tokens, scene, fit = batch
    with torch.autocast("cpu", torch.bfloat16):
        image = model.visual_projection(model.vision_model(pixel_values=images).pooler_output)
        text = model.text_projection(torch.cat([model.text_model(input_ids=part).pooler_output for part in tokens]))
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    logits_NM = model.logit_scale.clamp(max=4.6).exp() * image @ text.T
    own = torch.arange(len(image))[:, None] == scene
    others = torch.where(fit, -torch.inf, logits_NM)  # what is left is truly wrong
    right = logits_NM[scene, torch.arange(len(scene))]
    against_texts = torch.logaddexp(right, others.logsumexp(1)[scene]) - right
    against_images = torch.logaddexp(right, others.logsumexp(0)) - right
    assert bool(fit[own].all()), "a description does not fit its own scene"
    return (against_texts.mean() + against_images.mean()) / 2


def llava_batch(tokenizer: Any, seed: int, step: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels [N, 3, H, W], tokens [N, T] and labels [N, T]: conversations of _TURNS questions, or of one caption."""
    scenes = Scenes(seed).batch((2**30 + step) * batch_size, batch_size)  # scenes that tiny-clip was not trained on
    rng = _rng(seed, _LLAVA_SEED, step)
    tokens, labels = [], []
    for objects, setting in zip(scenes.objects, scenes.setting):
        ids, targets = _conversation(tokenizer, _asked(questions(objects, setting), rng))
        tokens.append(torch.tensor(ids))
        labels.append(torch.tensor(targets))
    padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id)
    return pixels(scenes.images), padded, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)


def _asked(possible: list[Question], rng: np.random.Generator) -> list[Question]:
    """A caption, or questions for _TURNS different things, in any order: a later answer must not repeat an earlier."""
    if rng.random() < 0.3:
        return [question for question in possible if question.asks == "caption"]
    chosen: dict[str, Question] = {}
    for i in rng.permutation(len(possible)):
        asks = "shape" if possible[i].asks == "word" else possible[i].asks
        if asks != "caption":
            chosen.setdefault(asks, possible[i])
    words = [question for question in possible if question.asks == "word"]
    if words and rng.random() < 0.3:
        chosen["shape"] = words[0]
    order = [list(chosen)[i] for i in rng.permutation(len(chosen))[:_TURNS]]
    return [chosen[asks] for asks in order]


def _conversation(tokenizer: Any, asked: list[Question]) -> tuple[list[int], list[int]]:
    ids, labels = [tokenizer.bos_token_id], [-100]
    for turn, question in enumerate(asked):
        prompt = CHAT.format(question=question.text).replace(IMAGE, "" if turn else IMAGE * N_PATCHES)
        asked_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(question.answer + EOS, add_special_tokens=False)["input_ids"]
        ids += asked_ids + answer
        labels += [-100] * len(asked_ids) + answer
    return ids, labels


def llava_loss(model: Any, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the answers' words. The tower is frozen and its features carry no gradient."""
    images, tokens, labels = batch
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            hidden = model.model.vision_tower(images, output_hidden_states=True).hidden_states
            features = hidden[model.config.vision_feature_layer][:, 1:]
        embedded = model.get_input_embeddings()(tokens)
        is_image = (tokens == model.config.image_token_id)[..., None]
        projected = model.model.multi_modal_projector(features).to(embedded.dtype)
        embedded = embedded.masked_scatter(is_image, projected)
        states = model.model.language_model(inputs_embeds=embedded).last_hidden_state[:, :-1]
        asked = labels[:, 1:] != -100
        logits = model.lm_head(states[asked])
    return F.cross_entropy(logits.float(), labels[:, 1:][asked])


def lr_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, constant, then linearly to zero over the last quarter."""
    return peak * min(1.0, (step + 1) / _WARMUP, (steps - step) / (steps / 4))


def train(
    model: Any, loss_of: Callable[[Any, Any], Tensor], batch_of: Callable[[int], Any], directory: Path, steps: int,
    lr: float,
) -> dict[str, Any]:  # fmt: skip
    """Trains in place up to step `steps`, from the checkpoint in `directory` where there is one, and leaves one there.

    Returns a record for the model card: steps, lr, minutes (pauses of the process included), loss of the last steps.
    """
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed, plain = ([w for w in weights if (w.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    start, earlier = _resume(model, optimizer, directory)
    begun, losses = time.monotonic(), []
    for step, batch in zip(range(start, steps), prefetch(batch_of, range(start, steps))):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps, lr)
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % _REPORT_EVERY == 0:
            _report(step + 1, steps, (step + 1 - start) / (time.monotonic() - begun), losses[-_REPORT_EVERY:])
        if (step + 1) % _SAVE_EVERY == 0 or step + 1 == steps:
            _save(model, optimizer, step + 1, earlier + time.monotonic() - begun, directory)
    minutes = (earlier + time.monotonic() - begun) / 60
    last = round(float(np.mean(losses[-_SAVE_EVERY:])), 4) if losses else None
    return {"steps": steps, "lr": lr, "minutes": round(minutes, 1), "loss": last}


def _report(done: int, steps: int, rate: float, losses: list[float]) -> None:
    minutes = (steps - done) / rate / 60
    print(f"step {done}/{steps}  loss {np.mean(losses):.4f}  {rate:.2f} steps/s  {minutes:.1f} min left", flush=True)


def _save(model: Any, optimizer: torch.optim.Optimizer, step: int, seconds: float, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "seconds": seconds, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    with atomic_write(directory / CHECKPOINT) as temporary:
        torch.save(state, temporary)


def _resume(model: Any, optimizer: torch.optim.Optimizer, directory: Path) -> tuple[int, float]:
    """The step to go on with and the seconds spent so far."""
    file = directory / CHECKPOINT
    if not file.exists():
        return 0, 0.0
    checkpoint = torch.load(file, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    print(f"resuming at step {checkpoint['step']} of {directory}", flush=True)
    return int(checkpoint["step"]), float(checkpoint["seconds"])


def train_clip(runs: Path, assets: Path, seed: int, steps: int, batch_size: int, lr: float) -> None:
    """Trains tiny-clip and saves it in assets/tiny-clip."""
    torch.manual_seed(seed)
    model, tokenizer = build_clip("eager"), build_tokenizer(ends=True)  # fused attention's backward is slower on CPUs
    record = train(
        model, clip_loss, lambda step: clip_batch(tokenizer, seed, step, batch_size), runs / "clip", steps, lr
    )
    _publish(model, clip_processor(), assets / "tiny-clip", record | {"seed": seed, "batch_size": batch_size})


def train_llava(runs: Path, assets: Path, seed: int, steps: int, batch_size: int, lr: float) -> None:
    """Trains tiny-llava around the tower of assets/tiny-clip and saves it in assets/tiny-llava."""
    from transformers import CLIPModel

    torch.manual_seed(seed)
    clip = CLIPModel.from_pretrained(assets / "tiny-clip", attn_implementation="eager")
    model, tokenizer = build_llava(clip, "eager"), build_tokenizer(ends=False)
    record = train(
        model, llava_loss, lambda step: llava_batch(tokenizer, seed, step, batch_size), runs / "llava", steps, lr
    )
    _publish(model, llava_processor(), assets / "tiny-llava", record | {"seed": seed, "batch_size": batch_size})


def _publish(model: Any, processor: Any, directory: Path, record: dict[str, Any]) -> None:
    import transformers

    record |= {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads()}
    with atomic_directory(directory, replace=True) as temporary:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        write_json_atomic(temporary / RECORD, record)
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors writes for the owner alone; a package is for everyone
    print(f"saved {directory}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("clip", "llava", "all"))
    parser.add_argument("--runs", type=Path, default=Path("runs/box"), help="checkpoints")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the weights go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clip-steps", type=int, default=3000)
    parser.add_argument("--llava-steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parser.parse_args()


def main() -> None:
    """The command line."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    common = {"runs": given.runs, "assets": given.assets, "seed": given.seed, "lr": given.lr}
    if given.stage in ("clip", "all"):
        train_clip(**common, steps=given.clip_steps, batch_size=given.batch_size)
    if given.stage in ("llava", "all"):
        train_llava(**common, steps=given.llava_steps, batch_size=given.batch_size)
    write_cards(given.assets, n_scenes=2000)


if __name__ == "__main__":
    main()
