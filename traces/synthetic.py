"""Routing made up to have the statistics of a real model's.

A trace from here shows how policies respond to more or less skew, repetition and predictability. It proves
nothing about a real model, and its provenance says ``synthetic`` wherever it goes.

The router logits of a token are a sum of independent parts, one value per layer and expert: how popular the
expert is, how much the request likes it, how much the last few tokens did, and Gumbel noise, with which the
best k are a draw without replacement. Lookahead is the true logits of the layer foretold, plus noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.checks import expert_dtype, validate_trace
from traces.errors import InputError, nearest
from traces.trace import DECODE, PREFILL, Array, ModelSpec, Provenance, Trace

_Floats = npt.NDArray[np.float32]

_BLOCK_LOGITS = 4_000_000
"""Logits made at a time, so that long requests need a few hundred megabytes at most."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to generate. Spreads are standard deviations of logits whose noise has one of 1.28.

    The defaults are fitted to DeepSeek-V2-Lite (`CALIBRATED`).
    """

    layers: int = 26
    experts: int = 64
    top_k: int = 6
    requests: int = 16
    prefill_tokens: int = 64
    """Tokens of each request's prompt, one step together."""
    decode_tokens: int = 192
    """Tokens that each request then writes, one step each."""
    popularity_spread: float = 0.2
    """How much experts differ over all requests."""
    request_spread: float = 0.95
    """How much a request's taste adds to that, for as long as it lasts."""
    recent_spread: float = 1.8
    """How much the last few tokens' taste adds."""
    recent_persistence: float = 0.6
    """Share of the recent taste that the next token keeps, 0 to below 1."""
    early_strength: tuple[float, ...] = (0.3, 0.6, 0.8)
    """What the three spreads are multiplied by in the first layers; 1 in those after them."""
    last_strength: float = 0.8
    """The same in the last layer."""
    weight_sharpness: float = 0.5
    """What logits are multiplied by before the softmax that gives weights and probabilities."""
    lookahead_depth: int = 3
    """How many layers ahead the gates are observed; 0 leaves lookahead out."""
    lookahead_width: int | None = None
    """How many experts each observation ranks; 2 top-k when None."""
    lookahead_noise: float = 0.5
    """Standard deviation of the error of an observation one layer ahead."""
    lookahead_growth: float = 0.35
    """By how much of that the error grows with each further layer."""
    early_noise: tuple[float, ...] = (4.0, 1.8, 1.3)
    """What the error is multiplied by where the first layers predict; 1 in those after them."""
    noise_correlation: float = 0.5
    """Share of the error's variance that observations of one layer from different layers have in common."""
    router_logits: bool = False
    """Whether to keep the logits: T x L x E of them."""


CALIBRATED: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v2_lite": {},
    "qwen3_30b": {
        "layers": 48,
        "experts": 128,
        "top_k": 6,
        "popularity_spread": 2.0,
        "request_spread": 2.1,
        "recent_spread": 2.0,
        "recent_persistence": 0.46,
        "early_strength": (0.15, 0.5, 0.8),
        "last_strength": 0.4,
        "weight_sharpness": 0.25,
        "lookahead_noise": 0.4,
    },
}
"""Recipes fitted to published statistics of real models, as changes to the defaults.

Qwen3-30B was published as recorded with k reduced from 8 to 6, in one request: how its skew divides between
all requests and one is not known, and is half and half here. Lookahead noise is fitted to published recall of
models of that kind, not of the two themselves.
"""


def synthesize(*, seed: int = 0, **parameters: Any) -> Trace:
    """Return a generated trace. `parameters` are the fields of `Recipe`; the same seed gives the same trace.

    A request is the same whatever the number of requests.

    Raises `InputError` for an unknown parameter or a value that makes no sense.
    """
    recipe = _recipe(parameters)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"synthesize: seed is {seed!r}; it must be a whole number of at least 0")
    shared, *seeds = np.random.SeedSequence(seed).spawn(1 + recipe.requests)
    popularity = np.random.default_rng(shared).standard_normal((recipe.layers, recipe.experts), np.float32)
    popularity *= np.float32(recipe.popularity_spread)
    parts = [
        block for request_seed in seeds for block in _request_blocks(recipe, popularity, np.random.default_rng(request_seed))
    ]
    trace = Trace(
        model=ModelSpec(
            f"synthetic {recipe.layers}x{recipe.experts} top-{recipe.top_k}",
            recipe.layers,
            recipe.experts,
            recipe.top_k,
        ),
        provenance=_provenance(recipe, seed),
        domains=("",) * recipe.requests,
        **_token_arrays(recipe),
        **_joined(parts),
    )
    validate_trace(trace, "synthesize")
    return trace


def _joined(parts: list[dict[str, Array]]) -> dict[str, Any]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _recipe(parameters: Mapping[str, Any]) -> Recipe:
    known = [field.name for field in dataclasses.fields(Recipe)]
    for name in parameters:
        if name not in known:
            raise InputError(f"synthesize: unknown parameter '{name}'; {nearest(name, [*known, 'seed'])}")
    given: dict[str, Any] = {name: tuple(value) if _is_list(value) else value for name, value in parameters.items()}
    recipe = Recipe(**given)
    _check_counts(recipe)
    _check_reals(recipe)
    return recipe


def _is_list(value: object) -> bool:
    # A configuration file gives lists of its own kind; all that matters is that it is not one number.
    return hasattr(value, "__iter__") and not isinstance(value, str)


def _check_counts(recipe: Recipe) -> None:
    least = {"layers": 1, "experts": 1, "top_k": 1, "requests": 1}
    for name in (*least, "prefill_tokens", "decode_tokens", "lookahead_depth"):
        value = getattr(recipe, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least.get(name, 0):
            raise InputError(f"synthesize: {name} is {value!r}; it must be a whole number of at least {least.get(name, 0)}")
    if recipe.top_k > recipe.experts:
        raise InputError(f"synthesize: top_k is {recipe.top_k}; it must be at most experts, {recipe.experts}")
    if recipe.prefill_tokens + recipe.decode_tokens == 0:
        raise InputError("synthesize: prefill_tokens and decode_tokens are 0; a request needs a token")
    least_width, width = min(2 * recipe.top_k, recipe.experts), recipe.lookahead_width
    if width is not None and not (isinstance(width, int) and least_width <= width <= recipe.experts):
        raise InputError(f"synthesize: lookahead_width is {width!r}; it must be {least_width} to {recipe.experts}")
    if recipe.lookahead_depth >= recipe.layers:
        raise InputError(
            f"synthesize: lookahead_depth is {recipe.lookahead_depth}; it must be below the {recipe.layers} layers"
        )


def _check_reals(recipe: Recipe) -> None:
    for field in dataclasses.fields(Recipe):
        value = getattr(recipe, field.name)
        numbers = value if isinstance(value, tuple) else (value,)
        if "float" in str(field.type) and not all(
            isinstance(number, int | float) and 0 <= number < np.inf for number in numbers
        ):
            raise InputError(f"synthesize: {field.name} is {value!r}; it must be finite and not negative")
    for name in ("recent_persistence", "noise_correlation"):
        if getattr(recipe, name) > 1 or recipe.recent_persistence == 1:
            raise InputError(f"synthesize: {name} is {getattr(recipe, name)}; it must be between 0 and 1")


def _per_layer(early: tuple[float, ...], layers: int) -> _Floats:
    """Return [L]: the values of the first layers, then ones."""
    values = np.ones(layers, np.float32)
    values[: len(early)] = early[:layers]
    return values


def _strength(recipe: Recipe) -> _Floats:
    strength = _per_layer(recipe.early_strength, recipe.layers)
    strength[-1] *= np.float32(recipe.last_strength)
    return strength


def _request_blocks(recipe: Recipe, popularity: _Floats, rng: np.random.Generator) -> Iterator[dict[str, Array]]:
    """Yield the routing of one request's tokens, block by block."""
    shape = (recipe.layers, recipe.experts)
    lasting = popularity + np.float32(recipe.request_spread) * rng.standard_normal(shape, np.float32)
    recent = rng.standard_normal(shape, np.float32)
    tokens = recipe.prefill_tokens + recipe.decode_tokens
    rows = max(1, _BLOCK_LOGITS // (recipe.layers * recipe.experts))
    for start in range(0, tokens, rows):
        tastes = _recent_tastes(recipe, recent, min(rows, tokens - start), rng)
        recent = tastes[-1]
        taste = lasting + np.float32(recipe.recent_spread) * tastes
        logits = _strength(recipe)[:, None] * taste + _gumbel(taste.shape, rng)
        yield {**_routing(recipe, logits), **_lookahead(recipe, logits, rng)}


def _recent_tastes(recipe: Recipe, before: _Floats, tokens: int, rng: np.random.Generator) -> _Floats:
    """Return [n, L, E]: a first-order autoregression of variance 1 that goes on from `before`."""
    tastes = rng.standard_normal((tokens, *before.shape), np.float32)
    tastes *= np.float32(np.sqrt(1 - recipe.recent_persistence**2))
    for token in range(tokens):
        tastes[token] += np.float32(recipe.recent_persistence) * before
        before = tastes[token]
    return tastes


def _gumbel(shape: tuple[int, ...], rng: np.random.Generator) -> _Floats:
    # A draw in single precision can be 0, whose logarithm is not finite.
    waits = np.maximum(rng.standard_exponential(shape, np.float32), np.float32(2.0**-24))
    return np.asarray(-np.log(waits), np.float32)


def _routing(recipe: Recipe, logits: _Floats) -> dict[str, Array]:
    """Return the experts, weights and perhaps logits, of [n, L, E] logits."""
    logits = np.float32(recipe.weight_sharpness) * logits
    chosen = _best(logits, recipe.top_k)
    weights = _softmax(np.take_along_axis(logits, chosen, -1))
    found: dict[str, Array] = {
        "experts": chosen.astype(expert_dtype(recipe.experts)),
        "weights": weights.astype(np.float16),
    }
    if recipe.router_logits:
        found["router_logits"] = logits.astype(np.float16)
    return found


def _lookahead(recipe: Recipe, logits: _Floats, rng: np.random.Generator) -> dict[str, Array]:
    """Return what each layer would have foretold, from the [n, L, E] logits that came true."""
    depth = recipe.lookahead_depth
    if depth == 0:
        return {}
    tokens, layers, experts = logits.shape
    width = recipe.lookahead_width or min(2 * recipe.top_k, experts)
    ids = np.full((tokens, layers, depth, width), -1, expert_dtype(experts))
    scores = np.zeros(ids.shape, np.float16)
    common = rng.standard_normal(logits.shape, np.float32) * np.float32(np.sqrt(recipe.noise_correlation))
    own_share = np.float32(np.sqrt(1 - recipe.noise_correlation))
    early = _per_layer(recipe.early_noise, layers)[:, None]
    for ahead in range(1, depth + 1):
        target = logits[:, ahead:]
        error = common[:, ahead:] + own_share * rng.standard_normal(target.shape, np.float32)
        size = np.float32(recipe.lookahead_noise * (1 + recipe.lookahead_growth * (ahead - 1)))
        foretold = np.float32(recipe.weight_sharpness) * (target + size * early[:-ahead] * error)
        best = _best(foretold, width)
        ids[:, :-ahead, ahead - 1] = best
        scores[:, :-ahead, ahead - 1] = np.take_along_axis(_softmax(foretold), best, -1)
    return {"lookahead_experts": ids, "lookahead_scores": scores}


def _best(values: _Floats, count: int) -> npt.NDArray[np.int64]:
    """Return the places of the `count` largest values of the last axis, largest first."""
    # Finding them before ordering them is 4 times faster than ordering all.
    found = np.sort(np.argpartition(-values, count - 1, axis=-1)[..., :count], axis=-1)
    order = np.argsort(-np.take_along_axis(values, found, -1), axis=-1, kind="stable")
    return np.take_along_axis(found, order, -1)


def _softmax(values: _Floats) -> _Floats:
    powers = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True), np.float32)


def _token_arrays(recipe: Recipe) -> dict[str, Any]:
    """Return request, position, step and phase of all tokens, requests one after another."""
    prefill, decode = recipe.prefill_tokens, recipe.decode_tokens
    each_phase = np.repeat(np.array([PREFILL, DECODE], np.uint8), (prefill, decode))
    # Prefill is the request's step 0, where there is one.
    each_step = np.maximum(np.arange(prefill + decode) - max(prefill - 1, 0), 0)
    first_step = np.arange(recipe.requests)[:, None] * (each_step[-1] + 1)
    return {
        "request": np.repeat(np.arange(recipe.requests, dtype=np.int32), prefill + decode),
        "position": np.tile(np.arange(prefill + decode, dtype=np.int32), recipe.requests),
        "step": (first_step + each_step).ravel().astype(np.int32),
        "phase": np.tile(each_phase, recipe.requests),
    }


def _provenance(recipe: Recipe, seed: int) -> Provenance:
    details = {**dataclasses.asdict(recipe), "seed": seed}
    return Provenance("synthetic", "generated routing, of no model", "foregate traces.synthetic 1", details)
