"""Captions as tokens for a text encoder that is trained with its network, from nothing but the words themselves."""

import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

_WORDS = re.compile(r"[^\W_]+|[^\w\s]|_")  # runs of letters and digits, and each other sign by itself


def end_of_text(vocabulary: int) -> int:
    """The token behind the last word, and everywhere after it: the last one, as TextEncoder has it."""
    return vocabulary - 1


def words_of(caption: str) -> list[str]:
    """The words and signs of a caption, in lower case."""
    return _WORDS.findall(unicodedata.normalize("NFC", caption).lower())


def hashed_words(captions: Sequence[str], *, length: int, vocabulary: int) -> np.ndarray:
    """Tokens i32 [B, length] of captions: a number for each word by its hash, then the end of text.

    No vocabulary has to be kept: a word's token is CRC-32 of its lower case modulo vocabulary - 1 (the hashing trick,
    arXiv 0902.2206), so that two words may share one. A longer caption loses its end; an empty one is all end of text.
    """
    rows = np.full((len(captions), length), end_of_text(vocabulary), np.int32)
    for row, caption in zip(rows, captions, strict=True):
        words = words_of(caption)[: length - 1]
        row[: len(words)] = [zlib.crc32(word.encode()) % (vocabulary - 1) for word in words]
    return rows
