"""T5 and mT5: their sizes, their tokenizer, span corruption, and transformers' model trained on it.

T5 is arXiv 1910.10683, mT5 arXiv 2010.11934.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adafactor.cli._known_models import MODELS

SENTINELS = 100  # tokens that stand for spans that were taken out
PAD, END, UNKNOWN = 0, 1, 2
SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Size:
    """The numbers of a T5, as ``_known_models.t5`` takes them."""

    width: int
    inner: int
    heads: int
    layers: int
    head: int = 64
    vocabulary: int = 32_128
    gated: bool = False
    tied: bool = True

    @property
    def depth(self) -> int:
        """Blocks of the encoder, and of the decoder."""
        return self.layers


def _published(family: str) -> dict[str, Size]:
    builds: dict[str, Any] = {n.removeprefix(f"{family}-"): b for n, b in MODELS.items() if n.startswith(f"{family}-")}
    return {name: Size(*build.args, **build.keywords) for name, build in builds.items()}


SIZES = {
    "t5": {"tiny": Size(128, 512, 4, 2, head=32, vocabulary=2_048)} | _published("t5"),
    # As in the published ones, most weights are the embedding's and the output layer's.
    "mt5": {"tiny": Size(128, 256, 4, 2, head=32, vocabulary=16_384, gated=True, tied=False)} | _published("mt5"),
}


def tokenizer(lines: list[str], vocabulary: int) -> Any:
    """A tokenizer of SentencePiece's kind, of at most ``vocabulary`` tokens unless ``lines`` have more characters.

    As T5's: a unigram model of text in which all white space is one space, with padding, end and unknown in front, and
    the sentinels behind, the first of them last.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made: Any = Tokenizer(models.Unigram())
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    made.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", END)])
    made.decoder = decoders.Metaspace()
    special = {"special_tokens": list(SPECIAL.values()), "unk_token": "<unk>", "show_progress": False}
    made.train_from_iterator(lines, trainers.UnigramTrainer(vocab_size=vocabulary - SENTINELS, **special))
    # The trainer adds up in any order: what differs in the last places must not decide.
    learned = [(token, round(score, 9)) for token, score in json.loads(made.to_str())["model"]["vocab"]]
    ordered = sorted(learned[len(SPECIAL) :], key=lambda token: (-token[1], token[0]))
    made.model = models.Unigram(learned[: len(SPECIAL)] + ordered, unk_id=UNKNOWN)
    made.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(SENTINELS))])
    return made


@dataclass(frozen=True)
class SpanCorruption:
    """Spans of text are taken out of the encoder's input, a sentinel in the place of each; the decoder writes them.

    15 % of the tokens, in spans of 3 on average, cut at random (section 3.1.4 of the paper). The numbers of tokens and
    spans are the same in all windows, so that nothing is padded: 568 tokens become 512 of input and 114 of output.

    Args:
        family: ``t5`` or ``mt5``.
        size: one of ``SIZES[family]``.
        vocabulary: rows of the embedding.
        context: tokens of the encoder's input.
        pieces: tokens of the tokenizer.

    Raises:
        ValueError: there are not enough sentinels for a context as long as that, or it is too short for a span.
    """

    family: str
    size: str
    vocabulary: int
    context: int
    pieces: int

    def __post_init__(self) -> None:
        if self.context < 8:
            raise ValueError(f"context must be at least 8 for {self.family}, got {self.context}")
        if self.spans > SENTINELS:
            raise ValueError(
                f"context must take out at most {SENTINELS} spans, for which there are sentinels; {self.context} takes "
                f"out {self.spans}"
            )

    @property
    def numbers(self) -> Size:
        """Of the model."""
        return SIZES[self.family][self.size]

    @property
    def description(self) -> str:
        """The model in words."""
        return f"{'mT5' if self.family == 'mt5' else 'T5'} of size {self.size}"

    @property
    def objective(self) -> str:
        """What it learns, in words."""
        return f"span corruption: {self.spans} spans of each window are taken out, and written by the decoder"

    @property
    def window(self) -> int:
        """Tokens of text in an example: the most whose input is no longer than ``context``."""
        return max(n for n in range(2, 2 * self.context) if self._lengths(n)[2] <= self.context)

    @property
    def predicted(self) -> int:
        """Tokens that the loss is over: those of the spans, a sentinel before each, and the end."""
        noise, spans, _ = self._lengths(self.window)
        return noise + spans + 1

    @property
    def spans(self) -> int:
        """Spans that are taken out."""
        return self._lengths(self.window)[1]

    @staticmethod
    def _lengths(window: int) -> tuple[int, int, int]:
        """Of a window: tokens taken out, spans, and tokens of the input, which the end closes."""
        noise = max(1, round(0.15 * window))
        spans = max(1, round(noise / 3))
        return noise, spans, window - noise + spans + 1

    def rows(self, windows: Tensor, generator: torch.Generator) -> Tensor:
        """Windows ``[B, window]`` as ``[B, context + predicted]``: what the encoder reads, then what to write."""
        batch, window = windows.shape
        noise, spans, _ = self._lengths(window)
        kept = _cut(batch, window - noise, spans, generator)
        taken = _cut(batch, noise, spans, generator)
        lengths = torch.stack((kept, taken), dim=2).flatten(1)  # a text begins with what is kept
        part = torch.arange(2 * spans).expand(batch, -1).flatten().repeat_interleave(lengths.flatten()).view(batch, -1)
        first = torch.ones_like(part, dtype=torch.bool)
        first[:, 1:] = part[:, 1:] != part[:, :-1]
        sentinel = self.pieces - 1 - part // 2

        def without(which: int) -> Tensor:  # of the parts, the even are kept and the odd taken out
            gone = part % 2 == which
            shown = torch.where(gone, sentinel, windows)[~gone | first].view(batch, -1)
            return F.pad(shown, (0, 1), value=END)

        return torch.cat((without(1), without(0)), dim=1)

    def build(self, seed: int) -> T5:
        """The model; its weights follow from the seed alone."""
        return T5(self, seed)


def _cut(batch: int, length: int, pieces: int, generator: torch.Generator) -> Tensor:
    """``length`` cut into ``pieces`` of at least 1, all ways equally likely: ``[batch, pieces]``."""
    places = torch.rand(batch, length - 1, generator=generator).argsort(dim=1)[:, : pieces - 1].sort(dim=1).values + 1
    ends = F.pad(F.pad(places, (1, 0)), (0, 1), value=length)
    return ends.diff(dim=1)


class T5(nn.Module):
    """transformers' model, trained on what ``SpanCorruption`` makes. No dropout, as T5X pretrains.

    The output layer of a model that is not tied starts at a standard deviation of 1 / sqrt(width), as in T5X, where
    transformers has 1, with which logits start at a standard deviation of sqrt(width).
    """

    def __init__(self, task: SpanCorruption, seed: int) -> None:
        super().__init__()
        import transformers

        size = task.numbers
        kind = "MT5" if task.family == "mt5" else "T5"
        config = getattr(transformers, f"{kind}Config")(
            d_model=size.width,
            d_ff=size.inner,
            d_kv=size.head,
            num_heads=size.heads,
            num_layers=size.layers,
            vocab_size=task.vocabulary,
            feed_forward_proj="gated-gelu" if size.gated else "relu",
            tie_word_embeddings=size.tied,
            dropout_rate=0.0,
            decoder_start_token_id=PAD,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
            if not size.tied:
                self.model.lm_head = nn.Linear(size.width, task.vocabulary, bias=False)
                nn.init.normal_(self.model.lm_head.weight, std=size.width**-0.5)
        self._context = task.context

    @property
    def blocks(self) -> list[nn.Module]:
        """What gathers its weights one after the other where they are sharded."""
        return [*self.model.encoder.block, *self.model.decoder.block]

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats per token that is written, in float32."""
        source, target = rows[:, : self._context], rows[:, self._context :]
        before = F.pad(target[:, :-1], (1, 0), value=PAD)
        logits = self.model(input_ids=source, decoder_input_ids=before, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())
