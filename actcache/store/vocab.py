"""vocab.json: the exact bytes of every token id, so that readers need no tokenizer library."""

from __future__ import annotations

import base64

from actcache.store.errors import DamagedError
from actcache.store.ids import canonical_json
from actcache.store.untrusted import parse_json


def encode_vocab(tokens: list[bytes]) -> bytes:
    """The file's bytes; `tokens[i]` are the bytes of token id i."""
    return canonical_json({"tokens": [base64.b64encode(t).decode() for t in tokens]})


def decode_vocab(data: bytes, path: object) -> list[bytes]:
    """Inverse of `encode_vocab`. Raises DamagedError, naming `path`."""
    values = parse_json(data, path)
    tokens = values.get("tokens")
    if set(values) != {"tokens"} or not isinstance(tokens, list):
        raise DamagedError(f"{path} is not a vocabulary: expected one list, 'tokens'")
    try:
        return [base64.b64decode(t, validate=True) for t in tokens]
    except (TypeError, ValueError) as e:
        raise DamagedError(f"{path} is not a vocabulary: {e}") from None
