"""Trains tiny-clip, then tiny-llava, on scenes drawn as they go; writes their cards.

One command: `python -m saevlm_fast.box_making.training all`.

Step s of a run depends on the seed and s alone and its checkpoint is whole or absent, so a killed run goes on where its
last checkpoint was taken. The learning rate is constant after its warm-up and falls to zero over the last quarter of
--steps, which a resumed run may change.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saevlm_fast.box.models import ASSETS
from saevlm_fast.box.scenes import IMAGE_SIZE, OBJECT_FACTORS, SCENE_FACTORS, VALUES, SceneBatch, Scenes, value_prompts
from saevlm_fast.box_making.architecture import (
    N_PATCHES,
    PATCH_SIZE,
    PIXEL_MEAN,
    PIXEL_STD,
    build_clip,
    build_llava,
    build_tokenizer,
    clip_processor,
    llava_processor,
)
from saevlm_fast.box_making.cards import RECORD, write_cards
from saevlm_fast.box_making.language import CHAT, EOS, IMAGE, Question, partial_descriptions, questions
from saevlm_fast.data.prefetch import prefetch
from saevlm_fast.files import atomic_directory, atomic_write, write_json_atomic

CHECKPOINT = "checkpoint.pt"
_TURNS = 6  # questions on one image in a training conversation
_WARMUP = 100
_CLIP_LR, _LLAVA_LR = 2e-3, 1e-3  # of the first, 2e-3 learned faster than 1e-3 over 100 steps
_COVERED, _IGNORED = 0.15, -100  # the share of a patch that makes it an object's; the label of one that is nobody's
_REPORT_EVERY, _SAVE_EVERY = 20, 100
_CLIP_SEED, _LLAVA_SEED = 0, 1  # which part of the seed's randomness each stage uses


def pixels(images: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], as the image processor does it."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def _rng(seed: int, stage: int, step: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stage, step])))


class ClipBatch(NamedTuple):
    """N scenes, M descriptions of them, and the V shortest descriptions, one for every value of every factor.

    Attributes:
        pixels: [N, 3, H, W]. tokens: of the rich, of the poor and of the shortest descriptions.
        scene: [M], the scene that each describes. fit: bool [N, M], which descriptions are not wrong for which scene.
        shown: of every factor, bool [N, V_f], which of its values each scene shows.
        covering: int64 [N, T, F], the labels of the object that covers each patch; -100 where none does.
    """

    pixels: Tensor
    tokens: list[Tensor]
    scene: Tensor
    fit: Tensor
    shown: list[Tensor]
    covering: Tensor


def clip_batch(tokenizer: Any, seed: int, step: int, batch_size: int) -> ClipBatch:
    """The batch of one step."""
    scenes = Scenes(seed).batch(step * batch_size, batch_size)
    descriptions = partial_descriptions(scenes, _rng(seed, _CLIP_SEED, step))
    texts = descriptions.texts()
    shortest = [prompt for factor in VALUES for prompt in value_prompts(factor)]
    tokens = [  # poor ones are short: padded apart from the rich ones they cost a third
        tokenizer(part, padding=True, return_tensors="pt")["input_ids"]
        for part in (texts[:batch_size], texts[batch_size:], shortest)
    ]
    scene, fit = torch.from_numpy(descriptions.scene), torch.from_numpy(descriptions.fit(scenes))
    shown = [_shown(scenes, factor) for factor in VALUES]
    return ClipBatch(pixels(scenes.images), tokens, scene, fit, shown, _covering(scenes))


def _shown(scenes: SceneBatch, factor: str) -> Tensor:
    of_objects = factor in OBJECT_FACTORS
    labels, factors = (scenes.objects, OBJECT_FACTORS) if of_objects else (scenes.setting[:, None], SCENE_FACTORS)
    values = torch.from_numpy(labels[:, :, factors.index(factor)])
    return (values[:, :, None] == torch.arange(len(VALUES[factor]))).any(1)


def _covering(scenes: SceneBatch) -> Tensor:
    side = IMAGE_SIZE // PATCH_SIZE
    patches = torch.from_numpy(scenes.masks).float().unflatten(3, (side, PATCH_SIZE)).unflatten(2, (side, PATCH_SIZE))
    share, slot = patches.mean((3, 5)).flatten(2).max(1)
    labels = torch.from_numpy(scenes.objects).gather(1, slot[:, :, None].expand(-1, -1, len(OBJECT_FACTORS)))
    return torch.where((share > _COVERED)[:, :, None], labels, _IGNORED)


class ClipWithHeads(nn.Module):
    """tiny-clip and, for its training alone, linear classifiers of the image and of the patches that objects cover."""

    def __init__(self, clip: Any):
        super().__init__()
        self.clip = clip
        width = clip.config.vision_config.hidden_size
        sizes = {factor: len(values) for factor, values in VALUES.items()}
        self.of_image = nn.ModuleDict({factor: nn.Linear(width, size) for factor, size in sizes.items()})
        self.of_patch = nn.ModuleDict({factor: nn.Linear(width, sizes[factor]) for factor in OBJECT_FACTORS})


def clip_loss(model: ClipWithHeads, batch: ClipBatch) -> Tensor:
    """The contrastive loss over descriptions and over values, and the classifiers' losses.

    Contrast alone is slow to start: while images do not show a factor, the embeddings of its words fall together
    (cosine .999 after 100 steps), and then they teach the images nothing. Classifiers cannot fall together.
    """
    clip = model.clip
    with torch.autocast("cpu", torch.bfloat16):
        seen = clip.vision_model(pixel_values=batch.pixels)
        image = clip.visual_projection(seen.pooler_output)
        pooled = [clip.text_model(input_ids=part).pooler_output for part in batch.tokens]
        text = clip.text_projection(torch.cat(pooled))
        of_image = torch.cat([head(seen.pooler_output) for head in model.of_image.values()], dim=1).float()
        of_patch = [head(seen.last_hidden_state[:, 1:]).float() for head in model.of_patch.values()]
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    by_words = clip.logit_scale.clamp(max=4.6).exp() * image @ text.T
    n = len(batch.scene)
    contrast = _description_loss(by_words[:, :n], batch) + _value_loss(by_words[:, n:], batch.shown)
    return contrast + _value_loss(of_image, batch.shown) + _patch_loss(of_patch, batch.covering)


def _patch_loss(logits: list[Tensor], covering_NTF: Tensor) -> Tensor:
    """Cross-entropy of the patches that an object covers, summed over its factors."""
    losses = [
        F.cross_entropy(of_factor.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)
        for of_factor, labels in zip(logits, covering_NTF.unbind(-1))
    ]
    return torch.stack(losses).sum()


def _value_loss(logits_NV: Tensor, shown: list[Tensor]) -> Tensor:
    """Every value that a scene shows against the values of the same factor that it does not show; mean over factors."""
    losses = []
    for logits, is_shown in zip(logits_NV.split([each.shape[1] for each in shown], dim=1), shown):
        others = torch.where(is_shown, -torch.inf, logits).logsumexp(1, keepdim=True)
        losses.append((torch.logaddexp(logits, others) - logits)[is_shown].mean())
    return torch.stack(losses).mean()


def _description_loss(logits_NM: Tensor, batch: ClipBatch) -> Tensor:
    """Scenes against descriptions both ways; one that happens to fit another scene counts neither for nor against."""
    scene, fit = batch.scene, batch.fit
    own = torch.arange(len(logits_NM))[:, None] == scene
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
    model: Any,
    loss_of: Callable[[Any, Any], Tensor],
    batch_of: Callable[[int], Any],
    directory: Path,
    steps: int,
    lr: float,
) -> dict[str, Any]:
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


def train_clip(runs: Path, assets: Path, seed: int, steps: int, batch_size: int) -> None:
    """Trains tiny-clip and saves it in assets/tiny-clip."""
    torch.manual_seed(seed)
    model = ClipWithHeads(build_clip("eager"))  # fused attention's backward is slower on CPUs
    tokenizer = build_tokenizer(ends=True)
    record = train(
        model, clip_loss, lambda step: clip_batch(tokenizer, seed, step, batch_size), runs / "clip", steps, _CLIP_LR
    )
    _publish(model.clip, clip_processor(), assets / "tiny-clip", record | {"seed": seed, "batch_size": batch_size})


def train_llava(runs: Path, assets: Path, seed: int, steps: int, batch_size: int) -> None:
    """Trains tiny-llava around the tower of assets/tiny-clip and saves it in assets/tiny-llava."""
    from transformers import CLIPModel

    torch.manual_seed(seed)
    clip = CLIPModel.from_pretrained(assets / "tiny-clip", attn_implementation="eager")
    model, tokenizer = build_llava(clip, "eager"), build_tokenizer(ends=False)
    record = train(
        model, llava_loss, lambda step: llava_batch(tokenizer, seed, step, batch_size), runs / "llava", steps, _LLAVA_LR
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
    parser.add_argument("--clip-steps", type=int, default=2400)
    parser.add_argument("--llava-steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=128)
    return parser.parse_args()


def main() -> None:
    """The command line."""
    given = _arguments()
    torch.set_num_threads(given.threads)
    common = {"runs": given.runs, "assets": given.assets, "seed": given.seed}
    if given.stage in ("clip", "all"):
        train_clip(**common, steps=given.clip_steps, batch_size=given.batch_size)
    if given.stage in ("llava", "all"):
        train_llava(**common, steps=given.llava_steps, batch_size=given.batch_size)
    write_cards(given.assets, n_scenes=2000)


if __name__ == "__main__":
    main()
