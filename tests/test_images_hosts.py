"""Another family that takes images: a tiny LLaVA. AutoProcessor makes its processor as it is, its
pixels are one array per image, and its forward pass takes no token types."""

import json

import numpy as np
import pytest
import torch
from cache import contexts_of
from chats import IMAGE, PICTURES, SHOWN, TEMPLATE, asking, markers_tokenizer, write_chats

from actcache.chat import decode_image
from actcache.demo.train_host import END_OF_TEXT
from actcache.host import Host, HostSettings, save_host
from actcache.run import run
from actcache.store import FLAG_IMAGE


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """16 x 16 pixels in patches of 8: four placeholders for each image."""
    from transformers import LlavaConfig, LlavaModel

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = markers_tokenizer()
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    wide |= {"num_hidden_layers": 2, "initializer_range": 0.3}
    text = {"model_type": "llama", "vocab_size": tokenizer.get_vocab_size(), **wide}
    vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **wide}
    config = LlavaConfig(
        text_config=text | {"max_position_embeddings": 512},
        vision_config=vision,
        image_token_index=tokenizer.token_to_id(IMAGE),
        image_seq_length=4,
    )
    torch.manual_seed(0)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    save_host(LlavaModel(config), tokenizer, folder, **special)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = {"image_processor_type": "CLIPImageProcessor", **size}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    own = {"processor_class": "LlavaProcessor", "patch_size": 8, "image_token": IMAGE}
    own |= {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    (folder / "processor_config.json").write_text(json.dumps(own))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_stored_activations_of_llava_equal_a_manual_forward(llava, tmp_path):  # F114
    from transformers import AutoModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    shown = write_chats(tmp_path / "shown", id=["a", "b", "c"])
    settings = asking(llava, shown, tmp_path / "store")(hooks=("resid.1",))
    snapshot = run(settings).store.snapshot()
    found = {tuple(ids): acts["resid.1"] for ids, _, acts in contexts_of(snapshot).values()}
    model = AutoModel.from_pretrained(llava, dtype=torch.float32).eval()
    tokenizer = Host(HostSettings(model=str(llava))).tokenizer
    for messages, pictures in zip(SHOWN, PICTURES, strict=True):
        text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False)
        ids = tokenizer(text.replace(IMAGE, 4 * IMAGE), add_special_tokens=False).input_ids
        inputs = {}
        if pictures:
            images = [decode_image(p, "it") for p in pictures]
            inputs = dict(CLIPImageProcessorPil.from_pretrained(llava)(images, return_tensors="pt"))
        caught = []
        handle = model.language_model.layers[1].register_forward_hook(
            lambda _m, _i, o, caught=caught: caught.append(o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]), **inputs)
        handle.remove()
        own = caught[0].reshape(len(ids), -1).numpy()
        np.testing.assert_allclose(found[tuple(ids)], own, rtol=2e-4, atol=2e-4)
    flags = np.concatenate([s.tokens().flags for s in snapshot.segments])
    assert np.count_nonzero(flags & FLAG_IMAGE) == 4 * 3
