"""What tests of chats and images share: a tiny Qwen2.5-VL folder like those on the hub, pictures,
conversations and the parquet they lie in.

The processor of the folder has patches of 4 x 4 pixels and merges 2 x 2 of them: an image of
16 x 24 pixels is 2 x 3 placeholder tokens.
"""

import io
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from cache import SMALL
from conftest import tiny_texts
from PIL import Image
from tokenizers import AddedToken

from actcache.demo.train_host import END_OF_TEXT, train_tokenizer
from actcache.host import HostSettings, save_host
from actcache.run import CacheSettings
from actcache.sources import DataSettings

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
IMAGE = "<|image_pad|>"
MARKERS = (IM_START, IM_END, "<|vision_start|>", "<|vision_end|>", IMAGE, "<|video_pad|>")
# Of the form of Qwen2.5-VL's: a part with a key `image` is an image, whatever its type says.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 64 * 64},
}


def markers_tokenizer():
    tokenizer = train_tokenizer(tiny_texts(), 400, progress=False)
    tokenizer.add_special_tokens([AddedToken(m, special=True) for m in MARKERS])
    return tokenizer


def vision_host(folder):
    """A random Qwen2.5-VL: 2 layers, d = 32, its processor and its chat template."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

    tokenizer = markers_tokenizer()
    ids = {m: tokenizer.token_to_id(m) for m in MARKERS}
    text = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.3,  # attention, and so positions, matter
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.3,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(0)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(Qwen2_5_VLModel(config), tokenizer, folder, **special)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def picture(width, height, seed=0, format="PNG"):
    """The bytes of a random image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def say(role, *parts):
    """A message; a part that is `...` shows an image."""
    content = [{"type": "image"} if p is ... else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": content}


# Two images, none, one: of 2 x 3, 4 x 2 and 1 x 1 tokens.
SHOWN = [
    [say("user", "A store", ..., " and ", ..., "?"), say("assistant", "It checks its tokens.")],
    [say("system", "Every reader"), say("user", "the row of zeros"), say("assistant", "  One.\n")],
    [say("user", ..., "One stream"), say("assistant", "names 42 bytes"), say("user", "This hook")],
]
PICTURES = [[picture(24, 16, 1), picture(16, 32, 2)], [], [picture(8, 8, 3)]]


def write_chats(folder, messages=SHOWN, pictures=PICTURES, *, names=("messages", "images"), **more):
    """Parquet as `datasets` writes it: parts in one struct, images as {bytes, path}."""
    columns = {names[0]: messages, **more}
    if pictures is not None:
        images = [[{"bytes": p, "path": None} for p in row] for row in pictures]
        kind = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        columns[names[1]] = pa.array(images, kind)
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), folder / "chats.parquet", row_group_size=2)
    return folder


def asking(host, shown, store):
    """A maker of settings for a store of images: keyword arguments replace fields, `data_…` those
    of data."""

    def make(**kw):
        context = kw.get("context", 128)
        data = {"messages_column": "messages", "images_column": "images", "id_column": "id"}
        data |= {"files": str(shown)}
        data |= {k.removeprefix("data_"): kw.pop(k) for k in list(kw) if k.startswith("data_")}
        defaults = {
            "host": HostSettings(model=str(host), batch_tokens=256),
            "data": DataSettings(**data),
            "store": str(store),
            "hooks": ("resid.0", "resid.1", "mlp.1", "resid_pre.0"),
            "context": context,
            "layout": replace(SMALL, segment_rows=128 // context * context),
            "progress": False,
        }
        return CacheSettings(**(defaults | kw))

    return make
