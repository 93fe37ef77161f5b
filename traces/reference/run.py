"""Step 4: everything that needs a GPU, in one command that fits into a box of time.

Build the model, rehearse the recording, train, validate, record, record the untrained control. What happened
is in ``NAME.run.json``, written anew after each of these; the recording is ``NAME-1.safetensors`` and on, one
round each, and the control ``NAME-untrained.safetensors``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from traces.errors import InputError
from traces.recorder.loading import foregate_version
from traces.reference.models import ReferenceModel
from traces.reference.recording import held_out_prompts, in_parts, record_requests, record_untrained, save_part
from traces.reference.tokens import PackedTokens
from traces.reference.train import build_model, halve, held_out_loss, parameter_counts, train
from traces.trace import Trace


class Run:
    """One run of one model, which prints a line about every stage that ends."""

    def __init__(self, reference: ReferenceModel, tokens: PackedTokens, out: Path, device: str, began: float) -> None:
        """`began` is what `time.monotonic` read when the box of time began; `out` is created where it is not there."""
        self.reference = reference
        self.tokens = tokens
        self.out = out
        self.device = torch.device(device)
        self.began = began
        self.about: dict[str, Any] = {
            "reference": reference.as_json(),
            "tokens_manifest_sha256": tokens.sha256,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "recorder": {"version": foregate_version(), "sources_sha256": recorder_sha256()},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine(),
            "seconds": {},
        }
        out.mkdir(parents=True, exist_ok=True)

    def all(self, train_until: float, stop_by: float) -> dict[str, Any]:
        """Do everything; training ends at `train_until` and no batch is begun that would end after `stop_by`.

        Both are seconds from the beginning of the box. Returns what ``NAME.run.json`` holds.

        Raises `InputError` when the tokens or the time do not suffice for any recording.
        """
        if not 0 < train_until < stop_by:
            raise InputError(f"train-until is {train_until:g} s; it must be above 0 and below stop-by, {stop_by:g} s")
        rounds = held_out_prompts(self.reference, self.tokens)
        model = build_model(self.reference, self.tokens.vocabulary, self.device)
        self.about |= parameter_counts(model, int(self.reference.shape["num_experts_per_tok"]))
        self._rehearse(rounds)
        self.about["training"] = train(model, self.reference, self.tokens, self.began + train_until)
        self._said("training", f"{self.about['training']['tokens']:,} tokens")
        self.about["held_out_loss"] = held_out_loss(model, self.reference, self.tokens)
        self._said("validation", f"held-out loss {self.about['held_out_loss']}")
        self._record(model, rounds, stop_by)
        return self.about

    def _rehearse(self, rounds: list[list[Any]]) -> None:
        """Record a few tokens of the untrained model: what cannot be recorded is found out before it was trained."""
        model = self._untrained()
        with tempfile.TemporaryDirectory() as scratch:
            record_requests(model, self.reference, rounds[0], Path(scratch) / "rehearsal.safetensors", new_tokens=2)
        del model
        gc.collect()
        self._said("rehearsal", "an untrained model can be recorded")

    def _record(self, model: Any, rounds: list[list[Any]], stop_by: float) -> None:
        settings = self.reference.recording
        self.about["recordings"] = []
        longest = 0.0
        for start in range(0, len(rounds), settings.rounds_per_batch):
            began = time.monotonic()
            if began + longest > self.began + stop_by:
                self._said("recording", f"no time is left for rounds {start + 1} to {len(rounds)}")
                break
            requests = [request for one in rounds[start : start + settings.rounds_per_batch] for request in one]
            with tempfile.TemporaryDirectory() as scratch:
                path = Path(scratch) / "recording.safetensors"
                recorded = record_requests(model, self.reference, requests, path, new_tokens=settings.sampled_tokens)
                parts = in_parts(recorded, len(rounds[0]))
                del recorded  # before its file goes
            for number, part in enumerate(parts, start=start + 1):
                self.about["recordings"].append(save_part(part, self.out / f"{self.reference.name}-{number}.safetensors"))
            self._said("recording", f"{len(requests)} requests")
            if start == 0:
                # Right after the first batch: if time runs out, later rounds are the lesser loss.
                self._record_control(parts[0])
            longest = max(longest, time.monotonic() - began)

    def _record_control(self, part: Trace) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "untrained.safetensors"
            control = record_untrained(self._untrained(), self.reference, part, path)
        self.about["untrained"] = save_part(control, self.out / f"{self.reference.name}-untrained.safetensors")
        gc.collect()
        self._said("untrained", f"the control of {len(control.domains)} requests")

    def _untrained(self) -> Any:
        model = build_model(self.reference, self.tokens.vocabulary, self.device)
        halve(model)
        model.set_experts_implementation("grouped_mm")
        return model.eval()

    def _said(self, stage: str, words: str) -> None:
        """Say what ended, and write all that is known so far."""
        seconds = round(time.monotonic() - self.began, 1)
        self.about["seconds"][stage] = seconds
        (self.out / f"{self.reference.name}.run.json").write_text(json.dumps(self.about, indent=1) + "\n")
        print(f"[{seconds:6.1f} s] {stage}: {words}", flush=True)


def recorder_sha256() -> str:
    """Return a sha256 over the sources of the recorder."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parents[1] / "recorder").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def best_device() -> str:
    """Return ``cuda`` where there is a CUDA device, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"
