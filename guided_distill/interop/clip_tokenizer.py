"""CLIP's byte-pair tokenizer, on the library `tokenizers`, from the files that come with a text encoder."""

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guided_distill.errors import UserError
from guided_distill.files import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
_EXTRA = "pip install 'guided_distill[text]'"
# Contractions, runs of letters, single digits, runs of anything else (arXiv 2103.00020, published code).
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@dataclass(frozen=True)
class ClipTokenizer:
    """Captions to tokens, as `read_tokenizer` makes it."""

    backend: Any  # a tokenizers.Tokenizer
    length: int  # positions of the text encoder
    pad: int  # the token behind the end of text

    def encode(self, captions: Sequence[str], *, truncate: bool = True) -> np.ndarray:
        """Start of text, the caption's tokens, end of text, then padding: i32 [B, length].

        A longer caption loses its end, or raises UserError where it may not.
        """
        rows = np.full((len(captions), self.length), self.pad, np.int32)
        for row, caption, encoding in zip(rows, captions, self.backend.encode_batch(list(captions)), strict=True):
            ids = encoding.ids
            if len(ids) > self.length:
                if not truncate:
                    raise UserError(
                        f"the caption {caption[:40]!r}... has {len(ids) - 2} tokens; the text encoder takes "
                        f"{self.length - 2}: shorten it"
                    )
                ids = [*ids[: self.length - 1], ids[-1]]
            row[: len(ids)] = ids
        return rows


def read_tokenizer(folder) -> ClipTokenizer:
    """The tokenizer of a folder with vocab.json and merges.txt, or tokenizer.json, as diffusers folders have it.

    Tokens are those of transformers' CLIPTokenizer: a padding token that is a word ("!", of Stable Diffusion 2) stands
    for itself in captions too. Raises UserError where files are missing.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f"captions need the library tokenizers, which is not installed: {_EXTRA}") from error
    folder = pathlib.Path(folder)
    vocabulary, merges = _read_words(folder)
    config = _read_config(folder)
    pad = config.get("pad_token", END)
    pad = pad["content"] if isinstance(pad, dict) else pad
    missing = [word for word in (START, END, pad) if word not in vocabulary]
    if missing:
        raise UserError(f"{folder} holds no vocabulary of CLIP: it lacks {', '.join(missing)}")
    backend = _backend(tokenizers, vocabulary, merges, sorted({START, END, pad}))
    return ClipTokenizer(backend, min(config.get("model_max_length", 77), 77), vocabulary[pad])


def _read_config(folder):
    """tokenizer_config.json, overruled by special_tokens_map.json unless it has added_tokens_decoder, as transformers.

    The published folders of Stable Diffusion 2 pad with "!" by the latter, and say <|endoftext|> in the former.
    """
    special, config = (
        read_json(folder / name) if (folder / name).exists() else {}
        for name in ("special_tokens_map.json", "tokenizer_config.json")
    )
    return special | config if "added_tokens_decoder" in config else config | special


def _read_words(folder):
    """{word: its number}, [(left, right), ...] in order of precedence."""
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        return read_json(folder / "vocab.json"), merges
    if (folder / "tokenizer.json").exists():
        model = read_json(folder / "tokenizer.json")["model"]
        merges = [tuple(merge.split() if isinstance(merge, str) else merge) for merge in model["merges"]]
        return model["vocab"], merges
    raise UserError(f"{folder} holds neither vocab.json and merges.txt nor tokenizer.json")


def _backend(tokenizers, vocabulary, merges, special):
    from tokenizers import Regex, normalizers, pre_tokenizers

    model = tokenizers.models.BPE(
        vocab=vocabulary, merges=merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.post_processor = tokenizers.processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
    )
    backend.add_special_tokens(special)
    return backend
