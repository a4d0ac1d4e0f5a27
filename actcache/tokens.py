"""Tokens as bytes: what each id of a tokenizer stands for in the text, exactly.

From the tokenizer's decoder rather than its vocabulary: byte-level BPE spells bytes as printable
letters, SentencePiece spells a space as U+2581 and bytes as <0xNN>, WordPiece marks continuations
with ##. Cost: one pass over the vocabulary.
"""

from __future__ import annotations

from typing import Any


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of every token id, b"" where the vocabulary has a hole."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = str(getattr(backend, "decoder", None))
    spelled = _byte_level if "ByteLevel" in decoder else _sentence_piece
    if "WordPiece" in decoder:
        spelled = _word_piece
    added = {i: t.content.encode() for i, t in tokenizer.added_tokens_decoder.items()}
    pieces = {i: spelled(piece) for piece, i in tokenizer.get_vocab().items()} | added
    return [pieces.get(i, b"") for i in range(max(pieces, default=-1) + 1)]


def _byte_alphabet() -> dict[str, int]:
    """Printable letter -> byte, GPT-2's table: bytes that print stand for themselves."""
    keep = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in keep}
    rest = [b for b in range(256) if b not in set(keep)]
    return table | {chr(256 + i): b for i, b in enumerate(rest)}


_ALPHABET = _byte_alphabet()


def _byte_level(piece: str) -> bytes:
    if all(c in _ALPHABET for c in piece):
        return bytes(_ALPHABET[c] for c in piece)
    return piece.encode()


def _sentence_piece(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _word_piece(piece: str) -> bytes:
    return piece[2:].encode() if piece.startswith("##") else b" " + piece.encode()
