"""The host model: load any Hugging Face model and its tokenizer, know its identity.

The only module (with data.py) that imports transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def new_causal_lm(config: Mapping[str, Any], seed: int) -> nn.Module:
    """A freshly initialised causal LM from a config mapping, e.g. {"model_type": "gpt_neox", ...}."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(config)
    cfg = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model: nn.Module = AutoModelForCausalLM.from_config(cfg)
    return model


def save_host(model: nn.Module, tokenizer: Any, folder: Path, **special_tokens: str) -> None:
    """Write model and tokenizer (a `tokenizers.Tokenizer`) as an ordinary HF folder."""
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)
    wrapped.save_pretrained(folder)
    model.save_pretrained(folder)  # type: ignore[operator]
