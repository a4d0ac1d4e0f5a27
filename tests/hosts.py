"""Tiny hosts of every family, made from configs, and where a person would hook each of them.

`FAMILIES` is the hand-written oracle of the aliases: module paths in the model with its head.
Shapes: 3 layers, d = 32, 4 heads, random weights with a spread that makes attention sharp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from torch import nn

from actcache.demo.train_host import END_OF_TEXT, train_tokenizer
from actcache.host import save_host

_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GROUPED = _SMALL | {"num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of hosts. Paths are those of the model with its head, under `base`."""

    config: dict[str, Any]
    auto: str = "AutoModelForCausalLM"
    base: str = "model."
    blocks: str = "layers"
    attn: str | None = "self_attn"
    mlp: str | None = "mlp"
    embed: str = "embed_tokens"
    raw: tuple[str, ...] = ()  # further module paths under `base`, as actcache names them
    causal: bool = True
    stateful: bool = False
    sums: bool = field(default=True)  # resid = resid_pre + attn + mlp


FAMILIES: dict[str, Family] = {
    "llama": Family(
        config=_GROUPED, raw=("layers.0.self_attn:in", "layers.1.self_attn:out.0", "rotary_emb")[:2]
    ),
    "qwen2": Family(config=_GROUPED, raw=("layers.0.self_attn:in.hidden_states",)),
    "qwen3": Family(config=_GROUPED, raw=("layers.1.self_attn.o_proj:in",)),
    "gemma2": Family(
        config=_GROUPED | {"sliding_window": 8, "query_pre_attn_scalar": 8},
        attn="post_attention_layernorm",
        mlp="post_feedforward_layernorm",
        raw=("layers.0.self_attn", "layers.1.mlp"),
    ),
    "gpt2": Family(
        config={"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
        base="transformer.",
        blocks="h",
        attn="attn",
        embed="wte",
        raw=("h.0.ln_1", "h.1.mlp.act:in"),
    ),
    "gpt_neox": Family(
        config=_SMALL,
        base="gpt_neox.",
        attn="attention",
        embed="embed_in",
        raw=("layers.0.attention:in", "layers.1.mlp:in"),
    ),
    "mixtral": Family(
        config=_GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        raw=("layers.0.mlp.gate:out.1", "layers.1.mlp.experts"),
    ),
    "bert": Family(
        config=_SMALL | {"type_vocab_size": 2},
        auto="AutoModelForMaskedLM",
        base="bert.",
        blocks="encoder.layer",
        attn="attention.output.dense",
        mlp="output.dense",
        embed="embeddings.word_embeddings",
        raw=("encoder.layer.0.attention.self:out.0", "embeddings"),
        causal=False,
        sums=False,  # norms come behind the sums
    ),
    "modernbert": Family(
        config=_SMALL
        | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 0}
        | {"sep_token_id": 0},
        auto="AutoModelForMaskedLM",
        attn="attn",
        embed="embeddings.tok_embeddings",
        raw=("layers.1.attn:in", "layers.0.mlp.Wi"),
        causal=False,
    ),
    "t5": Family(
        config={"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_decoder_layers": 2}
        | {"num_heads": 4, "eos_token_id": 0, "pad_token_id": 0, "decoder_start_token_id": 0},
        auto="AutoModelForSeq2SeqLM",
        base="",
        blocks="encoder.block",
        attn="layer.0.SelfAttention",
        mlp="layer.1.DenseReluDense",
        embed="encoder.embed_tokens",
        raw=("encoder.block.0:out.0", "encoder.block.1.layer.0.SelfAttention.q"),
        causal=False,
    ),
    "mamba": Family(
        config={"hidden_size": 32, "state_size": 8, "num_hidden_layers": 3, "expand": 2}
        | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        base="backbone.",
        attn=None,
        mlp=None,
        embed="embeddings",
        raw=("layers.0.mixer", "layers.1.mixer:in"),
        stateful=True,
        sums=False,
    ),
    "qwen2_5_vl": Family(
        config={
            "text_config": _GROUPED
            | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 3, "hidden_size": 32, "intermediate_size": 64}
            | {"num_heads": 4, "out_hidden_size": 32},
        },
        auto="AutoModelForImageTextToText",
        blocks="language_model.layers",
        embed="language_model.embed_tokens",
        raw=("language_model.layers.0.self_attn:in", "language_model.layers.1.mlp.act_fn"),
    ),
}


def new_model(name: str, vocab: int, **changes: Any) -> nn.Module:
    """A random model of the family, with its head; `changes` are keys of its text config."""
    family = FAMILIES[name]
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in family.config.items()}
    inner = values.get("text_config", values)
    inner.update(vocab_size=vocab, **changes)
    config = transformers.AutoConfig.for_model(name, **values)
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, family.auto).from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.15)
    return model.eval()


def save_family(name: str, texts: list[str], folder: Path, **changes: Any) -> Path:
    """Model and tokenizer of a family as a Hugging Face folder."""
    tokenizer = train_tokenizer(texts, 400, progress=False)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    if name == "bert":  # as BERT has it: no EOS, but [CLS] in front and [SEP] behind
        special = dict.fromkeys(("cls_token", "sep_token", "pad_token"), END_OF_TEXT)
        ends = [(END_OF_TEXT, 0)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A {END_OF_TEXT}", special_tokens=ends
        )
    save_host(new_model(name, tokenizer.get_vocab_size(), **changes), tokenizer, folder, **special)
    return folder


def whole(folder: Path, name: str, **kw: Any) -> nn.Module:
    """The untruncated model with its head, as transformers loads it."""
    return getattr(transformers, FAMILIES[name].auto).from_pretrained(folder, **kw).eval()


class Oracle:
    """Plain forward hooks on the untruncated model, by the names that a store uses."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.family, self.found = model, FAMILIES[name], {}
        for hook, path in self.paths().items():
            self._hook(hook, path)

    def paths(self) -> dict[str, str]:
        """Hook name -> module path under the model, with a side where it is not the output."""
        f = self.family
        found = {"embed": f.embed}
        for layer in (0, 1):
            found[f"resid.{layer}"] = f"{f.blocks}.{layer}"
            found[f"resid_pre.{layer}"] = f"{f.blocks}.{layer}:in"
            parts = {"attn": f.attn, "mlp": f.mlp}
            found |= {f"{k}.{layer}": f"{f.blocks}.{layer}.{p}" for k, p in parts.items() if p}
        return found | {raw: raw for raw in f.raw}

    def _hook(self, hook: str, path: str) -> None:
        path, _, side = path.partition(":")
        module = self.model.get_submodule(self.family.base + path)
        side, _, item = side.partition(".")

        def after(_m: nn.Module, _args: Any, out: Any) -> None:
            out = out if isinstance(out, torch.Tensor) else out[int(item or 0)]
            self.found[hook] = out.detach()

        def before(_m: nn.Module, args: Any, kwargs: Any) -> None:
            self.found[hook] = (kwargs[item] if item else [*args, *kwargs.values()][0]).detach()

        if side == "in":
            module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            module.register_forward_hook(after)

    def __call__(self, ids: Any) -> dict[str, torch.Tensor]:
        """Hook name -> (T, d) of one context of token ids, alone and without padding."""
        self.found.clear()
        ids_1T = torch.as_tensor(ids).long()[None]
        decoder = {"decoder_input_ids": ids_1T[:, :1]} if self.family.auto.count("Seq2Seq") else {}
        with torch.no_grad():
            self.model(input_ids=ids_1T, **decoder)
        return {k: x.reshape(ids_1T.shape[1], -1) for k, x in self.found.items()}
