"""What the tests of importers share: the sentence of a refusal, and the same through the command line."""

import pytest

from sim.cli import main
from traces import InputError, import_trace


def refusal(path, format, **options):  # noqa: A002
    """Return the one sentence with which `import_trace` refuses a file; it names the file."""
    with pytest.raises(InputError) as caught:
        import_trace(path, format, **options)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path}: ")
    assert "\n" not in sentence
    return sentence


def assert_command_refuses(path, format, capsys, **options):  # noqa: A002
    """Check that `foregate trace import` says the same sentence, exits with 2 and leaves no file."""
    before = sorted(path.parent.iterdir())
    words = [f"options.{name}={value}" for name, value in options.items()]
    out = path.parent / "out.safetensors"
    assert main(["trace", "import", str(path), f"format={format}", f"out={out}", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"foregate: {refusal(path, format, **options)}\n"
    assert sorted(path.parent.iterdir()) == before
