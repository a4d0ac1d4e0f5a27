"""Where a model keeps its blocks, its attention, its MLP and its embedding, for every family.

Aliases mean the same tensor everywhere, and TransformerLens' hooks of the same name mean it too:

    attn.L, mlp.L   what attention and MLP of block L add to the residual stream, so after the
                    extra norm that Gemma 2 and 3, OLMo 2 and GLM-4 put behind them, and before the
                    norm that BERT puts behind the sum
    resid_pre.L, resid.L   what enters and leaves block L

They are found by the names of a block's children, most specific first. A family whose children are
called otherwise keeps resid, resid_pre and embed; its other modules are named by their path.

Of an encoder-decoder the encoder alone is run: text is all there is, and what a decoder computes
depends on a target text as much.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from actcache.errors import HookError

# (child of a block, sibling that must be there too), most specific first.
_PARTS: dict[str, tuple[tuple[str, str], ...]] = {
    "attn": (
        ("post_self_attn_layernorm", ""),  # GLM-4
        ("post_attention_layernorm", "post_feedforward_layernorm"),  # Gemma 2 and 3, OLMo 2
        ("attention.output.dense", ""),  # BERT and its kin
        ("self_attention.dense", ""),  # BLOOM, whose self_attention adds the residual; Falcon
        ("layer.0.SelfAttention", ""),  # T5
        *((name, "") for name in ("self_attn", "attention", "attn", "self_attention")),
    ),
    "mlp": (
        ("post_mlp_layernorm", ""),
        ("post_feedforward_layernorm", ""),
        ("output.dense", "attention.output.dense"),
        ("mlp.dense_4h_to_h", "self_attention.dense"),
        ("layer.1.DenseReluDense", ""),
        ("ffn.down_proj", "norm_1"),  # MPT, whose ffn adds the residual
        *((name, "") for name in ("mlp", "feed_forward", "ffn", "block_sparse_moe")),
        ("fc2", "self_attn"),  # OPT, BART
    ),
}


def part_of(block: nn.Module, kind: str) -> str | None:
    """Path inside `block` of the module whose output is `kind` ("attn" or "mlp"), if known."""
    inside = dict(block.named_modules())
    for name, sibling in _PARTS[kind]:
        if name in inside and (not sibling or sibling in inside):
            return name
    return None


def runner(model: nn.Module) -> nn.Module:
    """The part of `model` that a forward pass runs: of an encoder-decoder the encoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return model
    encoder: nn.Module = model.get_encoder()  # type: ignore[operator]
    return encoder


def runner_path(model: nn.Module) -> str:
    """Path of `runner(model)` with a dot behind it; empty if all of the model runs."""
    part = runner(model)
    path = next(name for name, module in model.named_modules() if module is part)
    return f"{path}." if path else ""


def block_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the transformer blocks of the language model.

    Raises HookError if the model has no list of as many modules as its config says.
    """
    config: Any = getattr(model, "config", None)
    n = getattr(model, "kept_blocks", None) or _count(config)
    inside = runner_path(model)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n and path.startswith(inside)
    ]
    text = [found for found in lists if not re.search(r"visual|vision", found[0])]
    if not text:
        raise HookError(
            "the host has no list of transformer blocks that aliases could name; name modules "
            "by their path instead"
        )
    return text[0]


def _count(config: Any) -> int | None:
    """Blocks of the text model, of the encoder where there are both."""
    if config is None:
        return None
    text = config.get_text_config()
    n: int | None = getattr(text, "num_hidden_layers", None)
    if getattr(text, "is_encoder_decoder", False):
        n = getattr(text, "encoder_layers", n)
    return n


def embedding_path(model: nn.Module) -> str:
    """Path of the token embedding that a forward pass runs. HookError if there is none."""
    embedding = runner(model).get_input_embeddings()  # type: ignore[operator]
    for path, module in model.named_modules():
        if module is embedding:
            return str(path)
    raise HookError("hook 'embed': the host has no input embedding module")


def deepest_block(modules: Iterable[str], model: nn.Module) -> int | None:
    """Number of the deepest block that any of the module paths needs.

    None if one lies behind the blocks or beside them, so that all blocks have to run.
    """
    try:
        path, _ = block_list(model)
    except HookError:
        return None
    embedding = embedding_path(model)
    deepest = 0
    for module in modules:
        match = re.match(rf"{re.escape(path)}\.(\d+)(\.|$)", module)
        if match is None and module != embedding:
            return None
        deepest = max(deepest, int(match[1]) if match else 0)
    return deepest


def cut(model: nn.Module, deepest: int | None) -> None:
    """Drop the blocks above `deepest`, and all blocks of a decoder that does not run.

    The config stays as it is: what remains is built as in the whole model, also where a block's
    form depends on how many there are (shared keys and values, alternating attention).
    """
    if deepest is not None:
        path, blocks = block_list(model)
        model.set_submodule(path, blocks[: deepest + 1])
        model.kept_blocks = deepest + 1  # type: ignore[assignment]
    inside = runner_path(model)
    idle = [
        (path, module)
        for path, module in model.named_modules()
        if inside and isinstance(module, nn.ModuleList) and not path.startswith(inside)
    ]
    for path, _ in idle:
        if not any(path.startswith(f"{outer}.") for outer, _ in idle):
            model.set_submodule(path, nn.ModuleList())


def cut_class(whole: type[Any], deepest: int | None) -> type[Any]:
    """`whole`, but its instances lose the blocks above `deepest` as they are made."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        whole.__init__(self, *args, **kwargs)
        cut(self, deepest)

    # The name stays: the library finds how to convert a checkpoint by it.
    return type(whole.__name__, (whole,), {"__init__": init, "__module__": whole.__module__})


def is_causal(model: nn.Module) -> bool:
    """Whether tokens see only what is before them, by what the attention modules say."""
    try:
        modules: Iterable[nn.Module] = block_list(model)[1].modules()
    except HookError:
        modules = runner(model).modules()
    said = [m.is_causal for m in modules if isinstance(getattr(m, "is_causal", None), bool)]
    return any(said) or not said


def is_stateful(model: nn.Module) -> bool:
    """Whether a state runs from token to token (Mamba and its kin, hybrids with it)."""
    return bool(getattr(model, "_is_stateful", False))
