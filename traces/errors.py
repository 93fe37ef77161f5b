"""The one kind of error that a user causes and a user can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input, said in one sentence: which file, field and value, and what would be right.

    The command line prints the sentence and exits with 2; everything else is a defect and keeps its
    traceback.
    """

    def __init__(self, sentence: str) -> None:
        # What foreign files call their arrays, and what other libraries say, may break the line.
        super().__init__(" ".join(sentence.splitlines()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown `name`: the nearest known one and all that exist."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names)}"
