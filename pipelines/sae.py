"""`python -m pipelines.sae MODEL DATASET [options]`: k-sparse autoencoders in one command.

The command line of EleutherAI's sae (sparsify), over a store: activations are computed once and
kept, so another --k or --lr on the same text trains without running the model. By default there is
one SAE for the residual stream after every layer, trained one after the other, each in its folder.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from actcache.host import Host
from pipelines import both
from pipelines.both import Say, Values, option
from saetrain.errors import ConfigError

EXPANSION = 32
POSITIONAL = ("model", "dataset")
EITHER = (  # options that exclude each other
    ("layers", "layer_stride"),
    ("hookpoints", "layers"),
    ("hookpoints", "layer_stride"),
    ("num_latents", "expansion_factor"),
    ("num_epochs", "train_tokens"),
    ("lr_warmup_steps", "lr_warmup_fraction"),
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of the command: the settings it stands for, its meaning, its default."""

    model: str = option("cache.host.model", "folder of a model, or its name on the hub", MISSING)
    dataset: str = option(
        "cache.data.files cache.data.dataset",
        "parquet file, folder or glob; or a data set of the hub, which is streamed",
        MISSING,
    )
    # the SAE
    k: int = option("train.sae.k", "latents that fire per token", 32)
    expansion_factor: int | None = option(
        "train.sae.expansion_factor",
        "latents as a multiple of the width",
        None,
        f"{EXPANSION}, unless --num_latents is given",
    )
    num_latents: int | None = option(
        "train.sae.n_latents", "number of latents, instead of --expansion_factor"
    )
    auxk_alpha: float = option("train.sae.auxk_alpha", "weight of AuxK, which revives dead latents")
    auxk: int | None = option(
        "train.sae.aux_k", "dead latents in AuxK, 0 is off", unset="half the width"
    )
    decoder_norm: Literal["unit", "free"] = option(
        "train.sae.decoder_norm", "length of decoder rows"
    )
    resample_every: int | None = option(
        "train.sae.resample_every", "steps after which dead latents get new weights", unset="never"
    )
    resample_times: int = option("train.sae.resample_times", "at most so often")
    init_bias: Literal["mean", "geometric_median", "zero"] = option(
        "train.sae.init_bias", "start of the decoder's bias"
    )
    init_encoder: Literal["tied", "random"] = option(
        "train.sae.init_encoder", "start of the encoder"
    )
    dead_feature_threshold: int = option(
        "train.sae.dead_after_tokens", "a latent silent for so many tokens counts as dead"
    )
    center: Literal["none", "mean"] = option("train.sae.center", "what is subtracted from inputs")
    scale: Literal["none", "sqrt_d", "unit"] = option("train.sae.scale", "mean norm of the inputs")
    reconstruction: Literal["fvu", "mse", "sse"] = option(
        "train.sae.reconstruction", "unit of the reconstruction loss"
    )
    # which activations
    layers: tuple[int, ...] | None = option("cache.layers", "layers to train on", unset="all")
    layer_stride: int | None = option(
        "", "every so many layers, from 0, instead of --layers", None, "1"
    )
    hookpoints: tuple[str, ...] | None = option(
        "cache.hooks",
        "hooks instead of layers: resid.2, mlp.2, attn.2, or paths of modules",
        None,
        "the residual stream after each layer",
    )
    # training
    batch_size: int = option(
        "train.batch_tokens", "SEQUENCES of a step; a step has batch_size x ctx_len tokens", 8
    )
    lr: float | None = option(
        "train.optim.lr",
        "learning rate of Adam",
        unset="2e-4 / sqrt(num_latents / 2^14), more in runs of under 2^15 steps",
    )
    lr_warmup_steps: int | None = option(
        "train.schedule.warmup_steps", "steps of linear warm-up", unset="5 % of all"
    )
    lr_warmup_fraction: float | None = option(
        "train.schedule.warmup_fraction", "the same as a share of all steps", unset="0.05"
    )
    lr_decay_fraction: float = option(
        "train.schedule.decay_fraction", "share of the steps in which lr falls to 0, at the end"
    )
    adam_betas: tuple[float, ...] = option("train.optim.betas", "decay rates of Adam's moments")
    adam_eps: float = option("train.optim.eps", "epsilon of Adam")
    clip_norm: float | None = option("train.optim.clip_norm", "largest norm of the gradient")
    ema_decay: float | None = option(
        "train.optim.ema_decay", "average the weights over steps", unset="no average"
    )
    grad_acc_steps: int = option("train.grad_acc_steps", "pieces whose gradients are added")
    micro_acc_steps: int = option("train.micro_acc_steps", "pieces of each of these")
    num_epochs: int | None = option(
        "train.epochs", "passes over the text", None, "1, unless --train_tokens is given"
    )
    train_tokens: int | None = option("train.tokens", "tokens trained on, instead of --num_epochs")
    seed: int = option("train.seed", "of initial weights and of the order")
    precision: Literal["fp32", "bf16"] = option("train.precision", "of the SAE's arithmetic")
    compile: bool = option("train.compile", "compile the SAE with torch.compile")
    window_rows: int = option("train.stream.window_rows", "rows that are shuffled together")
    device: str = option("cache.host.device train.device", "of model and SAE: cpu, cuda, cuda:1")
    held_out_fraction: float = option("train.held_out_fraction", "documents kept for evaluation")
    eval_tokens: int | None = option("train.eval.tokens", "held-out tokens used at most")
    eval_every: int | None = option(
        "train.eval.every_steps", "also evaluate after every so many steps", unset="at the end only"
    )
    eval_bootstrap: int = option("train.eval.bootstrap", "resamples behind the standard error")
    eval_pca_tokens: int = option("train.eval.pca_tokens", "tokens the PCA baseline is fitted on")
    # text
    ctx_len: int | None = option(
        "cache.context",
        "tokens of a sequence",
        None,
        f"{both.LONGEST}, or the model's positions if fewer",
    )
    max_tokens: int | None = option(
        "cache.tokens",
        "tokens cached, rounded up to whole segments",
        unset=f"all of local files, {both.STREAM_TOKENS:,} of a stream",
    )
    max_samples: int | None = option("cache.data.max_samples", "documents read", unset="all")
    split: str = option("cache.data.split", "split of a data set of the hub")
    subset: str | None = option("cache.data.subset", "configuration of a data set of the hub")
    data_revision: str | None = option("cache.data.revision", "revision of a data set of the hub")
    text_column: str | None = option(
        "cache.data.text_column", "column with the text, or several: a+b", unset="found by name"
    )
    id_column: str | None = option(
        "cache.data.id_column", "column that names a document", unset="its text does"
    )
    separator: Literal["eos", "none"] = option("cache.pack.separator", "token after each document")
    bos: Literal["auto", "context", "none"] = option(
        "cache.pack.bos", "BOS in front of sequences; auto: as the tokenizer does"
    )
    attend_across_documents: bool = option(
        "cache.pack.attend_across_documents", "attention crosses borders of documents"
    )
    drop_tail: bool = option("cache.pack.drop_tail", "drop sequences shorter than ctx_len")
    # model and store
    revision: str | None = option("cache.host.revision", "revision of a model of the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = option(
        "cache.host.dtype", "of the model's forward pass"
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = option(
        "cache.host.attention", "attention kernel of the model"
    )
    load_in_8bit: bool = option("", "load the model in 8 bits (bitsandbytes)", False)
    host_batch_tokens: int = option("cache.host.batch_tokens", "tokens of one forward pass")
    trust_remote_code: bool = option("cache.host.trust_remote_code", "run code of the repository")
    store: str | None = option(
        "cache.store", "folder of the store", None, "a folder under runs_dir/stores"
    )
    store_dtype: Literal["bfloat16", "float16", "float32"] = option(
        "cache.layout.dtype", "number type of stored activations"
    )
    segment_rows: int | None = option(
        "cache.layout.segment_rows",
        "rows of a segment, a multiple of ctx_len",
        None,
        f"about {both.SEGMENT_ROWS:,}",
    )
    chunk_bytes: int = option("cache.layout.chunk_bytes", "bytes of an inner chunk")
    unit_bytes: int = option("cache.layout.unit_bytes", "bytes of parquet that are read as a unit")
    order: Literal["permuted", "context"] = option("cache.layout.order", "of rows in a segment")
    # what is kept and shown
    run_name: str | None = option(
        "train.sae_series", "folder under runs_dir for the SAEs of this command"
    )
    sae_name: str | None = option(
        "train.sae_name", "name of the SAE and its folder", unset="topk-HOOK"
    )
    runs_dir: str = option("train.runs_dir", "where runs go")
    save_every: int | None = option("train.checkpoint.every_steps", "steps between checkpoints")
    keep_checkpoints: int = option("train.checkpoint.keep", "how many of them stay")
    fresh: bool = option("train.fresh", "train again though the run is there")
    log_every: int = option("train.log_every", "steps between rows of metrics.jsonl")
    report: bool = option("train.report", "write report.html at the end")
    progress: bool = option("cache.progress train.progress", "progress bars")
    log_to_wandb: bool = option("", "log to Weights & Biases, online", False)
    wandb_mode: Literal["disabled", "online", "offline"] | None = option(
        "train.wandb.mode", "the same, by name", None, "disabled"
    )
    wandb_project: str = option("train.wandb.project", "project at Weights & Biases")
    wandb_entity: str | None = option("train.wandb.entity", "entity at Weights & Biases")
    wandb_name: str | None = option(
        "train.wandb.name", "run name at Weights & Biases", unset="name of the run folder"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, 1 after an error, 130 after Ctrl-C; a wrong option exits with 2."""
    cfg = TrainConfig(**vars(parser().parse_args(argv)))
    shown = dict(both.words_of(TrainConfig, spelled))
    shown["batch_tokens"] = "--batch_size x --ctx_len"

    def work(say: Say) -> None:
        values = values_for(cfg)
        host = both.open_host(values)
        settings = both.settings_of(with_layers(cfg, values, host), host, say)
        both.cache_then_train(*settings, host, say)

    return both.guarded(work, shown)


def spelled(name: str) -> str:
    """An option as the user types it."""
    return name.upper() if name in POSITIONAL else f"--{name}"


def values_for(cfg: TrainConfig) -> Values:
    """The settings that the options stand for, layers aside. Contradictions: ConfigError."""
    for one, other in EITHER:
        a, b = getattr(cfg, one), getattr(cfg, other)
        if a is not None and b is not None:
            raise ConfigError(f"give --{one} or --{other}, not both, got {a} and {b}")
    if cfg.log_to_wandb and cfg.wandb_mode == "disabled":
        raise ConfigError("--log_to_wandb and --wandb_mode disabled contradict each other")
    values = both.values_of(cfg)
    del values["cache.data.files"], values["cache.data.dataset"]
    values |= both.data_values(cfg.dataset, cfg.split)
    values["train.sae.name"] = "topk"
    if cfg.load_in_8bit:
        values["cache.host.quantization"] = {"load_in_8bit": True}
    if cfg.expansion_factor is None and cfg.num_latents is None:
        values["train.sae.expansion_factor"] = EXPANSION
    if cfg.num_epochs is None and cfg.train_tokens is None:
        values["train.epochs"] = 1
    values["train.wandb.mode"] = cfg.wandb_mode or ("online" if cfg.log_to_wandb else "disabled")
    return values


def with_layers(cfg: TrainConfig, values: Values, host: Host) -> Values:
    """`values` with the hooks; a stride counts from layer 0."""
    layers = cfg.layers
    if cfg.layer_stride is not None:
        if cfg.layer_stride < 1:
            raise ConfigError(f"--layer_stride: expected at least 1, got {cfg.layer_stride}")
        layers = tuple(range(0, both.n_layers(host), cfg.layer_stride))
    return values | {"cache.hooks": cfg.hookpoints or "resid", "cache.layers": layers}


# -- the command line ------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """One argument per field of TrainConfig."""
    made = argparse.ArgumentParser(
        prog="python -m pipelines.sae",
        usage="%(prog)s MODEL DATASET [options]",
        description="Cache activations of MODEL on DATASET, train an SAE per layer, evaluate.",
        epilog="The same command again continues what was stopped. none is a value where unset is.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    hints = get_type_hints(TrainConfig)
    for f in fields(TrainConfig):
        about = f.metadata["help"].replace("%", "%%")
        if f.name in POSITIONAL:
            made.add_argument(f.name, metavar=f.name.upper(), help=about)
            continue
        default = f.metadata["unset"] if f.default is None else _shown(f.default)
        about += f" (default: {default})".replace("%", "%%")
        made.add_argument(f"--{f.name}", help=about, **_form(hints[f.name]))
    return made


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return f"{value:_}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def _form(hint: Any) -> dict[str, Any]:
    """Keywords of add_argument for a field of this type."""
    kinds = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    optional = type(None) in kinds
    kind = next(k for k in kinds if k is not type(None))
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return {"type": _reader(item, False), "metavar": _METAVARS[item], "nargs": "+"}
    return {"type": _reader(kind, optional), "metavar": _METAVARS[kind]}


_METAVARS = {int: "N", float: "X", str: "TEXT"}


def _reader(kind: type, optional: bool) -> Callable[[str], Any]:
    """Text -> value; whole numbers may be written 1e8, and `none` unsets what may be unset."""

    def read(text: str) -> Any:
        if optional and text == "none":
            return None
        if kind is int and not text.lstrip("+-").replace("_", "").isdigit():
            number = float(text)
            if not number.is_integer():
                raise ValueError
            return int(number)
        return kind(text)

    read.__name__ = {int: "whole number", float: "number", str: "text"}[kind]
    return read


if __name__ == "__main__":
    sys.exit(main())
