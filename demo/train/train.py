"""Trains the demo model: speech, two phases, export. Run as ``python -m demo.train.train`` from the repository root.

The encoder and the decoder first learn together on short crops, then the decoder alone learns whole 30 s windows from
the frozen encoder's outputs (ten times cheaper than training both, which stalls on whole windows).
"""

import argparse
import math
import pickle
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from demo.train.export import export
from demo.train.grammar import END, FIRST_STAMP, STAMPS
from demo.train.model import Whisper, initialise
from demo.train.windows import FULL_FRAMES, IGNORED, Batch, Composer, Spoken, make_pool

SEED = 7
POOL_SIZE = 7000
BUILD = Path(__file__).parent / "build"
MODEL = Path(__file__).parents[1] / "asr-model"
REPORT_EVERY = 200  # steps

STAMP_OFFSETS = torch.arange(-3, 4)  # a stamp's target is spread over its neighbours
STAMP_WEIGHTS = F.normalize(torch.exp(-(STAMP_OFFSETS**2) / 2), p=1, dim=0)
GUIDED_LAYERS = 2  # the first head of each of the last layers learns where words are


@dataclass(frozen=True)
class Crops:
    """A stage of the joint phase: crops of this many frames."""

    steps: int
    frames: int
    batch: int


JOINT = [Crops(2500, 400, 8), Crops(1700, 800, 4)]
JOINT_RATE = 1.3e-3


DECODER_STEPS = 2200
DECODER_RATE = 1e-3
KEPT_WINDOWS = 300  # encoded windows to draw from; two are new every other step
DECODER_BATCH = 8


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean cross-entropy of the targets that count, with stamps spread over neighbours; (batch, n, vocabulary)."""
    counted = targets != IGNORED
    scores, wanted = logits[counted].float().log_softmax(-1), targets[counted]
    stamp = wanted >= FIRST_STAMP
    near = (wanted[stamp][:, None] + STAMP_OFFSETS).clamp(FIRST_STAMP, FIRST_STAMP + STAMPS - 1)
    stamp_loss = -(scores[stamp].gather(1, near) * STAMP_WEIGHTS).sum()
    text_loss = -scores[~stamp].gather(1, wanted[~stamp][:, None]).sum()
    with torch.no_grad():
        right = (scores[~stamp].argmax(-1) == wanted[~stamp]).float().mean().item()
        off = (scores[stamp][:, FIRST_STAMP:].argmax(-1) + FIRST_STAMP - wanted[stamp]).abs().float() * 0.02
    report = {"text right": right, "stamps within 0.1 s": (off <= 0.1).float().mean().item()}
    return (stamp_loss + text_loss) / len(wanted), report


def attention_loss(attention: list[Tensor], spans: Tensor) -> Tensor:
    """-log of the attention that falls within each token's span (batch, n, 2), mean over tokens and guided layers."""
    position = torch.arange(attention[0].shape[-1])
    inside = (position >= spans[..., :1]) & (position < spans[..., 1:])
    spanned = spans[..., 0] >= 0
    masses = [(weights[:, 0].float() * inside).sum(-1)[spanned] for weights in attention[-GUIDED_LAYERS:]]
    return -torch.log(torch.cat(masses) + 1e-5).mean()


def cosine(rate: float, step: int, steps: int, warm_up: int) -> float:
    """The learning rate of a step: linear warm-up, then half a cosine down to nearly 0."""
    return rate * min(1.0, (step + 1) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 1e-5


class Trainer:
    """An optimiser step with a schedule, and a report every so many steps."""

    def __init__(self, name: str, parameters: list[Tensor], rate: float, steps: int, warm_up: int) -> None:
        self._name, self._parameters, self._rate, self._steps, self._warm_up = name, parameters, rate, steps, warm_up
        self._optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
        self._seen: list[dict[str, float]] = []
        self._began = time.monotonic()

    def step(self, number: int, loss: Tensor, report: dict[str, float]) -> None:
        """Follows the gradient of ``loss`` once."""
        for group in self._optimiser.param_groups:
            group["lr"] = cosine(self._rate, number, self._steps, self._warm_up)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._seen.append({"loss": loss.item(), **report})
        if (number + 1) % REPORT_EVERY == 0:
            means = {key: torch.tensor([seen[key] for seen in self._seen]).nanmean().item() for key in self._seen[0]}
            minutes = (time.monotonic() - self._began) / 60
            print(
                f"{self._name} {number + 1}/{self._steps} {minutes:.1f} min:",
                ", ".join(f"{key} {value:.3f}" for key, value in means.items()),
                flush=True,
            )
            self._seen = []


def train_jointly(model: Whisper, composer: Composer) -> None:
    """Encoder and decoder together on crops."""
    stages = [stage for stage in JOINT for _ in range(stage.steps)]
    trainer = Trainer("joint", list(model.parameters()), JOINT_RATE, len(stages), warm_up=150)
    for number, stage in enumerate(stages):
        batch = composer.batch(stage.batch, stage.frames)
        with torch.autocast("cpu", torch.bfloat16):
            sound = model.encode(batch.features, batch.offsets)
            frames = model.frame_classifier(sound)
            logits, attention = model.decode(batch.inputs, sound)
        frame_loss = F.cross_entropy(frames.float().flatten(0, 1), batch.labels.flatten())
        text_loss, report = token_losses(logits, batch.targets)
        guidance = attention_loss(attention, batch.spans)
        spoken = batch.labels > 0
        report["frames right"] = (frames.argmax(-1) == batch.labels)[spoken].float().mean().item()
        frame_weight = 1.5 if number < len(stages) / 2 else 0.5
        trainer.step(number, text_loss + frame_weight * frame_loss + 0.3 * guidance, report)


@dataclass(frozen=True)
class Encoded:
    """One encoded window: sound (1500, width) bfloat16, inputs and targets (n,), spans (n, 2)."""

    sound: Tensor
    inputs: Tensor
    targets: Tensor
    spans: Tensor


@torch.no_grad()
def encode_windows(model: Whisper, batch: Batch) -> Iterator[Encoded]:
    """The windows of a batch, each without its padding."""
    with torch.autocast("cpu", torch.bfloat16):
        sound = model.encode(batch.features, batch.offsets).to(torch.bfloat16)
    for i, targets in enumerate(batch.targets):
        n = int((targets != IGNORED).nonzero().max()) + 1
        yield Encoded(sound[i], batch.inputs[i, :n], targets[:n], batch.spans[i, :n])


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def train_decoder(model: Whisper, composer: Composer) -> None:
    """The decoder alone on whole windows; encoded windows are used again until newer ones push them out."""
    rng = random.Random(SEED)
    trainer = Trainer("decoder", model.decoder_parameters(), DECODER_RATE, DECODER_STEPS, warm_up=40)
    kept: list[Encoded] = []
    while len(kept) < 64:
        kept.extend(encode_windows(model, composer.batch(4, FULL_FRAMES)))
    for number in range(DECODER_STEPS):
        if number % 2 == 0:
            kept = [*kept, *encode_windows(model, composer.batch(2, FULL_FRAMES))][-KEPT_WINDOWS:]
        # Neighbours in length waste the least padding.
        drawn = sorted(rng.sample(kept, 4 * DECODER_BATCH), key=lambda window: len(window.inputs))
        first = rng.randint(0, len(drawn) - DECODER_BATCH)
        windows = drawn[first : first + DECODER_BATCH]
        sound = torch.stack([window.sound for window in windows]).float()
        with torch.autocast("cpu", torch.bfloat16):
            logits, attention = model.decode(_pad([window.inputs for window in windows], END), sound)
        loss, report = token_losses(logits, _pad([window.targets for window in windows], IGNORED))
        guidance = attention_loss(attention, _pad([window.spans for window in windows], -1))
        trainer.step(number, loss + guidance, report)


def cached_pool() -> list[Spoken]:
    """The training speech, made once."""
    path = BUILD / "pool.pickle"
    if not path.exists():
        began = time.monotonic()
        pool = make_pool(POOL_SIZE, SEED)
        hours = sum(item.mel.shape[1] for item in pool) / 360_000
        print(f"{POOL_SIZE} utterances, {hours:.1f} h of speech, in {time.monotonic() - began:.0f} s", flush=True)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(pool))
    return pickle.loads(path.read_bytes())


def main() -> None:
    """Both phases, each leaving a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder-only", action="store_true", help="go on from the joint phase's checkpoint")
    decoder_only = parser.parse_args().decoder_only
    torch.set_num_threads(1)
    pool = cached_pool()
    if not decoder_only:
        torch.manual_seed(SEED + 1)
        composer = Composer(pool, SEED + 1)
        model = Whisper()
        initialise(model, composer.batch(16, 300).features)
        train_jointly(model, composer)
        torch.save(model.state_dict(), BUILD / "joint.pt")
    torch.manual_seed(SEED + 2)
    model = Whisper()
    model.load_state_dict(torch.load(BUILD / "joint.pt"))
    train_decoder(model, Composer(pool, SEED + 2))
    torch.save(model.state_dict(), BUILD / "decoder.pt")
    export(model, MODEL)


if __name__ == "__main__":
    main()
