"""SAEs on a model in memory: the programmatic form of EleutherAI's sae, in tiny sizes."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from actcache.data import chunk_and_tokenize
from actcache.errors import DataError
from actcache.host import Host, HostSettings
from pipelines.on_the_fly import SaeConfig, SaeTrainer, TrainConfig
from saetrain import load_sae
from saetrain.errors import ConfigError


@pytest.fixture(scope="module")
def gpt(tiny_host):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_host)


@pytest.fixture(scope="module")
def tokenized(tiny_host):
    tokenizer = Host(HostSettings(model=str(tiny_host))).tokenizer
    texts = [f"the {n} small cats sat on mat {n * 7} and saw {n + 3} dogs" for n in range(160)]
    ids = chunk_and_tokenize(texts, tokenizer, 16)
    return Dataset.from_dict({"input_ids": ids})


def test_the_snippet(tmp_path, gpt, tokenized):  # F40 F41 F46
    cfg = TrainConfig(
        SaeConfig(gpt.config.hidden_size, expansion_factor=2, k=4),
        batch_size=4,
        epochs=4,
        layers=(0, 1),
        lr=3e-3,
        runs_dir=str(tmp_path),
        progress=False,
    )
    trainer = SaeTrainer(cfg, tokenized, gpt)
    results = trainer.fit()
    assert list(results) == ["resid.0", "resid.1"]
    ids = np.asarray(tokenized["input_ids"])
    for layer, result in enumerate(results.values()):
        sae = load_sae(result.run_dir / "sae")
        assert sae.W_dec.shape == (2 * gpt.config.hidden_size, gpt.config.hidden_size)
        # Its input is the residual stream behind that layer, and it explains most of it.
        caught = []
        handle = gpt.base_model.layers[layer].register_forward_hook(
            lambda _m, _a, out, caught=caught: caught.append(
                out[0] if isinstance(out, tuple) else out
            )
        )
        with torch.no_grad():
            gpt(torch.from_numpy(ids[:24]))
        handle.remove()
        x = caught[0].flatten(0, 1)
        codes = sae.encode(x)
        assert (codes.values > 0).sum(-1).max() <= 4
        lost = (x - sae.decode(codes)).square().sum() / (x - x.mean(0)).square().sum()
        assert lost < 0.6
        assert result.metrics["fve"] > 0.4
    # Kept in memory: the second layer did not run the model again.
    assert len(trainer.capture._kept) == 1


def test_arrays_do_too_and_the_seed_decides(tmp_path, gpt, tokenized):  # F46
    ids = np.asarray(tokenized["input_ids"])
    weights = []
    for name in ("a", "b"):
        cfg = TrainConfig(
            SaeConfig(gpt.config.hidden_size, num_latents=16, k=2),
            batch_size=4,
            layers=(1,),
            runs_dir=str(tmp_path / name),
            progress=False,
        )
        (result,) = SaeTrainer(cfg, ids, gpt).fit().values()
        weights.append(load_sae(result.run_dir / "sae").W_dec)
    assert torch.equal(*weights)


def test_what_cannot_work_is_said(gpt, tokenized):
    width = gpt.config.hidden_size
    with pytest.raises(ConfigError, match=rf"SaeConfig\({width + 1}\): resid\.0 has width {width}"):
        SaeTrainer(TrainConfig(SaeConfig(width + 1)), tokenized, gpt)
    with pytest.raises(ConfigError, match="layers or layer_stride, not both"):
        TrainConfig(SaeConfig(width), layers=(1,), layer_stride=2)
    with pytest.raises(DataError, match="got lengths 2 to 3"):
        SaeTrainer(TrainConfig(SaeConfig(width)), [[1, 2], [1, 2, 3]], gpt)
    with pytest.raises(ConfigError, match="too few for batches of 500"):
        SaeTrainer(TrainConfig(SaeConfig(width), batch_size=500), tokenized, gpt)
