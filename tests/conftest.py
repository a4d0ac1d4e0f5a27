"""What every test shares: a quiet, offline, single-threaded process and a tiny host and corpus.

Shapes of the tiny host: 3 layers, d = 32, 4 heads, contexts up to 128, about 400 tokens.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

# Before torch, transformers and wandb are imported, here and in the subprocesses of tests.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"  # tests of the logger set their own
os.environ["WANDB_SILENT"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which accelerate imports, asks aloud

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from buckets import copied, moto, s3, small_store, there  # noqa: F401
from cache import SMALL

from actcache.demo.train_host import END_OF_TEXT, train_tokenizer
from actcache.host import HostSettings, new_causal_lm, save_host
from actcache.run import CacheSettings
from actcache.sources import DataSettings
from saetrain.kernels import cpu
from saetrain.native import SWITCH
from saetrain.stream import hot

torch.set_num_threads(1)

SUBJECTS = ("The parser", "A store", "Every reader", "One stream", "The naïve cache", "This hook")
VERBS = ("keeps", "returns", "checks", "names", "reads twice", "never loses")
OBJECTS = ("its tokens", "a segment", "the row of zeros", "42 bytes", "an ε of error", "“all” data")


def tiny_texts(n: int = 24) -> list[str]:
    """`n` distinct documents of 1 to 9 sentences, some of them beyond ASCII."""
    texts = []
    for i in range(n):
        sentences = [
            f"{SUBJECTS[(i + j) % 6]} {VERBS[(i * j + 1) % 6]} {OBJECTS[(i // 6 + 2 * j) % 6]}."
            for j in range(1 + (i * 5) % 9)
        ]
        texts.append(f"{i}. " + " ".join(sentences) + ("\n\tdone\n" if i % 4 == 0 else ""))
    return texts


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Whatever a test did: OpenMP's team does not survive a fork, and other tests fork."""
    yield
    torch.set_num_threads(1)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine without a C compiler."""
    monkeypatch.setenv(SWITCH, "0")
    for compiled in (cpu.compiled, hot.compiled):
        compiled.cache_clear()
    yield
    for compiled in (cpu.compiled, hot.compiled):
        compiled.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$ACTCACHE_HOME in a temporary folder: no test reads or fills the user's cache."""
    home = tmp_path_factory.mktemp("actcache_home")
    os.environ["ACTCACHE_HOME"] = str(home)
    return home


@pytest.fixture(scope="session")
def tiny_parquet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a.parquet and b.parquet: 24 documents (id, text), row groups of 5."""
    folder = tmp_path_factory.mktemp("tiny_parquet")
    texts = tiny_texts()
    for name, rows in (("a", range(12)), ("b", range(12, 24))):
        table = pa.table({"id": [f"doc/{i}" for i in rows], "text": [texts[i] for i in rows]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=5)
    return folder


@pytest.fixture(scope="session")
def tiny_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a random GPT-NeoX and a byte-level BPE of `tiny_texts`."""
    folder = tmp_path_factory.mktemp("tiny_host")
    tokenizer = train_tokenizer(tiny_texts(), 400, progress=False)
    config = {
        "model_type": "gpt_neox",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(new_causal_lm(config, seed=0), tokenizer, folder, **special)
    return folder


@pytest.fixture
def asked(tiny_host: Path, tiny_parquet: Path, tmp_path: Path) -> Callable[..., CacheSettings]:
    """Settings for a small store; keyword arguments replace fields."""

    def make(**kw: Any) -> CacheSettings:
        defaults: dict[str, Any] = {
            "host": HostSettings(model=str(tiny_host), batch_tokens=128),
            "data": DataSettings(files=str(tiny_parquet), id_column="id"),
            "store": str(tmp_path / "store"),
            "hooks": ("resid.1", "mlp.0"),
            "context": 32,
            "layout": SMALL,
            "progress": False,
        }
        return CacheSettings(**(defaults | kw))

    return make


# -- of several modules; what they need is imported when they are asked for ------------------------


@pytest.fixture(scope="session")
def planted_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of two hooks in it."""
    from training import planted_store

    path = tmp_path_factory.mktemp("planted")
    planted_store(path / "store", hooks=("resid.2", "resid.3"), segments=(1024,))
    return path


@pytest.fixture
def here(planted_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a link to the store, to run commands in."""
    (tmp_path / "store").symlink_to(planted_folder / "store")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small store with a canary, for `root` to copy."""
    import hostile

    path = tmp_path_factory.mktemp("hostile") / "store"
    hostile.small_store(path)
    return path


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy of `original` that the test may damage."""
    return Path(shutil.copytree(original, tmp_path / "store"))


@pytest.fixture(scope="session")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen2.5-VL."""
    from chats import vision_host

    return Path(vision_host(tmp_path_factory.mktemp("vision")))


@pytest.fixture(scope="session")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet of three conversations, some of which show images."""
    from chats import write_chats

    return Path(write_chats(tmp_path_factory.mktemp("shown"), id=["a", "b", "c"]))


@pytest.fixture
def pictured(vision: Path, shown: Path, tmp_path: Path) -> Callable[..., CacheSettings]:
    """Settings for a store of those images; keyword arguments replace fields."""
    from chats import asking

    made: Callable[..., CacheSettings] = asking(vision, shown, tmp_path / "store")
    return made
