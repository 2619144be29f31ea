"""BERT (arXiv 1810.04805): sizes, tokenizer, masked language modelling, and transformers' model trained on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adafactor.cli._known_models import MODELS

SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
CLS, SEP, MASK = 2, 3, 4
POSITIONS = 512
ALPHABET = 1000  # characters that are no unknown word


@dataclass(frozen=True)
class Size:
    """The numbers of a BERT, as ``_known_models.bert`` takes them."""

    width: int
    layers: int
    vocabulary: int = 30_522

    @property
    def heads(self) -> int:
        """Of 64 features each."""
        return self.width // 64

    @property
    def depth(self) -> int:
        """Blocks."""
        return self.layers


_builds: dict[str, Any] = {n.removeprefix("bert-"): build for n, build in MODELS.items() if n.startswith("bert-")}
SIZES = {name: Size(*build.args, **build.keywords) for name, build in _builds.items()}


def tokenizer(lines: list[str], vocabulary: int) -> Any:
    """A WordPiece tokenizer as BERT's uncased one, of ``vocabulary`` tokens unless ``lines`` have more characters."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    normalizer: Any = normalizers.BertNormalizer()
    counted = Counter(normalizer.normalize_str("\n".join(lines)))
    characters = sorted(c for c, _ in counted.most_common(ALPHABET) if not c.isspace())
    # The trainer numbers characters in any order, and decides by their numbers; those named first it takes as they are.
    first = [*SPECIAL.values(), *characters, *(f"##{c}" for c in characters)]
    learner: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[reportCallIssue]
    learner.normalizer, learner.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=first, limit_alphabet=0, show_progress=False
    )
    learner.train_from_iterator(lines, trainer)

    made: Any = Tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))  # type: ignore[reportCallIssue]
    made.normalizer, made.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    made.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(list(SPECIAL.values()))
    return made


@dataclass(frozen=True)
class MaskedTokens:
    """15 % of the tokens are to be told from the others: 80 % of them masked, 10 % replaced, 10 % left as they are.

    The places are drawn anew for every example. The second objective of the paper, whether two sentences follow each
    other, is left out.

    Args:
        size: one of ``SIZES``.
        vocabulary: rows of the embedding.
        context: tokens of the input, with the two that begin and end it.
        pieces: tokens of the tokenizer.

    Raises:
        ValueError: there are no positions for a context as long as that, or it has no room for a token.
    """

    size: str
    vocabulary: int
    context: int
    pieces: int

    def __post_init__(self) -> None:
        if not 4 <= self.context <= POSITIONS:
            raise ValueError(f"context must be from 4 to {POSITIONS} for bert, got {self.context}")

    @property
    def numbers(self) -> Size:
        """Of the model."""
        return SIZES[self.size]

    @property
    def description(self) -> str:
        """The model in words."""
        return f"BERT of size {self.size}"

    @property
    def objective(self) -> str:
        """What it learns, in words."""
        return f"masked language modelling: {self.predicted} tokens of each window are to be told from the others"

    @property
    def window(self) -> int:
        """Tokens of text in an example."""
        return self.context - 2

    @property
    def predicted(self) -> int:
        """Tokens that the loss is over."""
        return max(1, round(0.15 * self.window))

    def rows(self, windows: Tensor, generator: torch.Generator) -> Tensor:
        """Windows ``[B, window]`` as ``[B, context + 2 * predicted]``: the input, places in it, what stood there."""
        batch, window = windows.shape
        places = torch.rand(batch, window, generator=generator).argsort(dim=1)[:, : self.predicted]
        wanted = windows.gather(1, places)
        chance = torch.rand(wanted.shape, generator=generator)
        others = torch.randint(len(SPECIAL), max(self.pieces, len(SPECIAL) + 1), wanted.shape, generator=generator)
        shown = torch.where(chance < 0.8, MASK, torch.where(chance < 0.9, others, wanted))
        read = F.pad(F.pad(windows.scatter(1, places, shown), (1, 0), value=CLS), (0, 1), value=SEP)
        return torch.cat((read, places + 1, wanted), dim=1)

    def build(self, seed: int) -> Bert:
        """The model; its weights follow from the seed alone."""
        return Bert(self, seed)


class Bert(nn.Module):
    """transformers' model, trained on what ``MaskedTokens`` makes. Without dropout, of which short runs need none."""

    def __init__(self, task: MaskedTokens, seed: int) -> None:
        super().__init__()
        import transformers

        size = task.numbers
        config = transformers.BertConfig(
            vocab_size=task.vocabulary,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.width,
            max_position_embeddings=POSITIONS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = transformers.BertForMaskedLM(config)
        self._split = (task.context, task.predicted, task.predicted)

    @property
    def blocks(self) -> list[nn.Module]:
        """What gathers its weights one after the other where they are sharded."""
        return list(self.model.bert.encoder.layer)

    def loss(self, rows: Tensor) -> Tensor:
        """Mean nats per token that is to be told, in float32. The output layer sees these alone."""
        read, places, wanted = rows.split(self._split, dim=1)
        states = self.model.bert(input_ids=read).last_hidden_state
        states = states.gather(1, places[:, :, None].expand(-1, -1, states.shape[-1]))
        return F.cross_entropy(self.model.cls(states).flatten(0, 1).float(), wanted.flatten())
