"""The recording as a whole: load, look, run every batch, write one trace."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from traces.checks import validate_trace
from traces.errors import InputError
from traces.files import load_trace, save_trace
from traces.recorder.batches import TOKEN_COLUMNS, BatchRows
from traces.recorder.columns import GrowingColumns, differing_setting
from traces.recorder.generation import check_lengths, end_tokens, forward_passes
from traces.recorder.importance import find_residuals
from traces.recorder.layers import expert_count, model_spec, moe_layers
from traces.recorder.loading import (
    check_folder,
    describe,
    encoder,
    foregate_version,
    load_encoder,
    load_model,
    require_packages,
)
from traces.recorder.observer import Observer, PendingRows, Wanted
from traces.recorder.options import RecordOptions
from traces.recorder.probe import PROBE_TOKENS, Findings, probe
from traces.recorder.prompts import Prompt, digest, read_prompts, tokenize
from traces.trace import Provenance, Trace

if TYPE_CHECKING:
    import torch

DECODE_PASSES_HELD = 16
"""Decode passes whose observations stay on the device before they are copied to the host together."""

Progress = Callable[[int, int, str], None]
"""Called with batches done, batches in all, and how it goes."""


def record(
    model: str | PathLike[str] | torch.nn.Module,
    prompts: str | PathLike[str] | Sequence[Prompt],
    out: str | PathLike[str],
    options: RecordOptions | None = None,
    *,
    tokenizer: Any = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Run `model` on `prompts` and write what its routers chose to `out`, a ``.safetensors`` trace; return that trace.

    `model` is the folder or published id of a saved model, or a causal language model of transformers that is in memory
    already; then `tokenizer` is needed for prompts that are texts, and `name` says what to call the model. `prompts` is a
    file (`traces.recorder.prompts.read_prompts`) or prompts. Every forward hook is removed again.

    While it runs, the recording grows in a folder beside `out` whose name ends in ``.recording``. The same call goes on
    where an earlier one was killed, and gives the same bytes; where `out` is there already, it is returned as it is.

    Raises `InputError` for bad input, for a model that cannot be recorded, when the earlier recording had other settings,
    and when the disk is full; what was recorded until then is kept for the next call.
    """
    options = options or RecordOptions()
    out = Path(out)
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: a trace file's name must end in .safetensors, not in '{out.suffix}'")
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist; it must be there first")
    asked = list(prompts) if not isinstance(prompts, (str, PathLike)) else read_prompts(Path(prompts))
    require_packages()
    if isinstance(model, (str, PathLike)):
        path = str(model)
        check_folder(path)
        name = name or (Path(path).resolve().name if Path(path).exists() else path)
        encode = None if tokenizer is None else encoder(tokenizer)
        if encode is None and any(prompt.token_ids is None for prompt in asked):
            encode = load_encoder(path)
        loaded: Any = load_model(path, options)
    else:
        loaded, name = model, name or str(getattr(model.config, "model_type", type(model).__name__))
        encode = None if tokenizer is None else encoder(tokenizer)
    token_ids = [ids[: options.max_prompt_tokens] for ids in tokenize(asked, encode)]
    where = Path(prompts).name if isinstance(prompts, (str, PathLike)) else "in memory"
    return _Recording(loaded, name, asked, token_ids, out, options, f"{name}, prompts {where}", progress).run()


class _Recording:
    """One recording, from the probe to the finished trace."""

    def __init__(
        self,
        model: Any,
        name: str,
        prompts: Sequence[Prompt],
        token_ids: Sequence[tuple[int, ...]],
        out: Path,
        options: RecordOptions,
        source: str,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.name = name
        self.prompts = prompts
        self.token_ids = token_ids
        self.out = out
        self.folder = out.with_name(f"{out.name}.recording")
        self.options = options
        self.source = source
        self.progress = progress or (lambda done, total, how: None)
        self.end_tokens = end_tokens(model) if options.stop_at_end else frozenset[int]()
        self.batches = -(-len(prompts) // options.batch_size)
        self.began = time.perf_counter()
        self.recorded_tokens = 0
        """By this call."""

    def run(self) -> Trace:
        """Record what is not there yet, and return the trace."""
        places = [prompt.place for prompt in self.prompts]
        check_lengths(self.model, self.name, self.token_ids, places, self.options.new_tokens)
        self.layers = moe_layers(self.model, self.name)
        self._check_lookahead()
        training = self.model.training
        self.model.eval()
        try:
            findings = self._probe()
            self.observer = self._observer(findings)
            self.settings = self._settings()
            self.spec = model_spec(self.model, self.name, self.layers, findings.top_k, findings.kv_bytes_per_token)
            if self.out.exists():
                return self._already_there()
            return self._record()
        finally:
            self.model.train(training)

    # ---- before the first batch ------------------------------------------------------------------------------------

    def _check_lookahead(self) -> None:
        depth, layers = self.options.lookahead, len(self.layers)
        if depth > layers - 1:
            raise InputError(
                f"lookahead is {depth}; {self.name} has {layers} MoE layers, so it must be at most {layers - 1}"
            )

    def _probe(self) -> Findings:
        return probe(
            self.model,
            self.name,
            self.layers,
            self.token_ids[0],
            routers=bool(self.options.lookahead or self.options.router_logits),
            lookahead=bool(self.options.lookahead),
        )

    def _observer(self, findings: Findings) -> Observer:
        options, experts = self.options, expert_count(self.layers[0].experts)
        least = min(2 * findings.top_k, experts)
        ranks = options.lookahead_ranks or least
        if not least <= ranks <= experts:
            raise InputError(
                f"lookahead_ranks is {ranks}; it must be {least} (twice the k of {self.name}) to {experts}, all its experts"
            )
        wanted = Wanted(options.router_logits, options.lookahead, ranks, options.expert_output_norm, options.residual_cosine)
        residuals = None
        if options.residual_cosine:
            residuals = find_residuals(self.model, self.name, self.layers, self.token_ids[0][:PROBE_TOKENS])
        return Observer(self.layers, findings.top_k, wanted, findings.routers, residuals)

    def _settings(self) -> dict[str, Any]:
        """Return everything that decides the bytes of the trace; a recording goes on only where all of it is the same."""
        prompts = [Prompt("", None, ids, prompt.domain) for ids, prompt in zip(self.token_ids, self.prompts, strict=True)]
        loading = ("device", "device_map", "dtype", "experts_implementation")  # described as they turned out
        options = {name: value for name, value in dataclasses.asdict(self.options).items() if name not in loading}
        return {
            **options,
            **describe(self.model, self.layers),
            "end_tokens": sorted(self.end_tokens),
            "model": self.name,
            "prompts_sha256": digest(prompts),
            "sample_top_p": float(self.options.sample_top_p),  # 1 and 1.0 are the same, but not the same bytes
            "source": self.source,
            "temperature": float(self.options.temperature),
        }

    def _already_there(self) -> Trace:
        trace = load_trace(self.out)
        differing = differing_setting(dict(trace.provenance.details), self.settings)
        if differing:
            raise InputError(
                f"{self.out}: this trace is there already, recorded with other settings: {differing};"
                " remove it, or choose another out"
            )
        shutil.rmtree(self.folder, ignore_errors=True)  # a kill between the last two strokes leaves it
        return trace

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _record(self) -> Trace:
        columns = {**self.observer.columns(), **TOKEN_COLUMNS}
        with GrowingColumns(self.folder, columns, self.settings) as growing:
            with self.observer:
                for batch in range(growing.batches, self.batches):
                    self._record_batch(growing, batch)
            return self._finish(growing)

    def _record_batch(self, growing: GrowingColumns, batch: int) -> None:
        first = batch * self.options.batch_size
        prompts = self.token_ids[first : first + self.options.batch_size]
        rows = BatchRows([len(prompt) for prompt in prompts], first, growing.steps, self.end_tokens)
        start = growing.rows
        import torch

        try:
            self._run_passes(growing, rows, prompts, batch)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"batch {batch}: the device is out of memory ({error}); choose a smaller batch_size, new_tokens or dtype"
            ) from None
        trace = self._trace(growing, start)
        # As a trace of its own: the domains of all requests would be looked at again with every batch.
        domains = trace.domains[first : first + len(prompts)]
        alone = dataclasses.replace(trace, request=trace.request - np.int32(first), domains=domains)
        validate_trace(alone, f"{self.name}, batch {batch}")
        growing.commit(rows.steps)
        self._tell(growing, growing.batches)

    def _run_passes(self, growing: GrowingColumns, rows: BatchRows, prompts: Sequence[Sequence[int]], batch: int) -> None:
        """Run one batch; what is collected reaches the disk one collection later, so that the host need not wait for it."""
        held: list[dict[str, torch.Tensor]] = []
        pending: PendingRows | None = None
        for number, token_ids in enumerate(forward_passes(self.model, prompts, self.options, batch)):
            held.append({**self.observer.finish_pass(), "token_ids": token_ids.reshape(-1)})
            # Prefill is collected by itself, decode passes many at a time.
            if 0 < number < self.options.new_tokens and len(held) < DECODE_PASSES_HELD:
                continue
            if pending is not None:
                self._append(growing, rows, pending, batch)
                if not rows.active.any():
                    return
            pending, held = self.observer.collect(held), []
        if pending is not None:
            self._append(growing, rows, pending, batch)

    def _append(self, growing: GrowingColumns, rows: BatchRows, pending: PendingRows, batch: int) -> None:
        before = growing.rows
        for one_pass in rows.passes(pending.arrays()):
            growing.append(one_pass)
        self.recorded_tokens += growing.rows - before
        self._tell(growing, batch)

    def _tell(self, growing: GrowingColumns, batches: int) -> None:
        rate = self.recorded_tokens / (time.perf_counter() - self.began)
        self.progress(batches, self.batches, f"{growing.rows:,} tokens, {rate:,.0f} tokens/s")

    # ---- the trace -------------------------------------------------------------------------------------------------

    def _trace(self, growing: GrowingColumns, start: int = 0) -> Trace:
        arrays: dict[str, Any] = dict(growing.read(start))
        return Trace(
            model=self.spec,
            provenance=Provenance("recorded", self.source, f"foregate {foregate_version()}", self.settings),
            domains=tuple(prompt.domain for prompt in self.prompts),
            **arrays,
        )

    def _finish(self, growing: GrowingColumns) -> Trace:
        whole = self.folder / "trace.safetensors"
        with growing.said():
            for unfinished in self.folder.glob(".*.unfinished"):
                unfinished.unlink()
            save_trace(self._trace(growing), whole)
            os.replace(whole, self.out)
        shutil.rmtree(self.folder)
        return load_trace(self.out)
