"""``cli/_known_models.py``: sizes as published, names and shapes as in the packages that have these models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adafactor.cli._known_models import MODELS, t5

# Exact where the authors' checkpoints say so; PaLM's are those of its table 1, to the digits given there.
PUBLISHED = {
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 76_961_152,
    "t5-v1.1-base": 247_577_856,
    "t5-v1.1-large": 783_150_080,
    "t5-v1.1-xl": 2_849_757_184,
    "t5-v1.1-xxl": 11_135_332_352,
    "mt5-small": 300_176_768,
    "mt5-base": 582_401_280,
    "mt5-large": 1_229_581_312,
    "mt5-xl": 3_742_619_648,
    "mt5-xxl": 12_921_057_280,
    "bert-tiny": 4_416_698,
    "bert-mini": 11_201_594,
    "bert-small": 28_795_194,
    "bert-medium": 41_404_730,
    "bert-base": 109_514_298,
    "bert-large": 335_174_458,
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "palm-8b": pytest.approx(8.63e9, abs=0.005e9),
    "palm-62b": pytest.approx(62.50e9, abs=0.005e9),
    "palm-540b": pytest.approx(540.35e9, abs=0.01e9),
    "sd-1.5-unet": 859_520_964,
    "sdxl-unet": 2_567_463_684,
    "flux-dev": 11_901_408_320,
    "resnet-50": 25_557_032,
}


def parameters(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def holders(model: torch.nn.Module) -> dict[str, list[str]]:
    """The modules that hold each weight which several do."""
    found: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), torch.nn.Parameter):
            found.setdefault(id(weight), []).append(path)
    return {paths[0]: paths for paths in found.values() if len(paths) > 1}


def test_the_numbers_of_parameters_are_the_published_ones_and_nothing_is_allocated() -> None:
    counted = {}
    for name, build in MODELS.items():
        params = list(build().parameters())
        assert all(p.is_meta and p.requires_grad for p in params)
        counted[name] = sum(p.numel() for p in params)
    assert counted == PUBLISHED


def test_the_encoder_alone() -> None:
    whole, encoder = parameters(t5(64, 128, 2, 3)), parameters(t5(64, 128, 2, 3, decoder=False))
    assert encoder == {name: shape for name, shape in whole.items() if not name.startswith(("decoder", "lm_head"))}


def _transformers(name: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    t5 = {"decoder_start_token_id": 0}
    llama = {"vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    kind, config = {
        "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config()),
        "bert-base": ("BertForMaskedLM", transformers.BertConfig()),
        "t5-small": ("T5ForConditionalGeneration", transformers.T5Config(**t5)),
        "mt5-small": ("MT5ForConditionalGeneration", transformers.MT5Config(**t5)),
        "llama-3.2-1b": (
            "LlamaForCausalLM",
            transformers.LlamaConfig(**llama, num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True),
        ),
    }[name]
    with torch.device("meta"):
        return getattr(transformers, kind)(config)


@pytest.mark.filterwarnings("ignore")  # what another package warns of while it is imported
@pytest.mark.parametrize("name", ["gpt2", "bert-base", "t5-small", "mt5-small", "llama-3.2-1b"])
def test_names_shapes_and_ties_are_those_of_transformers(name: str) -> None:
    theirs, ours = _transformers(name), MODELS[name]()
    expected, found = parameters(theirs), parameters(ours)
    if name == "bert-base":  # a bias that two modules hold goes by the name of the first
        expected["cls.predictions.decoder.bias"] = expected.pop("cls.predictions.bias")
    if name == "mt5-small":  # transformers ties the output layer until it loads the authors' weights, which are not
        assert found.pop("lm_head.weight") == (250_112, 512)
    assert found == expected
    tied = holders(theirs)
    if name == "mt5-small":
        tied["shared"].remove("lm_head")
    assert holders(ours) == tied


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sd-1.5-unet", "sdxl-unet", "flux-dev"])
def test_names_and_shapes_are_those_of_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    flux: dict[str, Any] = {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24}
    flux |= {"attention_head_dim": 128, "in_channels": 64, "joint_attention_dim": 4096, "guidance_embeds": True}
    sdxl: dict[str, Any] = {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    }
    with torch.device("meta"):
        if name == "flux-dev":
            theirs = diffusers.FluxTransformer2DModel(**flux, pooled_projection_dim=768)
        else:
            theirs = diffusers.UNet2DConditionModel(**sdxl if name == "sdxl-unet" else {"cross_attention_dim": 768})
    assert parameters(MODELS[name]()) == parameters(theirs)
