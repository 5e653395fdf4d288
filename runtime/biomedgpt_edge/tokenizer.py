"""The bundle's SentencePiece model: piece-wise encoding, and decoding that never splits a character.

Each piece of a prompt is encoded on its own, so that each gets SentencePiece's leading word mark: this is how the
released weights were trained (slow ``LlamaTokenizer``). Control tokens come from ids, never from text: SentencePiece
encodes the characters of ``</s>`` in user text as ordinary pieces.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from .errors import BundleCorruptError

_WORD_MARK = "\u2581"
_REPLACEMENT = "\ufffd"
# What NFKC, case folding, white-space and control-character clean-up would change, each in one way.
_PROBE = "\uff03\u200b#\x01A  \ufb01 "


class Tokenizer:
    """SentencePiece BPE with byte fallback.

    Raises:
        BundleCorruptError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            # Not by path: SentencePiece cannot take every name that the file system can.
            self._model.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise BundleCorruptError(
                f"{path.name} is not a SentencePiece model: {error}.", remedy="Export or copy the bundle again."
            ) from error
        self._refuse_normalization(path)
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()

    def _refuse_normalization(self, path: Path) -> None:
        """A tokenizer that rewrites text could turn harmless characters into the end of a message."""
        if self._model.Normalize(_PROBE).replace(_WORD_MARK, " ") != f" {_PROBE}":
            raise BundleCorruptError(
                f"{path.name} normalizes text or adds no leading word mark, and Llama's tokenizer does not.",
                remedy="Use the tokenizer.model that came with the weights.",
            )

    def __len__(self) -> int:
        """Number of pieces; rows of the vocabulary matrix beyond it (``[PAD]``) are never input or output."""
        return int(self._model.GetPieceSize())

    def encode(self, piece: str) -> list[int]:
        """Ids of one piece of text, with the leading word mark and without BOS or EOS."""
        return list(self._model.Encode(piece))

    def decode(self, ids: list[int]) -> str:
        """Text of generated ids; control tokens give no text."""
        return str(self._model.Decode(ids))

    def stream(self) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self._model)


class StreamDecoder:
    """Turns ids into text as they come; the joined pieces equal ``Tokenizer.decode`` of all ids.

    Byte pieces are held back until they form a whole character, so no piece ever ends inside one.
    """

    def __init__(self, model: sentencepiece.SentencePieceProcessor) -> None:
        self._model = model
        self._bytes = b""
        self._at_start = True

    def push(self, token: int) -> str:
        """Text that ``token`` completes; empty while a character is incomplete."""
        if self._model.IsByte(token):
            self._bytes += bytes([int(self._model.IdToPiece(token)[1:-1], 16)])
            self._at_start = False
            text, self._bytes = _whole_characters(self._bytes)
            return text
        return self.flush() + self._piece_text(token)

    def flush(self) -> str:
        """What is left when no more ids come: each byte of an unfinished character becomes U+FFFD."""
        text = _REPLACEMENT * len(self._bytes)
        self._bytes = b""
        return text

    def _piece_text(self, token: int) -> str:
        if self._model.IsControl(token):
            return ""
        if self._model.IsUnknown(token):
            self._at_start = False
            return str(self._model.Decode([token]))
        text = str(self._model.IdToPiece(token)).replace(_WORD_MARK, " ")
        # SentencePiece adds one word mark in front of a text when encoding and takes one away when decoding.
        if self._at_start and text.startswith(" "):
            text = text[1:]
        self._at_start = False
        return text


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """Decodes the characters at the front of ``data``; an impossible byte becomes one U+FFFD, as in SentencePiece."""
    text = ""
    while data:
        size = _character_size(data[0])
        if size == 0:
            text, data = text + _REPLACEMENT, data[1:]
            continue
        head = data[:size]
        try:
            text, data = text + head.decode("utf-8"), data[size:]
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data" and len(head) < size:
                break
            text, data = text + _REPLACEMENT, data[1:]
    return text, data


def _character_size(lead: int) -> int:
    """Bytes of the UTF-8 character that starts with ``lead``; 0 if none does."""
    if lead < 0x80:
        return 1
    if 0xC2 <= lead <= 0xDF:
        return 2
    if 0xE0 <= lead <= 0xEF:
        return 3
    return 4 if 0xF0 <= lead <= 0xF4 else 0
