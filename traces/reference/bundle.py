"""Step 5: the part of a recording that comes with the package, and what it says about where it comes from."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from traces.errors import InputError
from traces.files import save_trace
from traces.reference.models import ReferenceModel
from traces.reference.parts import load_parts
from traces.slices import first_tokens, join_requests
from traces.trace import Provenance, Trace

DATA = Path(__file__).parents[1] / "data"


def bundle(reference: ReferenceModel, folder: Path, target: Path) -> Trace:
    """Write the part of the recording in `folder` that is bundled to `target`, and return it.

    `folder` is what a run wrote: ``NAME.run.json`` and ``NAME-1.safetensors`` and on.

    Raises `InputError` when the folder lacks one, they do not belong together, or the part is larger than it may be; what
    was at `target` is then untouched.
    """
    about = read_run(folder, reference)
    parts = load_parts(folder, reference.name)
    _check_parts(folder, reference, about, parts)
    chosen = parts[: reference.bundled.rounds]
    part = first_tokens(join_requests(chosen), reference.bundled.tokens)
    part = replace(part, model=replace(part.model, name=reference.title), provenance=_provenance(reference, about, chosen))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        written = Path(scratch) / target.name
        save_trace(part, written)
        size, limit = written.stat().st_size, reference.bundled.most_bytes
        if size > limit:
            raise InputError(
                f"{target}: it would have {size:,} bytes and may have {limit:,}; lower bundled.tokens of {reference.name}"
            )
        os.replace(written, target)
    return part


def read_run(folder: Path, reference: ReferenceModel) -> dict[str, Any]:
    """Return what the run says about itself.

    Raises `InputError` when there is none, it did not come to its recordings, or it is of other settings.
    """
    path = folder / f"{reference.name}.run.json"
    try:
        about = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; `python -m traces.reference train` writes it") from None
    except ValueError as error:
        raise InputError(f"{path}: this is no JSON ({error}); run the training again") from None
    if not isinstance(about, dict) or not about.get("recordings"):
        raise InputError(f"{path}: the run has no 'recordings'; it ended before the first was written")
    # What is bundled may be chosen anew; what was trained and recorded may not.
    now, then = json.loads(json.dumps(reference.as_json())), about.get("reference", {})
    for field in now:
        if field != "bundled" and now[field] != then.get(field):
            raise InputError(
                f"{path}: reference.{field} is {then.get(field)!r}; the settings of {reference.name} differ now"
            )
    return about


def _check_parts(folder: Path, reference: ReferenceModel, about: Mapping[str, Any], parts: Sequence[Trace]) -> None:
    said = [recording["hash"] for recording in about["recordings"]]
    found = [part.hash for part in parts]
    if found != said:
        raise InputError(
            f"{folder}: the parts are not those that {reference.name}.run.json lists; copy all of one run again"
        )
    if len(parts) < reference.bundled.rounds:
        raise InputError(f"{folder}: {len(parts)} rounds were recorded; {reference.bundled.rounds} are bundled")


def _provenance(reference: ReferenceModel, about: Mapping[str, Any], parts: Sequence[Trace]) -> Provenance:
    # The run says it better: it knows the version even where none is installed.
    better_said = ("part_of", "source", "foregate")
    recorder = {name: value for name, value in parts[0].provenance.details.items() if name not in better_said}
    recordings = list(dict.fromkeys(recording["recorded"] for recording in about["recordings"][: len(parts)]))
    training = {name: value for name, value in about["training"].items() if name not in ("log", "log_columns")}
    settings = reference.as_json()
    return Provenance(
        kind="recorded",
        source="a MoE that this project trained on the text of Debian and Python packages, writing on held-out text",
        made_by="foregate traces.reference.bundle 2",
        details={
            "recording_hashes": recordings,
            "part": {
                "requests": f"the first {reference.bundled.rounds} of {len(about['recordings'])} in each domain",
                "tokens": f"the first {reference.bundled.tokens} of each request",
            },
            "steps": "as if requests ran one after another; they were decoded in batches",
            "recorder": {**recorder, **about["recorder"]},
            "architecture": reference.architecture,
            "shape": settings["shape"],
            "seed": reference.seed,
            "training": {**settings["training"], **training},
            "parameters": about["parameters"],
            "active_parameters": about["active_parameters"],
            "held_out_loss_nats_per_token": about["held_out_loss"],
            "tokens_manifest_sha256": about["tokens_manifest_sha256"],
            "versions": about["versions"],
            "device": about["device"],
        },
    )
