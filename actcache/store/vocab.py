"""vocab.json: the exact bytes of every token id, so that readers need no tokenizer library."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from actcache.store.errors import DamagedError
from actcache.store.ids import canonical_json
from actcache.store.schema import parse_json


def encode_vocab(tokens: list[bytes]) -> bytes:
    """The file's bytes; `tokens[i]` are the bytes of token id i."""
    return canonical_json({"tokens": [base64.b64encode(t).decode() for t in tokens]})


def decode_vocab(data: bytes, path: Path) -> list[bytes]:
    """Inverse of `encode_vocab`. Raises DamagedError, naming `path`."""
    try:
        return [base64.b64decode(t, validate=True) for t in parse_json(data, path)["tokens"]]
    except (KeyError, TypeError, binascii.Error) as e:
        raise DamagedError(f"{path} is not a vocabulary: {e}") from None
