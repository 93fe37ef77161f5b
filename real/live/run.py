"""Live mode: a transformers model generates while the executor serves its experts.

The model's own forward drives: whenever it calls its experts, the executor serves that event, with the policies, the pump
and the slots of a replay. With graphs, one decode pass is captured in pieces, cut at every call of the experts, and
replayed with the host's decisions between them; the model's Python then runs for prompts only.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch

from policies.contract import Future
from policies.system import Composition, System, build_system
from real.decisions import Decisions
from real.device import Device
from real.executor import Executor, Outcome, Shape
from real.host import undisturbed
from real.live.decoder import LiveDecoder
from real.live.model import LiveModel
from real.replay import Log, check_room, device_errors, free_device_memory, link_rate, opened
from real.schedule import Schedule
from real.timeline import Timeline
from sim.events import Events, future_of
from traces.errors import InputError

CHUNK_BYTES = 4 << 20
"""Bytes of one copy of a prefetch; two of them are given to the copy stream ahead."""

OBSERVED = frozenset({"weights", "lookahead", "logits"})
"""What a live router tells; nobody tells the future, unless it was recorded in a run before."""


class Request(NamedTuple):
    """One prompt and what followed."""

    tokens: list[int]
    """The likeliest token of every pass, the first of which is the prompt's."""
    prefill_s: float
    decode_s: float
    """Of all passes after the prompt's, until the device was done."""

    @property
    def tokens_per_s(self) -> float:
        """Decoded tokens per second; NaN where there is none."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else float("nan")


class CudaGraphs:
    """Records what is submitted between `begin` and `end` as a CUDA graph; all of them share their memory, in order."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: Any = None

    def begin(self) -> None:
        """Begin to record."""
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(pool=self._pool)

    def end(self) -> Any:
        """Return what was recorded; its `replay` submits it."""
        graph, self._graph = self._graph, None
        graph.capture_end()
        return graph

    def finish(self) -> None:
        """Nothing of what was recorded ran, so there is nothing to undo."""

    def abort(self) -> None:
        """Stop recording after a failure."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with suppress(RuntimeError):  # what was recorded is not whole, which is why this was called
                graph.capture_end()


class LiveRun:
    """Serves a model's experts to `requests` prompts one after the other, at most `new_tokens` each; what is cached stays.

    `parts` is the system's composition and `slots` its device memory in experts. `graphs` replays captured decode passes;
    where that is not possible, `notes` says why and the model's forward runs for every token. `preload` brings all experts
    into slots first, if there are as many. `future` is what `routing` of a run with the same passes gave: with it a system
    that knows the future runs too. Use as a context manager; whatever happens inside, nothing stays allocated.
    Raises InputError where the system needs what a live router does not tell, or memory does not suffice.
    """

    def __init__(
        self,
        model: LiveModel,
        parts: Composition,
        slots: int,
        *,
        requests: int,
        new_tokens: int,
        most_prompt_tokens: int,
        graphs: bool = False,
        preload: bool = False,
        seed: int = 0,
        layer_ns: int = 500_000,
        chunk_bytes: int = CHUNK_BYTES,
        window_bytes: int = 2 * CHUNK_BYTES,
        future: Future | None = None,
        device: Device | None = None,
        recorder: Any = None,
        prove: bool = False,
    ) -> None:
        self.model, self.new_tokens, self._requests = model, new_tokens, requests
        self._most_prompt_tokens = most_prompt_tokens
        self.notes: list[str] = []
        self.log: Log = []
        check_needs(parts, future)
        self._future = future
        layers, experts = len(model.layers), model.experts
        top_k = model.top_k
        self._parts, self._slots, self._preload = parts, slots, preload
        self._sizes: dict[str, Any] = {"layers": layers, "experts": experts, "top_k": top_k}
        self._settings: dict[str, Any] = {"seed": seed, "layer_ns": layer_ns}
        self._copies: dict[str, Any] = {"chunk_bytes": chunk_bytes, "window_bytes": window_bytes}
        self.graphs, self._recorder = graphs, recorder
        """Whether decode passes are captured ones."""
        self._given, self._prove = device, prove
        self._decoded: list[slice] = []
        """By request that began, its decode steps."""
        self._step = 0
        self._captured: tuple[list[Any], dict[int, Any]] | None = None
        """While a pass is being captured: its segments, and by layer what publishes what predictors see of it."""
        self._segments: list[Any] = []
        self._sights: dict[int, Any] = {}
        self._cache: Any = None
        accepted = inspect.signature(model.model.forward).parameters
        self._arguments: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in accepted:
            self._arguments["logits_to_keep"] = 1

    def __enter__(self) -> LiveRun:
        free_device_memory()
        self._open = self._opened()
        self._open.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self._open.__exit__(*what)

    # ---- requests --------------------------------------------------------------------------------------------

    def request(
        self,
        prompt: Sequence[int],
        on_decode: Callable[[], None] = lambda: None,
        *,
        forced: Sequence[int] | None = None,
    ) -> Request:
        """Generate for one prompt, greedily, until the device is done; `on_decode` is called after the prompt's pass.

        With `forced` every decode pass is fed the next of these tokens, whatever the pass before gave, and there are as many
        passes as tokens: runs can then be compared pass by pass. Raises InputError for more than the run was set up for.
        """
        if len(self._decoded) == self._requests:
            raise InputError(f"the run was set up for {self._requests} requests; this is one more")
        if len(prompt) > self._most_prompt_tokens:
            raise InputError(f"a prompt has {len(prompt)} tokens; the run was set up for at most {self._most_prompt_tokens}")
        passes = self.new_tokens - 1 if forced is None else len(forced)
        if passes >= self.new_tokens:
            raise InputError(f"{passes} tokens are forced; the run was set up for at most {self.new_tokens - 1}")
        first = self._decoded[-1].stop if self._decoded else 0
        if self._future is not None and (first + 1 + passes) * self._sizes["layers"] >= len(self._future.offsets):
            raise InputError(f"pass {first + passes} is not among those that were recorded, so nobody knows its future")
        self.decoder.request = len(self._decoded)
        self._decoded.append(slice(first + 1, first + 1 + passes))
        with torch.no_grad():
            return self._request(range(first, first + 1 + passes), prompt, forced, on_decode)

    def decode_steps(self, request: int) -> slice:
        """Return the decode steps of a request, by which the timeline and the counts are indexed."""
        return self._decoded[request]

    def outcome(self) -> Outcome:
        """Return the counts of all requests so far."""
        return self.executor.outcome()

    def routing(self) -> Future:
        """Return what the router chose in all passes so far, as policies that need the future receive it."""
        layers, experts = self._sizes["layers"], self._sizes["experts"]
        passes = self._decoded[-1].stop if self._decoded else 0
        needed: list[list[int]] = [[] for _ in range(passes * layers)]
        for _, what, key, event in self.log:
            if what in ("hit", "late_hit", "miss"):
                needed[event].append(key)
        offsets = np.cumsum([0, *map(len, needed)], dtype=np.int64)
        keys = np.array([key for event in needed for key in event], np.int32)
        return future_of(Events(layers, experts, offsets, keys, np.zeros(len(keys), np.int32)))

    def unforeseen(self) -> int:
        """Return in how many events the router chose other experts than `future` says; 0 without a future."""
        if self._future is None:
            return 0
        found = zip(_unions(self.routing()), _unions(self._future), strict=False)
        return sum(mine != foretold for mine, foretold in found)

    def _request(
        self, steps: range, prompt: Sequence[int], forced: Sequence[int] | None, on_decode: Callable[[], None]
    ) -> Request:
        """Run the prompt's pass, then one for every further step: captured where possible."""
        cache = self._static_cache() if self.graphs else None
        where = self.model.where
        given = torch.tensor([list(forced)], dtype=torch.int64).to(where) if forced is not None else None
        start = time.perf_counter()
        ids = torch.tensor([list(prompt)]).to(where)
        output, token = self._pass(steps[0], ids, past_key_values=cache)
        self.decoder.forget()
        self.executor.finish()
        on_decode()
        middle = time.perf_counter()
        if cache is not None and not self._segments and (reason := _why_not_static(cache)):
            self._give_graphs_up(reason)
        if self.graphs:
            tokens = self._static(steps[1:], token, given)
        else:
            tokens = self._dynamic(steps[1:], token, given, output.past_key_values)
        self.executor.finish()
        return Request(tokens.tolist(), middle - start, time.perf_counter() - middle)

    def _dynamic(self, steps: range, token: Any, given: Any, cache: Any) -> Any:
        """Run the model's forward for every step, on the tokens `given` [1, steps] if any; return the likeliest tokens."""
        tokens = [token]
        for place, step in enumerate(steps):
            fed = token if given is None else given[:, place : place + 1]
            output, token = self._pass(step, fed, past_key_values=cache)
            cache = output.past_key_values
            tokens.append(token)
        return torch.cat(tokens, 1)[0]

    def _static(self, steps: range, token: Any, given: Any) -> Any:
        """Replay a captured pass for every step; the first time, run one pass as it is and capture the next."""
        passes = len(steps)
        self._forced.fill_(-1)
        if given is not None:
            self._forced[:passes].copy_(given[0])
        self._ids.copy_(token if given is None or not passes else given[:, :1])
        self._chosen[:1].copy_(token[0])
        self._place.fill_(1)
        if not self._segments and steps:
            self._eager(steps[0], self._decode)  # kernels compile, libraries settle
            steps = steps[1:]
            try:
                self._capture()
            except (RuntimeError, InputError) as error:
                self._give_graphs_up(str(error).splitlines()[0])
        if self._segments:
            self.decoder.replay(self._segments, self._sights, self._held)
            self.executor.run(steps)
            self.decoder.replay((), {}, ())
        else:
            for step in steps:
                self._eager(step, self._decode)
        return self._chosen[: 1 + passes]

    # ---- passes ----------------------------------------------------------------------------------------------

    def _pass(self, step: int, ids: Any, **more: Any) -> tuple[Any, Any]:
        """Run one pass of the model; return its output and the likeliest token [1, 1], both still to be computed."""
        output = self._eager(step, lambda: self.model.model(input_ids=ids, **self._arguments, **more))
        return output, output.logits[:, -1].argmax(-1, keepdim=True)

    def _eager(self, step: int, forward: Any) -> Any:
        self._step = step
        self.executor.begin_step(step)
        self.executor.timeline.begin_layer(step, 0)
        output = forward()
        self.executor.end_step(step)
        return output

    def _decode(self) -> None:
        """Submit one pass of one token, on tensors that stay where they are: input, cache, output.

        The next pass is fed what is forced at its place, or else the likeliest token.
        """
        output = self.model.model(input_ids=self._ids, past_key_values=self._cache, **self._arguments)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        forced = self._forced.index_select(0, self._place)
        self._ids.copy_(torch.where(forced < 0, token[0], forced)[None])
        self._chosen.index_copy_(0, self._place, token[0])
        self._place += 1

    def _serve(self, layer: int, hidden: Any, ids: Any, weights: Any) -> Any:
        """Compute the experts of a layer: what the model's experts modules call."""
        decoder = self.decoder
        decoder.enter(layer, hidden, ids, weights)
        if self._captured is not None:
            segments, sights = self._captured
            segments.append(self._cut())
            if decoder.sight.reaches(layer):
                decoder.sight.expect(layer, decoder.event, decoder.count)
                decoder.sight.submit()
                sights[layer] = self._cut()
            return decoder.leave(layer, hidden)
        self.executor.serve(self._step, layer)
        output = decoder.leave(layer, hidden)
        if layer + 1 < decoder.layers:
            self.executor.timeline.begin_layer(self._step, layer + 1)
        return output

    # ---- graphs ----------------------------------------------------------------------------------------------

    def _static_cache(self) -> Any:
        """Return the cache that captured passes use, emptied; None where the model has none, and then do without graphs."""
        from transformers import StaticCache

        if self._cache is None:
            room = self._most_prompt_tokens + self.new_tokens
            try:
                self._cache = StaticCache(config=self.model.model.config, max_cache_len=room)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                self._give_graphs_up(f"there is no static cache for it ({type(error).__name__}: {error})")
                return None
            where = self.model.where
            self._ids = torch.zeros(1, 1, dtype=torch.int64, device=where)
            self._place = torch.zeros(1, dtype=torch.int64, device=where)
            self._chosen, self._forced = torch.zeros(2, self.new_tokens, dtype=torch.int64, device=where)
        else:
            self._cache.reset()
        return self._cache

    def _cut(self) -> Any:
        """Return what was recorded so far, and begin to record what follows."""
        recorded = self._recorder.end()
        self._recorder.begin()
        return recorded

    def _capture(self) -> None:
        """Record one decode pass, cut at every call of the experts; nothing of it runs."""
        if self._recorder is None:
            if self.model.where == "cpu":
                raise InputError("there are no graphs on a CPU")
            self._recorder = CudaGraphs()
        self.executor.finish()
        event = self.decoder.event
        segments: list[Any] = []
        sights: dict[int, Any] = {}
        self._captured = segments, sights
        self._recorder.begin()
        try:
            self._decode()
            segments.append(self._recorder.end())
            self._recorder.finish()
        except BaseException:
            self._recorder.abort()
            raise
        finally:
            self._captured = None
            self.decoder.event = event
        self._segments, self._sights, self._held = segments, sights, self.decoder.held()

    def _give_graphs_up(self, reason: str) -> None:
        self.graphs = False
        self._segments = []
        self.notes.append(f"without graphs: {reason}")

    # ---- set-up ----------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self) -> Iterator[None]:
        what = f"system '{self._parts.name}' on {self.model.name}"
        schedule = Schedule(self.model.layout.expert_bytes) if self._prove else None
        with device_errors(what), opened(self._given, self.model.where, schedule) as device:
            hooks: list[Any] = []
            try:
                system = self._system(0)
                slots = int(system.setting.capacity.sum())
                check_room(slots * self.model.layout.slot_bytes, self.model.where)
                needs = self._parts.needs
                self.decoder = LiveDecoder(
                    self.model,
                    slots,
                    device,
                    most_tokens=self._most_prompt_tokens,
                    needs=needs,
                    depth=system.prefetch.depth,
                )
                self.decoder.capture_experts()
                address = int(self.decoder.slots.data_ptr())
                on_gpu = self.model.where != "cpu"
                self.link_rate = link_rate(device, self.model.slab, address, slots) if on_gpu else float("nan")
                expert_bytes = self.model.layout.expert_bytes
                if on_gpu:
                    system = self._system(int(expert_bytes / self.link_rate * 1e9))
                self.executor = self._executor(system, device, expert_bytes)
                if self._preload:
                    self.executor.preload(range(self._sizes["layers"] * self._sizes["experts"]))
                hooks = self.decoder.sight.observing()
                with self.model.serving(self._serve), undisturbed():
                    yield
            finally:
                for hook in hooks:
                    hook.remove()
                for name in (
                    "decoder",
                    "executor",
                    "_cache",
                    "_segments",
                    "_sights",
                    "_held",
                    "_ids",
                    "_chosen",
                    "_forced",
                    "_place",
                    "_recorder",
                ):
                    self.__dict__.pop(name, None)

    def _system(self, transfer_ns: int) -> System:
        """Build the system afresh. Raises InputError."""
        future = None if self._future is None else (lambda future=self._future: future)
        return build_system(
            self._parts, slots=self._slots, transfer_ns=transfer_ns, future=future, **self._sizes, **self._settings
        )

    def _executor(self, system: System, device: Device, expert_bytes: int) -> Executor:
        shape = Shape(self._requests * self.new_tokens, self._sizes["layers"], self._sizes["experts"])
        return Executor(
            Decisions(system, self.decoder.sight.observed, lambda step: (0, self.decoder.count), shape.steps * shape.layers),
            shape,
            self.decoder,
            device,
            self.decoder.memory,
            expert_bytes=expert_bytes,
            timeline=Timeline(device, shape.layers),
            log=self.log,
            **self._copies,
        )


def check_needs(parts: Composition, future: Future | None = None) -> None:
    """Raise InputError where a system needs what a live router does not tell, and no recorded `future` either."""
    if "future" in parts.needs and future is None:
        raise InputError(
            f"system '{parts.name}' needs to know what the router will choose, which nobody knows while a model generates; "
            "choose another, or replay a trace"
        )
    parts.check(OBSERVED, "of a live router")


def _unions(future: Future) -> list[set[int]]:
    """Return what every event needs."""
    return [set(keys.tolist()) for keys in np.split(future.keys, future.offsets[1:-1])]


def _why_not_static(cache: Any) -> str | None:
    """Say why passes with `cache` cannot be captured: a layer that keeps its place on the host."""
    odd = [type(layer).__name__ for layer in cache.layers if type(layer).__name__ != "StaticLayer"]
    return f"its cache has a {odd[0]}, which keeps its place on the host" if odd else None
