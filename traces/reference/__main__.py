"""The steps of the recipe, in order: text, tokenizer, tokens, train, bundle, evidence."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from traces.errors import InputError
from traces.files import file_sha256, load_trace
from traces.recorder.loading import require_packages
from traces.reference import bundle, text, tokenizer, tokens
from traces.reference.models import MODELS, ReferenceModel, reference_model, tiny
from traces.reference.parts import load_parts

CORPUS = Path(".corpus")
"""Where texts, tokenizer and tokens lie unless said otherwise; git ignores it, because texts are others' work."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step and return the exit code: 0, or 2 for bad input."""
    began = time.monotonic()
    parsed = _parser().parse_args(arguments)
    try:
        _STEPS[parsed.step](parsed, began)
    except InputError as error:
        print(f"traces.reference: {error}", file=sys.stderr)
        return 2
    return 0


def _text(arguments: argparse.Namespace, _began: float) -> None:
    for domain, characters in text.write_texts(arguments.corpus / "packages", arguments.corpus / "texts").items():
        print(f"{domain:20} {characters:12,} characters")


def _tokenizer(arguments: argparse.Namespace, _began: float) -> None:
    out = arguments.corpus / "tokenizer.json"
    tokenizer.train_tokenizer(arguments.corpus / "texts", list(text.DOMAINS), out, arguments.vocabulary)
    print(f"{out}: sha256 {file_sha256(out)}")


def _tokens(arguments: argparse.Namespace, _began: float) -> None:
    corpus, packed = arguments.corpus, arguments.corpus / "packed"
    vocabulary = tokenizer.load_tokenizer(corpus / "tokenizer.json").get_vocab_size()
    packed.mkdir(exist_ok=True)
    domains = {}
    for domain in text.DOMAINS:
        domains[domain] = tokens.pack_domain(
            corpus / "texts", domain, corpus / "tokenizer.json", packed, arguments.characters
        )
        print(f"{domain:20} {domains[domain].train_tokens:12,} tokens to train on")
    packages = [text.find_package(corpus / "packages", source) for sources in text.DOMAINS.values() for source in sources]
    details = {
        "tokenizer_sha256": file_sha256(corpus / "tokenizer.json"),
        "packages": {path.name: file_sha256(path) for path in packages},
    }
    tokens.write_manifest(packed, domains, vocabulary, details)
    size = sum(path.stat().st_size for path in packed.iterdir())
    print(f"{packed}: {size:,} bytes")


def _train(arguments: argparse.Namespace, began: float) -> None:
    require_packages()
    from traces.reference.run import Run, best_device  # torch takes seconds to import

    reference = _chosen(arguments)
    if arguments.steps is not None:
        reference = replace(reference, training=replace(reference.training, most_steps=arguments.steps))
    device = arguments.device or best_device()
    Run(reference, tokens.open_tokens(arguments.tokens), arguments.out, device, began).all(
        arguments.train_until, arguments.stop_by
    )


def _bundle(arguments: argparse.Namespace, _began: float) -> None:
    reference = _chosen(arguments)
    target = arguments.target or bundle.DATA / f"{reference.name}.safetensors"
    part = bundle.bundle(reference, arguments.folder, target)
    print(f"{target}: {part.tokens:,} tokens of {len(part.domains)} requests, {target.stat().st_size:,} bytes")


def _evidence(arguments: argparse.Namespace, _began: float) -> None:
    from traces.evidence import find_evidence, render_layers, render_summary
    from traces.slices import join_requests

    reference = _chosen(arguments)
    parts = load_parts(arguments.folder, reference.name)
    control = load_trace(arguments.folder / f"{reference.name}-untrained.safetensors", verify=True)
    found = {
        "whole recording": find_evidence(join_requests(parts)),
        "its first round": find_evidence(parts[0]),
        "untrained, same tokens": find_evidence(control),
    }
    # Wide enough for the tables where it is not a terminal.
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(render_summary(list(found.items())))
    for name in ("whole recording", "untrained, same tokens"):
        console.print(render_layers(found[name], name))


def _chosen(arguments: argparse.Namespace) -> ReferenceModel:
    reference = reference_model(arguments.model)
    return tiny(reference) if arguments.tiny else reference


_STEPS: dict[str, Callable[[argparse.Namespace, float], None]] = {
    "text": _text,
    "tokenizer": _tokenizer,
    "tokens": _tokens,
    "train": _train,
    "bundle": _bundle,
    "evidence": _evidence,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m traces.reference", description=__doc__)
    steps = parser.add_subparsers(dest="step", required=True)

    one = steps.add_parser("text", help="seven domains of text, out of the packages in CORPUS/packages")
    one.add_argument("--corpus", type=Path, default=CORPUS)

    one = steps.add_parser("tokenizer", help="a byte-level BPE tokenizer of the texts")
    one.add_argument("--corpus", type=Path, default=CORPUS)
    one.add_argument("--vocabulary", type=int, default=tokenizer.VOCABULARY)

    one = steps.add_parser("tokens", help="the texts as token ids, packed into CORPUS/packed")
    one.add_argument("--corpus", type=Path, default=CORPUS)
    one.add_argument("--characters", type=int, default=tokens.MOST_CHARACTERS, help="the most used of each domain")

    one = steps.add_parser("train", help="train, validate, record and record the untrained control; needs torch")
    _add_model(one)
    one.add_argument("--tokens", type=Path, default=CORPUS / "packed", help="folder of packed tokens")
    one.add_argument("--out", type=Path, default=CORPUS / "recorded", help="folder for the recording and NAME.run.json")
    one.add_argument("--train-until", type=float, default=450, help="seconds after the start at which training ends")
    one.add_argument("--stop-by", type=float, default=570, help="seconds after the start by which recording ends")
    one.add_argument("--steps", type=int, help="the most steps to train, whatever the time")
    one.add_argument("--device", help="cuda where there is one, else cpu")

    one = steps.add_parser("bundle", help="the part of a recording that comes with the package")
    _add_model(one)
    one.add_argument("--folder", type=Path, default=CORPUS / "recorded", help="what train wrote")
    one.add_argument("--target", type=Path, help="file to write; by default the bundled one")

    one = steps.add_parser("evidence", help="figures that show learning, beside shuffled and untrained controls")
    _add_model(one)
    one.add_argument("--folder", type=Path, default=CORPUS / "recorded", help="what train wrote")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=" or ".join(MODELS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the same architecture, to try the step")


if __name__ == "__main__":
    sys.exit(main())
