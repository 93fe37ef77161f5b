"""Step 2: a byte-level BPE tokenizer, trained on an even sample of the seven domains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from traces.errors import InputError

VOCABULARY = 16_384

CHARACTERS_PER_DOMAIN = 12_000_000
"""Of each domain's text, pieces spread evenly, so that no domain's words crowd out another's."""

PIECE = 20_000
"""Characters of one piece."""


def train_tokenizer(texts: Path, domains: Sequence[str], out: Path, vocabulary: int = VOCABULARY) -> None:
    """Train on ``DOMAIN.txt`` of the folder `texts` and write the tokenizer to `out`, as JSON.

    Raises `InputError` when a text is missing or when the package tokenizers is.
    """
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=package.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample([read_text(texts, domain) for domain in domains]), trainer)
    tokenizer.save(str(out))


def read_text(texts: Path, domain: str) -> str:
    """Return the text of one domain."""
    path = texts / f"{domain}.txt"
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; `python -m traces.reference text` writes it") from None


def sample(texts: Sequence[str], characters: int = CHARACTERS_PER_DOMAIN) -> Iterator[str]:
    """Yield pieces of every text, spread evenly, of about `characters` in all for each."""
    for text in texts:
        stride = PIECE * max(1, len(text) // characters)
        for start in range(0, len(text), stride):
            yield text[start : start + PIECE]


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer at `path`. Raises `InputError` when it is missing or when the package tokenizers is."""
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; `python -m traces.reference tokenizer` writes it")
    return _package().Tokenizer.from_file(str(path))


def _package() -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError:
        raise InputError("this step needs the package tokenizers; pip install 'foregate[real]' brings it") from None
    return tokenizers
