"""A byte-level decoder transformer, small enough for a laptop and made of the parts large ones are made of.

Rotary positions, causal attention, and an output layer that is the embedding. In its own form, ``gpt``, pre-norm blocks
with RMSNorm and a squared-ReLU MLP; in that of PaLM (section 2 of arXiv 2204.02311), attention beside a SwiGLU MLP,
heads that share one key and one value, PaLM's initial weights and its z-loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256
FORMS = ("gpt", "palm")
Z_LOSS = 1e-4


@dataclass(frozen=True)
class ModelConfig:
    """The model's size.

    Args:
        width: features per position; a multiple of ``2 * heads``. Range: >= 2.
        depth: number of blocks. Range: >= 1.
        heads: attention heads per block. Range: >= 1.
        context: bytes a prediction can look back on. Range: >= 2.
        form: one of ``FORMS``.

    Raises:
        ValueError: a size is out of range, or ``width`` does not split into heads of even size.

    Example:
        >>> ModelConfig(width=64, depth=2, heads=4, context=32).width
        64
    """

    width: int = 96
    depth: int = 3
    heads: int = 3
    context: int = 128
    form: str = "gpt"

    def __post_init__(self) -> None:
        assert self.form in FORMS
        for name, least in (("width", 2), ("depth", 1), ("heads", 1), ("context", 2)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width must be a multiple of 2 * heads = {2 * self.heads} (each head turns pairs of features), "
                f"got {self.width}; choose another width or number of heads"
            )


def rotary_angles(length: int, size: int) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position * 10000^(-2i/size)``, each ``[length, size / 2]``."""
    frequency = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs ``(x[i], x[i + size/2])`` of every head by their position's angle; ``x`` is ``[..., T, size]``."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Block(nn.Module):
    """Attention, then an MLP, each on a normalized copy of the stream it adds to."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, T, width]
        batch, length, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, width // self.heads)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split((2, 1))  # [2, B, H, T, size] and [1, B, H, T, size]
        q, k = rotate(qk, cos, sin).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v[0], is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_out(F.relu(self.mlp_in(self.mlp_norm(x))).square())


class PalmBlock(nn.Module):
    """Attention and an MLP beside each other, on the same normalized copy of the stream. No biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, head = config.width, config.width // config.heads
        self.heads = config.heads
        self.norm = nn.LayerNorm(width, bias=False)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, head, bias=False)  # one for all heads
        self.v = nn.Linear(width, head, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 4 * width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, T, width]
        batch, length, width = x.shape
        y = self.norm(x)
        q = self.q(y).view(batch, length, self.heads, -1).transpose(1, 2)  # [B, H, T, size]
        k, v = (one(y)[:, None].expand(-1, self.heads, -1, -1) for one in (self.k, self.v))
        mixed = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        attended = self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + attended + self.mlp_out(F.silu(self.gate(y)) * self.mlp_in(y))


class ByteTransformer(nn.Module):
    """Predicts the next byte.

    Args:
        config: the model's size.
        seed: the weights follow from it alone; the global random state is left as it was.

    Example:
        >>> model = ByteTransformer(ModelConfig(width=16, depth=1, heads=2, context=8), seed=0)
        >>> model(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 256])
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        palm = config.form == "palm"
        with torch.device("meta"):  # no random numbers are drawn before _initialize
            self.embedding = nn.Embedding(VOCABULARY, config.width)
            self.blocks = nn.ModuleList((PalmBlock if palm else Block)(config) for _ in range(config.depth))
            self.norm = nn.LayerNorm(config.width, bias=False) if palm else nn.RMSNorm(config.width, eps=1e-6)
        self.to_empty(device="cpu")
        cos, sin = rotary_angles(config.context, config.width // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """Normal with std 0.5 / sqrt(width), and smaller by sqrt(2 depth) for what adds to the stream.

        PaLM's: 1 for the embedding, and else 1 / sqrt(inputs).
        """
        std = 0.5 * self.config.width**-0.5
        for name, p in self.named_parameters():
            if p.ndim == 1:
                p.fill_(1.0)
            elif self.config.form == "palm":
                p.normal_(0.0, 1.0 if name.startswith("embedding") else p.shape[1] ** -0.5, generator=generator)
            else:
                adds_to_stream = name.endswith(("attention_out.weight", "mlp_out.weight"))
                p.normal_(0.0, std / (2 * self.config.depth) ** 0.5 if adds_to_stream else std, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, 256]
        x = self.embedding(tokens)
        length = tokens.shape[1]
        cos, sin = cast(Tensor, self.cos)[:length], cast(Tensor, self.sin)[:length]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = self.norm(x)
        if self.config.form == "palm":
            x = x * self.config.width**-0.5
        return F.linear(x, self.embedding.weight)

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean nats per byte over windows ``[B, T + 1]``, in float32 whatever the weights' dtype.

        In training PaLM's has 1e-4 log(Z)^2 in it, which keeps the normalizer Z of the softmax near 1.
        """
        logits = self(tokens[:, :-1]).flatten(0, 1).float()
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
        if self.config.form == "palm" and self.training:
            loss = loss + Z_LOSS * logits.logsumexp(dim=-1).square().mean()
        return loss


@dataclass(frozen=True)
class NextByte:
    """The next byte is predicted at every place of a window."""

    config: ModelConfig

    @property
    def description(self) -> str:
        """The model in words."""
        return "A byte-level transformer" + " in PaLM's form" * (self.config.form == "palm")

    @property
    def objective(self) -> str:
        """What it learns, in words."""
        return "the next byte, at every place of a window"

    @property
    def window(self) -> int:
        """Bytes of text in an example: a byte more than the model reads."""
        return self.config.context + 1

    @property
    def predicted(self) -> int:
        """Bytes that the loss is over."""
        return self.config.context

    def rows(self, windows: Tensor, generator: torch.Generator) -> Tensor:
        """The windows themselves."""
        del generator
        return windows

    def build(self, seed: int) -> ByteTransformer:
        """The model; its weights follow from the seed alone."""
        return ByteTransformer(self.config, seed)


class Loss(nn.Module):
    """A model and its loss as one module, as DistributedDataParallel wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor) -> Tensor:
        return cast(Any, self.model).loss(rows)
