"""Whisper's architecture in plain PyTorch (pre-norm, GELU, sinusoidal encoder positions), small.

Two things differ from Whisper in training and vanish on export: a frame classifier on the encoder, and time stamp
embeddings made from sinusoids by one learnt matrix (1501 free rows do not learn from a few hours of speech).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo.train.grammar import FIRST_STAMP, STAMPS, TEXT_TOKENS, VOCABULARY

MELS = 80
SOURCE_POSITIONS = 1500  # 30 s at 20 ms each, as faster-whisper expects
TARGET_POSITIONS = 448


@dataclass(frozen=True)
class Size:
    """Width, attention heads and layer counts."""

    width: int = 128
    heads: int = 4
    encoder_layers: int = 4
    decoder_layers: int = 3


def sinusoids(count: int, width: int) -> Tensor:
    """Whisper's position encodings, (count, width)."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class SelfAttention(nn.Module):
    """Multi-head attention of a sequence to itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(batch, n, width) -> (batch, n, width)."""
        q, k, v = (_split(part, self.heads).float() for part in self.qkv(x).chunk(3, -1))
        with torch.autocast("cpu", enabled=False):  # on CPUs this kernel is slower in bfloat16
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention of the text to the sound; also returns its weights, which training guides."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, n, width), (batch, m, width) -> (batch, n, width), weights (batch, heads, n, m)."""
        q = _split(self.q(x), self.heads)
        k, v = (_split(part, self.heads) for part in self.kv(sound).chunk(2, -1))
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2)), weights


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return self.outer(F.gelu(self.inner(x)))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(size.width), SelfAttention(size.width, size.heads)
        self.forward_norm, self.feed_forward = nn.LayerNorm(size.width), FeedForward(size.width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, m, width) -> (batch, m, width)."""
        x = x + self.attention(self.attention_norm(x), causal=False)
        return x + self.feed_forward(self.forward_norm(x))


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the sound and feed-forward."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(size.width), SelfAttention(size.width, size.heads)
        self.cross_norm, self.cross = nn.LayerNorm(size.width), CrossAttention(size.width, size.heads)
        self.forward_norm, self.feed_forward = nn.LayerNorm(size.width), FeedForward(size.width)

    def forward(self, x: Tensor, sound: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, n, width), (batch, m, width) -> (batch, n, width), cross-attention (batch, heads, n, m)."""
        x = x + self.attention(self.attention_norm(x), causal=True)
        heard, weights = self.cross(self.cross_norm(x), sound)
        x = x + heard
        return x + self.feed_forward(self.forward_norm(x)), weights


class Whisper(nn.Module):
    """Encoder and decoder."""

    def __init__(self, size: Size = Size()) -> None:
        super().__init__()
        self.size, width = size, size.width
        self.conv1 = nn.Conv1d(MELS, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.register_buffer("encoder_positions", sinusoids(SOURCE_POSITIONS, width))
        self.encoder_layers = nn.ModuleList(EncoderLayer(size) for _ in range(size.encoder_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.token_embedding = nn.Parameter(torch.randn(FIRST_STAMP, width) * 0.05)
        self.register_buffer("stamp_sinusoids", sinusoids(STAMPS, width))
        self.stamp_matrix = nn.Parameter(torch.eye(width) * 0.25)
        self.decoder_positions = nn.Parameter(torch.randn(TARGET_POSITIONS, width) * 0.01)
        self.decoder_layers = nn.ModuleList(DecoderLayer(size) for _ in range(size.decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.frame_classifier = nn.Linear(width, len(TEXT_TOKENS))

    def encode(self, features: Tensor, offsets: Tensor) -> Tensor:
        """Features (batch, 80, 2 m) that start at positions ``offsets`` (batch,) of a window -> (batch, m, width)."""
        x = F.gelu(self.conv2(F.gelu(self.conv1(features)))).transpose(1, 2)
        x = x + self.encoder_positions[offsets[:, None] + torch.arange(x.shape[1])]
        for layer in self.encoder_layers:
            x = layer(x)
        return self.encoder_norm(x)

    def embedding(self) -> Tensor:
        """The embedding of every token, (vocabulary, width); also the output projection."""
        return torch.cat([self.token_embedding, self.stamp_sinusoids @ self.stamp_matrix])

    def decode(self, tokens: Tensor, sound: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (batch, n) -> logits (batch, n, vocabulary), each layer's cross-attention (batch, heads, n, m)."""
        embedding = self.embedding()
        x = F.embedding(tokens, embedding) + self.decoder_positions[: tokens.shape[1]]
        attention = []
        for layer in self.decoder_layers:
            x, weights = layer(x, sound)
            attention.append(weights)
        return self.decoder_norm(x) @ embedding.T, attention

    def decoder_parameters(self) -> list[nn.Parameter]:
        """What the decoder phases train."""
        prefixes = ("decoder_", "token_", "stamp_")
        return [parameter for name, parameter in self.named_parameters() if name.startswith(prefixes)]


assert len(VOCABULARY) == FIRST_STAMP + STAMPS


@torch.no_grad()
def initialise(model: Whisper, features: Tensor) -> None:
    """A start from which a small model learns within minutes; ``features`` (batch, 80, frames) are real ones.

    The convolutions are standardised on the features, else the positions drown the sound. Encoder heads begin by
    attending to fixed distances (q·k = sum over frequencies of cos(w (t' - t - shift))), so the encoder starts out as a
    stack of wide convolutions.
    """
    for conv, before in ((model.conv1, lambda x: x), (model.conv2, lambda x: F.gelu(model.conv1(x)))):
        conv.bias.zero_()
        response = conv(before(features))
        mean, deviation = response.mean((0, 2)), response.std((0, 2)) + 1e-4
        conv.weight /= deviation[:, None, None]
        conv.bias.copy_(-mean / deviation)

    width, heads = model.size.width, model.size.heads
    head_width, half = width // heads, width // 2
    frequencies = torch.exp(-math.log(10_000) / (half - 1) * torch.arange(half))
    used = torch.linspace(0, 0.45 * half, head_width // 2).round().long()  # from 1 down to about 0.016 rad a position
    sharpness = 6.0**0.5
    shifts = [[-2, 2, -6, 6], [-4, 4, -10, 10], [-8, 8, -16, 16], [-5, 5, -12, 12]]  # positions of 20 ms
    for layer_number, layer in enumerate(model.encoder_layers):
        weight, bias = layer.attention.qkv.weight, layer.attention.qkv.bias
        for head in range(heads):
            shift = shifts[layer_number % 4][head % 4]
            query, key = (torch.randn(head_width, width) * 0.02 for _ in range(2))
            for i, f in enumerate(used):
                cos, sin = math.cos(shift * frequencies[f]), math.sin(shift * frequencies[f])
                query[2 * i, f] += sharpness * cos
                query[2 * i, half + f] += sharpness * sin
                query[2 * i + 1, half + f] += sharpness * cos
                query[2 * i + 1, f] -= sharpness * sin
                key[2 * i, f] += sharpness
                key[2 * i + 1, half + f] += sharpness
            weight[head * head_width : (head + 1) * head_width] = query
            weight[width + head * head_width : width + (head + 1) * head_width] = key
        bias[: 2 * width] = 0
