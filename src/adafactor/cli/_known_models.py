"""Known models by name: their parameters' names and shapes, and which are tied, without data.

Sizes are the published ones; names are those of transformers and diffusers. ``tests/test_known_models.py`` holds the
numbers of parameters against what their authors say, and the shapes against the packages' own models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import nn


class Sketch(nn.Module):
    """A tree of modules on the meta device that have weights and compute nothing."""

    def add(self, path: str, *shape: int, bias: int = 0) -> None:
        """A module with a weight, and a bias of so many numbers."""
        module = self.put(path, nn.Module())
        module.weight = meta(*shape)
        if bias:
            module.bias = meta(bias)

    def linear(self, path: str, out: int, into: int) -> None:
        """With a bias."""
        self.add(path, out, into, bias=out)

    def norm(self, path: str, width: int) -> None:
        """With a bias."""
        self.add(path, width, bias=width)

    def embed(self, path: str, rows: int, width: int) -> nn.Parameter:
        weight = meta(rows, width)
        self.put(path, nn.Embedding(rows, width, _weight=weight)).weight = weight
        return weight

    def tie(self, path: str, weight: nn.Parameter, *, embeds: bool = False, bias: int = 0) -> None:
        """Another module with the same weight: an output layer, or an embedding."""
        rows, width = weight.shape
        module = self.put(path, nn.Embedding(rows, width, _weight=weight) if embeds else nn.Module())
        module.weight = weight
        if bias:
            module.bias = meta(bias)

    def put(self, path: str, module: nn.Module) -> nn.Module:
        way, _, last = path.rpartition(".")
        self.at(way)._modules[last] = module
        return module

    def at(self, path: str) -> nn.Module:
        """The module of that path, made where there is none."""
        module: nn.Module = self
        for name in path.split(".") if path else []:
            # Straight into the table that torch walks: a checkpoint's names may be those of methods.
            module = cast(nn.Module, module._modules.setdefault(name, nn.Module()))
        return module


def meta(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"))


def t5(
    width: int,
    inner: int,
    heads: int,
    layers: int,
    *,
    head: int = 64,
    vocabulary: int = 32_128,
    gated: bool = False,
    tied: bool = True,
    decoder: bool = True,
) -> Sketch:
    """T5 (arXiv 1910.10683); gated and not tied to the output, T5 v1.1 and mT5 (arXiv 2010.11934)."""
    model = Sketch()
    shared = model.embed("shared", vocabulary, width)
    for stack in ("encoder", "decoder")[: 1 + decoder]:
        model.tie(f"{stack}.embed_tokens", shared, embeds=True)
        kinds = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
        for layer in range(layers):
            block = f"{stack}.block.{layer}.layer"
            for place, kind in enumerate(kinds):
                for matrix in "qkv":
                    model.add(f"{block}.{place}.{kind}.{matrix}", heads * head, width)
                model.add(f"{block}.{place}.{kind}.o", width, heads * head)
                if layer == place == 0:
                    model.embed(f"{block}.{place}.{kind}.relative_attention_bias", 32, heads)
                model.add(f"{block}.{place}.layer_norm", width)
            feed = f"{block}.{len(kinds)}"
            for matrix in ("wi_0", "wi_1") if gated else ("wi",):
                model.add(f"{feed}.DenseReluDense.{matrix}", inner, width)
            model.add(f"{feed}.DenseReluDense.wo", width, inner)
            model.add(f"{feed}.layer_norm", width)
        model.add(f"{stack}.final_layer_norm", width)
    if decoder and tied:
        model.tie("lm_head", shared)
    elif decoder:
        model.add("lm_head", vocabulary, width)
    return model


def bert(width: int, layers: int, vocabulary: int = 30_522) -> Sketch:
    """BERT (arXiv 1810.04805) with the head of masked language modelling, whose output layer is the embedding."""
    model = Sketch()
    words = model.embed("bert.embeddings.word_embeddings", vocabulary, width)
    model.embed("bert.embeddings.position_embeddings", 512, width)
    model.embed("bert.embeddings.token_type_embeddings", 2, width)
    model.norm("bert.embeddings.LayerNorm", width)
    for layer in range(layers):
        block = f"bert.encoder.layer.{layer}"
        for matrix in ("query", "key", "value"):
            model.linear(f"{block}.attention.self.{matrix}", width, width)
        model.linear(f"{block}.attention.output.dense", width, width)
        model.norm(f"{block}.attention.output.LayerNorm", width)
        model.linear(f"{block}.intermediate.dense", 4 * width, width)
        model.linear(f"{block}.output.dense", width, 4 * width)
        model.norm(f"{block}.output.LayerNorm", width)
    model.linear("cls.predictions.transform.dense", width, width)
    model.norm("cls.predictions.transform.LayerNorm", width)
    model.tie("cls.predictions.decoder", words, bias=vocabulary)
    return model


def gpt2(width: int, layers: int) -> Sketch:
    """GPT-2: matrices are stored (in, out), and the output layer is the embedding."""
    model = Sketch()
    words = model.embed("transformer.wte", 50_257, width)
    model.embed("transformer.wpe", 1024, width)
    for layer in range(layers):
        block = f"transformer.h.{layer}"
        model.norm(f"{block}.ln_1", width)
        model.add(f"{block}.attn.c_attn", width, 3 * width, bias=3 * width)
        model.add(f"{block}.attn.c_proj", width, width, bias=width)
        model.norm(f"{block}.ln_2", width)
        model.add(f"{block}.mlp.c_fc", width, 4 * width, bias=4 * width)
        model.add(f"{block}.mlp.c_proj", 4 * width, width, bias=width)
    model.norm("transformer.ln_f", width)
    model.tie("lm_head", words)
    return model


def llama(layers: int, width: int, inner: int, keys: int, vocabulary: int = 128_256, *, tied: bool = False) -> Sketch:
    """Llama 3 (arXiv 2407.21783) and Mistral 7B (arXiv 2310.06825): keys and values of ``keys`` features, no biases."""
    model = Sketch()
    words = model.embed("model.embed_tokens", vocabulary, width)
    for layer in range(layers):
        block = f"model.layers.{layer}"
        for matrix, out in (("q", width), ("k", keys), ("v", keys), ("o", width)):
            model.add(f"{block}.self_attn.{matrix}_proj", out, width)
        model.add(f"{block}.mlp.gate_proj", inner, width)
        model.add(f"{block}.mlp.up_proj", inner, width)
        model.add(f"{block}.mlp.down_proj", width, inner)
        model.add(f"{block}.input_layernorm", width)
        model.add(f"{block}.post_attention_layernorm", width)
    model.add("model.norm", width)
    if tied:
        model.tie("lm_head", words)
    else:
        model.add("lm_head", vocabulary, width)
    return model


def palm(layers: int, width: int, heads: int) -> Sketch:
    """PaLM (arXiv 2204.02311): heads of 256 that share one key and one value, attention beside a gated feed-forward."""
    model = Sketch()
    words = model.embed("embedding", 256_000, width)
    for layer in range(layers):
        block = f"layers.{layer}"
        model.add(f"{block}.norm", width)
        model.add(f"{block}.attention.q", 256 * heads, width)
        model.add(f"{block}.attention.k", 256, width)
        model.add(f"{block}.attention.v", 256, width)
        model.add(f"{block}.attention.o", width, 256 * heads)
        model.add(f"{block}.mlp.gate", 4 * width, width)
        model.add(f"{block}.mlp.up", 4 * width, width)
        model.add(f"{block}.mlp.down", width, 4 * width)
    model.add("norm", width)
    model.tie("output", words)
    return model


def resnet50() -> Sketch:
    """ResNet-50 (arXiv 1512.03385) as torchvision has it."""
    model = Sketch()

    def convolution(conv: str, norm: str, out: int, into: int, kernel: int) -> None:
        model.add(conv, out, into, kernel, kernel)
        model.norm(norm, out)

    convolution("conv1", "bn1", 64, 3, 7)
    into = 64
    for level, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), 1):
        for block in range(blocks):
            at = f"layer{level}.{block}"
            convolution(f"{at}.conv1", f"{at}.bn1", width, into, 1)
            convolution(f"{at}.conv2", f"{at}.bn2", width, width, 3)
            convolution(f"{at}.conv3", f"{at}.bn3", 4 * width, width, 1)
            if block == 0:
                convolution(f"{at}.downsample.0", f"{at}.downsample.1", 4 * width, into, 1)
            into = 4 * width
    model.linear("fc", 1000, 2048)
    return model


def unet(widths: tuple[int, ...], depths: tuple[int, ...], middle: int, text: int, pooled: int = 0) -> Sketch:
    """The UNet of Stable Diffusion (arXiv 2112.10752), and of XL (arXiv 2307.01952), which adds ``pooled`` features.

    Args:
        widths: channels of each level.
        depths: transformer blocks at each place of a level.
        middle: transformer blocks in the middle.
        text: features of the text.
        pooled: features of what is added to the time: pooled text and image sizes.
    """
    model, time = Sketch(), 4 * widths[0]

    def convolution(path: str, out: int, into: int, kernel: int = 3) -> None:
        model.add(path, out, into, kernel, kernel, bias=out)

    def residual(path: str, into: int, out: int) -> None:
        model.norm(f"{path}.norm1", into)
        convolution(f"{path}.conv1", out, into)
        model.linear(f"{path}.time_emb_proj", out, time)
        model.norm(f"{path}.norm2", out)
        convolution(f"{path}.conv2", out, out)
        if into != out:
            convolution(f"{path}.conv_shortcut", out, into, 1)

    def transformer(path: str, width: int, depth: int) -> None:
        if depth == 0:
            return
        project = model.linear if pooled else partial(convolution, kernel=1)
        model.norm(f"{path}.norm", width)
        project(f"{path}.proj_in", width, width)
        for block in range(depth):
            at = f"{path}.transformer_blocks.{block}"
            for place, source in ((1, width), (2, text)):  # attention to itself, then to the text
                model.norm(f"{at}.norm{place}", width)
                model.add(f"{at}.attn{place}.to_q", width, width)
                model.add(f"{at}.attn{place}.to_k", width, source)
                model.add(f"{at}.attn{place}.to_v", width, source)
                model.linear(f"{at}.attn{place}.to_out.0", width, width)
            model.norm(f"{at}.norm3", width)
            model.linear(f"{at}.ff.net.0.proj", 8 * width, width)  # gated, so twice the inner width
            model.linear(f"{at}.ff.net.2", width, 4 * width)
        project(f"{path}.proj_out", width, width)

    convolution("conv_in", widths[0], 4)
    model.linear("time_embedding.linear_1", time, widths[0])
    model.linear("time_embedding.linear_2", time, time)
    if pooled:
        model.linear("add_embedding.linear_1", time, pooled)
        model.linear("add_embedding.linear_2", time, time)
    skips, into, last = [widths[0]], widths[0], len(widths) - 1
    for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        at = f"down_blocks.{level}"
        for place in range(2):
            residual(f"{at}.resnets.{place}", into, width)
            transformer(f"{at}.attentions.{place}", width, depth)
            into = width
            skips.append(into)
        if level < last:
            convolution(f"{at}.downsamplers.0.conv", width, width)
            skips.append(width)
    residual("mid_block.resnets.0", into, into)
    transformer("mid_block.attentions.0", into, middle)
    residual("mid_block.resnets.1", into, into)
    for level, (width, depth) in enumerate(zip(widths[::-1], depths[::-1], strict=True)):
        at = f"up_blocks.{level}"
        for place in range(3):
            residual(f"{at}.resnets.{place}", into + skips.pop(), width)
            transformer(f"{at}.attentions.{place}", width, depth)
            into = width
        if level < last:
            convolution(f"{at}.upsamplers.0.conv", width, width)
    model.norm("conv_norm_out", into)
    convolution("conv_out", 4, into)
    return model


def flux(width: int = 3072, double: int = 19, single: int = 38, text: int = 4096, pooled: int = 768) -> Sketch:
    """The transformer of FLUX.1 [dev], with guidance, as diffusers has it (its weights' own config.json)."""
    model, inner, head = Sketch(), 4 * width, 128

    for kind, into in (("timestep", 256), ("guidance", 256), ("text", pooled)):
        model.linear(f"time_text_embed.{kind}_embedder.linear_1", width, into)
        model.linear(f"time_text_embed.{kind}_embedder.linear_2", width, width)
    model.linear("context_embedder", width, text)
    model.linear("x_embedder", width, 64)
    for block in range(double):
        at = f"transformer_blocks.{block}"
        model.linear(f"{at}.norm1.linear", 6 * width, width)
        model.linear(f"{at}.norm1_context.linear", 6 * width, width)
        for matrix in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            model.linear(f"{at}.attn.{matrix}", width, width)
        for norm in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            model.add(f"{at}.attn.{norm}", head)
        for feed in ("ff", "ff_context"):
            model.linear(f"{at}.{feed}.net.0.proj", inner, width)
            model.linear(f"{at}.{feed}.net.2", width, inner)
    for block in range(single):
        at = f"single_transformer_blocks.{block}"
        model.linear(f"{at}.norm.linear", 3 * width, width)
        model.linear(f"{at}.proj_mlp", inner, width)
        model.linear(f"{at}.proj_out", width, width + inner)
        for matrix in ("to_q", "to_k", "to_v"):
            model.linear(f"{at}.attn.{matrix}", width, width)
        for norm in ("norm_q", "norm_k"):
            model.add(f"{at}.attn.{norm}", head)
    model.linear("norm_out.linear", 2 * width, width)
    model.linear("proj_out", 64, width)
    return model


_v1_1 = partial(t5, gated=True, tied=False)
_mt5 = partial(_v1_1, vocabulary=250_112)

MODELS: dict[str, Callable[[], Sketch]] = {
    "t5-small": partial(t5, 512, 2048, 8, 6),
    "t5-base": partial(t5, 768, 3072, 12, 12),
    "t5-large": partial(t5, 1024, 4096, 16, 24),
    "t5-3b": partial(t5, 1024, 16_384, 32, 24, head=128),
    "t5-11b": partial(t5, 1024, 65_536, 128, 24, head=128),
    "t5-v1.1-small": partial(_v1_1, 512, 1024, 6, 8),
    "t5-v1.1-base": partial(_v1_1, 768, 2048, 12, 12),
    "t5-v1.1-large": partial(_v1_1, 1024, 2816, 16, 24),
    "t5-v1.1-xl": partial(_v1_1, 2048, 5120, 32, 24),
    "t5-v1.1-xxl": partial(_v1_1, 4096, 10_240, 64, 24),
    "mt5-small": partial(_mt5, 512, 1024, 6, 8),
    "mt5-base": partial(_mt5, 768, 2048, 12, 12),
    "mt5-large": partial(_mt5, 1024, 2816, 16, 24),
    "mt5-xl": partial(_mt5, 2048, 5120, 32, 24),
    "mt5-xxl": partial(_mt5, 4096, 10_240, 64, 24),
    "bert-tiny": partial(bert, 128, 2),  # this and the next three: arXiv 1908.08962
    "bert-mini": partial(bert, 256, 4),
    "bert-small": partial(bert, 512, 4),
    "bert-medium": partial(bert, 512, 8),
    "bert-base": partial(bert, 768, 12),
    "bert-large": partial(bert, 1024, 24),
    "gpt2": partial(gpt2, 768, 12),
    "gpt2-medium": partial(gpt2, 1024, 24),
    "gpt2-large": partial(gpt2, 1280, 36),
    "gpt2-xl": partial(gpt2, 1600, 48),
    "llama-3.2-1b": partial(llama, 16, 2048, 8192, 512, tied=True),
    "llama-3.2-3b": partial(llama, 28, 3072, 8192, 1024, tied=True),
    "llama-3-8b": partial(llama, 32, 4096, 14_336, 1024),
    "llama-3-70b": partial(llama, 80, 8192, 28_672, 1024),
    "llama-3.1-405b": partial(llama, 126, 16_384, 53_248, 1024),
    "mistral-7b": partial(llama, 32, 4096, 14_336, 1024, 32_000),
    "palm-8b": partial(palm, 32, 4096, 16),
    "palm-62b": partial(palm, 64, 8192, 32),
    "palm-540b": partial(palm, 118, 18_432, 48),
    "sd-1.5-unet": partial(unet, (320, 640, 1280, 1280), (1, 1, 1, 0), 1, 768),
    "sdxl-unet": partial(unet, (320, 640, 1280), (0, 2, 10), 10, 2048, 2816),
    "flux-dev": flux,
    "resnet-50": resnet50,
}
