"""What ``adafactor plan`` is asked about: a known model, a config.json, safetensors headers, or a function."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import json
import math
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adafactor.cli._errors import UserError
from adafactor.cli._known_models import MODELS, Sketch, meta

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_INDEX, _CONFIG = ".safetensors.index.json", "config.json"
# What checkpoints hold beside parameters, in floating point: statistics, angles, GPT-2's causal masks.
_BUFFERS = re.compile(r"(^|\.)(running_(mean|var)|inv_freq|(cos|sin)_cached|masked_bias|h\.\d+\.attn\.bias)$")
_MOST_NAMED = 8


@dataclass
class Source:
    """A model without data.

    Args:
        title: what the table and the picture call it.
        origin: where its shapes come from.
        model: on the meta device, as far as its maker let us.
        notes: what a reader has to know of it.
    """

    title: str
    origin: str
    model: nn.Module
    notes: list[str] = field(default_factory=list)


def load(text: str) -> Source:
    """The model that ``text`` names.

    Raises:
        UserError: there is none, or it cannot be read or built.
    """
    if text.lower() in MODELS:
        return Source(text.lower(), "known shapes", MODELS[text.lower()]())
    path = Path(text).expanduser()
    try:
        found = _from_folder(path) if path.is_dir() else _from_file(path) if path.exists() else None
    except OSError as error:
        raise UserError(f"SOURCE: cannot read {error.filename or path}: {error.strerror or error}") from error
    if found is None and _FUNCTION.fullmatch(text):
        found = _from_function(text)
    if found is None:
        raise UserError(_no_such(text))
    if not any(True for _ in found.model.parameters()):
        raise UserError(f"SOURCE: {text} has no parameters; there is nothing to train")
    return found


def train_only(source: Source, prefix: str) -> None:
    """Freeze every parameter whose name does not begin with ``prefix``.

    Raises:
        UserError: none does.
    """
    names = [name for name, _ in source.model.named_parameters()]
    if not any(name.startswith(prefix) for name in names):
        tops = list(dict.fromkeys(name.split(".")[0] for name in names))
        raise UserError(f"--train: no parameter's name begins with {prefix!r}; they begin with {_some(tops)}")
    for name, p in source.model.named_parameters():
        p.requires_grad_(p.requires_grad and name.startswith(prefix))


def _no_such(text: str) -> str:
    if "/" in text or text.endswith((".json", ".safetensors")):
        return f"SOURCE: there is no file or folder {text!r}"
    close = difflib.get_close_matches(text.lower(), MODELS, n=3, cutoff=0.5)
    close = close or [name for name in MODELS if name.startswith(text.lower()[:4])][:3]
    meant = f"did you mean {' or '.join(close)}" if close else f"known models are {', '.join(MODELS)}"
    return (
        f"SOURCE: {text!r} is no known model, no file or folder, and no module:function; {meant}"
        + "? (`adafactor plan --help` lists the known models)" * bool(close)
    )


def _some(names: Iterable[str]) -> str:
    first = list(names)
    return ", ".join(first[:_MOST_NAMED]) + f" and {len(first) - _MOST_NAMED} more" * (len(first) > _MOST_NAMED)


def _from_folder(folder: Path) -> Source:
    """Its config.json if transformers knows it, else its safetensors files."""
    config, indices = folder / _CONFIG, sorted(folder.glob(f"*{_INDEX}"))
    files = sorted(folder.glob("*.safetensors"))
    if config.exists() and ("model_type" in _json(config) or not (indices or files)):
        return _from_config(config)
    if len(found := indices or files) == 1:
        return _from_index(found[0]) if indices else _from_headers(found[0].name, found)
    if found:
        raise UserError(f"SOURCE: {folder} holds {_some(path.name for path in found)}; name one of them")
    inside = sorted(path.parent.name for name in (_CONFIG, "*.safetensors") for path in folder.glob(f"*/{name}"))
    hint = f"; give one of its folders: {_some(dict.fromkeys(inside))}" if inside else ""
    raise UserError(f"SOURCE: {folder} holds neither config.json nor safetensors files{hint}")


def _from_file(path: Path) -> Source:
    if path.name.endswith(_INDEX):
        return _from_index(path)
    if path.suffix == ".safetensors":
        return _from_headers(path.name, [path])
    if path.suffix != ".json":
        raise UserError(f"SOURCE: {path} is neither a config.json nor a safetensors file or index")
    return _from_index(path) if "weight_map" in _json(path) else _from_config(path)


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"SOURCE: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"SOURCE: {path} holds a JSON {type(content).__name__}, not an object with a model's settings")
    return content


# --- transformers' configuration ---


def _from_config(path: Path) -> Source:
    """The class that ``architectures`` names, or what AutoModel chooses."""
    settings = _json(path)
    if "model_type" not in settings:
        whose = f"diffusers' {settings['_class_name']}" if "_class_name" in settings else "no model of transformers"
        raise UserError(
            f"SOURCE: {path} has no model_type: it describes {whose}; give a safetensors file of it, or a "
            "module:function that builds it"
        )
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"SOURCE: {path} needs transformers, which is not installed: pip install transformers; or give a "
            "safetensors file"
        ) from error
    named = (settings.get("architectures") or [None])[0]
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(str(path), trust_remote_code=False)
            kind: Any = getattr(transformers, str(named), None)
            model = _on_meta(lambda: transformers.AutoModel.from_config(config) if kind is None else kind(config))
        except Exception as error:
            if "auto_map" in settings and "custom code" in str(error):
                raise UserError(
                    f"SOURCE: the model of {path} is code that comes with its checkpoint, which is not run here; give "
                    "its safetensors files, or a module:function that builds it"
                ) from error
            raise UserError(f"SOURCE: transformers cannot build the model of {path}: {_said(error)}") from error
    source = Source(_title(path, settings), f"{type(model).__name__} of transformers", model)
    if kind is None:
        unknown = f"{named}, which transformers does not have" if named else "no architectures"
        source.notes.append(f"The config names {unknown}: this is {type(model).__name__}, without an output layer.")
    _untie(source, settings)
    return source


def _title(path: Path, settings: dict[str, Any]) -> str:
    given = str(settings.get("_name_or_path") or "").rstrip("/").rsplit("/", 1)[-1]
    return given or path.resolve().parent.name


def _untie(source: Source, settings: dict[str, Any]) -> None:
    """Give the output layer a weight of its own where the config says so and transformers ties it all the same.

    It does so for T5 v1.1 and mT5, and unties them when it loads the authors' weights.
    """
    if settings.get("tie_word_embeddings") is not False:
        return
    try:
        inputs, outputs = source.model.get_input_embeddings(), source.model.get_output_embeddings()  # type: ignore[operator]
    except (NotImplementedError, AttributeError):  # models of several parts have none
        return
    weight = getattr(outputs, "weight", None)
    if weight is not None and weight is getattr(inputs, "weight", None):
        outputs.weight = meta(*weight.shape)
        source.notes.append(
            "The config says that the output layer is not tied to the embedding, so it is counted by itself, as in the "
            "authors' checkpoint; transformers ties it in a model that is trained from scratch."
        )


# --- safetensors ---


def _from_index(path: Path) -> Source:
    files = _json(path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"SOURCE: {path} has no weight_map, so it is not the index of a safetensors checkpoint")
    names = sorted(set(files.values()))
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise UserError(
            f"SOURCE: of the {len(names)} files that {path.name} lists, {len(missing)} are not beside it, {missing[0]} "
            "among them; shapes are in the files' headers (a config.json would do without)"
        )
    return _from_headers(path.name, [path.parent / name for name in names])


def _from_headers(name: str, files: list[Path]) -> Source:
    model, kinds, counted = Sketch(), set[str](), {"floats": 0, "others": 0}
    for tensor, shape, kind in _headers(files):
        path, _, last = tensor.rpartition(".")
        owner = model.at(path)
        if kind.startswith(("F", "BF")) and not _BUFFERS.search(tensor):
            owner._parameters[last] = meta(*shape)
            counted["floats"] += math.prod(shape)
            continue
        bits = int((re.findall(r"\d+", kind) or ["8"])[0])
        owner._buffers[last] = torch.empty(math.prod(shape) * bits // 8, dtype=torch.uint8, device="meta")
        if not kind.startswith(("F", "BF")):
            kinds.add(kind)
            counted["others"] += math.prod(shape)
    if counted["others"] > counted["floats"]:
        raise UserError(
            f"SOURCE: most of {name} is {', '.join(sorted(kinds))}: a quantized checkpoint, which is not what is "
            "trained; give the original's files or config.json"
        )
    note = "Headers do not say which parameters are tied, and a tied embedding needs more (a config.json would say so)."
    title = files[0].resolve().parent.name if name.startswith(("model.", "diffusion_pytorch_model.")) else name
    return Source(title, f"headers of {len(files)} safetensors file{'s' * (len(files) > 1)}", model, [note])


def _headers(files: list[Path]) -> Iterator[tuple[str, list[int], str]]:
    """(name, shape, dtype) of every tensor; nothing else is read."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        if not file.is_file():
            raise UserError(f"SOURCE: {file} is no file")
        try:
            with safe_open(file, framework="numpy") as content:
                for name in content.keys():  # noqa: SIM118 - it is no mapping
                    view = content.get_slice(name)
                    yield name, view.get_shape(), view.get_dtype()
        except SafetensorError as error:
            raise UserError(f"SOURCE: {file} is not a complete safetensors file: {error}") from error


# --- a function ---


def _from_function(text: str) -> Source:
    name, _, attribute = text.partition(":")
    with _here():
        build = _found(_imported(name), name, attribute)
        if not callable(build):
            raise UserError(f"SOURCE: {text} is {type(build).__name__}, not a function that builds a model")
        try:
            model = _on_meta(build)
        except (Exception, SystemExit) as error:
            raise UserError(f"SOURCE: {text}() raised {_said(error)}{_where(error)}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"SOURCE: {text}() returned {type(model).__name__}, not a torch.nn.Module")
    return Source(attribute, text, model)


@contextlib.contextmanager
def _here() -> Iterator[None]:
    """Modules of the working directory can be imported, as `python -m` has it; what they print goes to stderr."""
    sys.path.insert(0, "")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.path.remove("")


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            raise UserError(
                f"SOURCE: there is no module {missing!r} here or among the installed ones; run where it is, or set "
                "PYTHONPATH"
            ) from error
        raise UserError(f"SOURCE: importing {name} raised {_said(error)}{_where(error)}") from error


def _found(place: Any, name: str, attribute: str) -> Any:
    for part in attribute.split("."):
        if not hasattr(place, part):
            close = difflib.get_close_matches(part, dir(place), n=1)
            raise UserError(f"SOURCE: {name} has no {attribute!r}" + "".join(f"; did you mean {c}?" for c in close))
        place = getattr(place, part)
    return place


def _on_meta(build: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return build()


def _said(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:2])}" if lines else type(error).__name__


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or frames[-1].filename == __file__:
        return ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What transformers says while it builds goes to stderr if it is an error, and nowhere if it is not."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
