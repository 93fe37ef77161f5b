"""Step 3: the texts as token ids, a part of them held out, packed small enough to travel to a rented GPU.

Each domain is two files of little-endian uint16 ids under xz, ``DOMAIN.train.xz`` and ``DOMAIN.held_out.xz``,
and ``manifest.json`` says what they hold and out of which packages. The same packages give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import InputError
from traces.reference.tokenizer import load_tokenizer, read_text

Tokens = npt.NDArray[np.uint16]

SEGMENTS = 8
"""Evenly spread parts of a domain's text that are used, so that a part of it stands for all of it."""

HELD_OUT = 0.02
"""Share of each segment, its end, that is not trained on."""

MOST_CHARACTERS = 32_000_000
"""Used of each domain's text. It decides how large the packed files are."""

PIECE = 60_000
"""Characters that are tokenised at once."""

SPLITS = ("train", "held_out")

# Ids are pairs of bytes, which the filter is told: 15% smaller than xz's defaults.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]


@dataclass(frozen=True)
class Domain:
    """What the manifest says about one domain."""

    characters: int
    """Of its text that were tokenised."""
    train_tokens: int
    held_out_segments: tuple[int, ...]
    """Tokens of each held-out part. Between two of them lies text that was trained on."""
    sha256: Mapping[str, str]
    """Of the packed file of each split."""


def pack_domain(texts: Path, domain: str, tokenizer: Path, packed: Path, characters: int = MOST_CHARACTERS) -> Domain:
    """Tokenise one domain's text and write its two files into the folder `packed`."""
    encoder = load_tokenizer(tokenizer)
    segments = [_split(segment) for segment in _segments(read_text(texts, domain), characters)]
    train = [_encode(encoder, trained) for trained, _ in segments]
    held_out = [_encode(encoder, kept) for _, kept in segments]
    return write_domain(packed, domain, np.concatenate(train), held_out, sum(len(a) + len(b) for a, b in segments))


def write_domain(packed: Path, domain: str, train: Tokens, held_out: Sequence[Tokens], characters: int = 0) -> Domain:
    """Write the two files of one domain; return its entry in the manifest."""
    digests = {}
    for split, tokens in zip(SPLITS, (train, np.concatenate(held_out)), strict=True):
        content = lzma.compress(tokens.astype("<u2").tobytes(), filters=_FILTERS)
        _file(packed, domain, split).write_bytes(content)
        digests[split] = hashlib.sha256(content).hexdigest()
    return Domain(characters, len(train), tuple(map(len, held_out)), digests)


def write_manifest(packed: Path, domains: Mapping[str, Domain], vocabulary: int, details: Mapping[str, Any]) -> None:
    """Write ``manifest.json``; `details` say what the tokens were made from."""
    about = {"vocabulary": vocabulary, "domains": {name: asdict(domain) for name, domain in domains.items()}, **details}
    (packed / "manifest.json").write_text(json.dumps(about, indent=1) + "\n")


@dataclass(frozen=True)
class PackedTokens:
    """A folder of packed token ids."""

    folder: Path
    vocabulary: int
    domains: Mapping[str, Domain]
    sha256: str
    """Of the manifest, which holds the files' own."""

    def read(self, domain: str, split: str) -> Tokens:
        """Return the ids of one split, ``train`` or ``held_out``.

        Raises `InputError` when the file is missing or is not the one that the manifest describes.
        """
        path = _file(self.folder, domain, split)
        content = _content(path)
        if hashlib.sha256(content).hexdigest() != self.domains[domain].sha256[split]:
            raise InputError(f"{path}: it is not the file that manifest.json describes; pack the tokens again")
        return np.frombuffer(lzma.decompress(content), "<u2")

    def held_out_segments(self, domain: str) -> list[Tokens]:
        """Return the held-out ids of one domain, segment by segment."""
        lengths = self.domains[domain].held_out_segments
        return np.split(self.read(domain, "held_out"), np.cumsum(lengths)[:-1])


def open_tokens(folder: Path) -> PackedTokens:
    """Return the packed tokens in `folder`.

    Raises `InputError` when the folder has no manifest, or one that is not of packed tokens.
    """
    path = folder / "manifest.json"
    content = _content(path)
    try:
        about = json.loads(content)
        domains = {name: Domain(**fields) for name, fields in about["domains"].items()}
        return PackedTokens(folder, about["vocabulary"], domains, hashlib.sha256(content).hexdigest())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: this is no manifest of packed tokens ({error}); pack the tokens again") from None


def _file(folder: Path, domain: str, split: str) -> Path:
    return folder / f"{domain}.{split}.xz"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; `python -m traces.reference tokens` writes it") from None


def _segments(text: str, characters: int) -> Iterator[str]:
    stride, length = len(text) // SEGMENTS, min(characters, len(text)) // SEGMENTS
    for number in range(SEGMENTS):
        yield text[number * stride : number * stride + length]


def _split(segment: str) -> tuple[str, str]:
    """Return the part to train on and the part to hold out, cut between two lines."""
    cut = segment.rfind("\n", 0, int(len(segment) * (1 - HELD_OUT))) + 1
    return segment[:cut], segment[cut:]


def _encode(encoder: Any, text: str) -> Tokens:
    # In pieces, because one of 30 million characters takes gigabytes.
    return np.concatenate([np.array(encoder.encode(text[begin:end]).ids, np.uint16) for begin, end in _pieces(text)])


def _pieces(text: str) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of pieces of about `PIECE` characters that end with a line."""
    begin = 0
    while begin < len(text):
        end = text.rfind("\n", begin, begin + PIECE) + 1
        if begin + PIECE >= len(text) or end == 0:
            end = min(begin + PIECE, len(text))
        yield begin, end
        begin = end
