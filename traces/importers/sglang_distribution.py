"""SGLang's expert distribution recorder in the mode ``per_token``: one .pt file of one rank.

A server started with ``--expert-distribution-recorder-mode per_token`` writes, on a request to
``/dump_expert_distribution_record``, a file ``expert_distribution_recorder_TIME_RANK.pt`` (SGLang
python/sglang/srt/eplb/expert_distribution.py): ``records``, one for each forward pass, and
``last_physical_to_logical_map`` [layers, physical experts]. A record has ``input_ids`` and ``positions`` [tokens],
``extend_seq_lens`` (tokens of each request of a prompt pass), ``forward_mode`` (1 extend, that is prompt; 2 decode),
``topk_ids_of_layer`` [layers, tokens, 8] int32, physical ids with -1 where there is none, and in some versions ``rids``,
the request of each sequence. Physical ids are mapped to logical ones; columns and layers that are -1 throughout are
left out (k below 8; dense layers), and the provenance says which layers are left. Forward passes are steps as recorded.

The file is a PyTorch file: reading it needs torch (``pip install 'foregate[real]'``) and is done with ``weights_only``, so
that nothing in it is run.

Cannot be known: gate weights; the order of a token's experts; whether the mapping changed while recording (the file
has the last one only); what other ranks routed; and, without ``rids``, which passes belong to one request: every stretch
of tokens that a pass shows together is then a request of its own. Mixed passes (forward_mode 3) and those of speculative
decoding are refused: they do not say which tokens are prompt.
"""

from __future__ import annotations

import importlib
import struct
import zipfile
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.checks import MOST_EXPERTS
from traces.errors import InputError
from traces.importers._source import LAST_POSITION, MAX_BYTES, as_ids, check_file, imported, whole
from traces.trace import DECODE, PREFILL, Array, ModelSpec, Trace

_PHASES = {1: PREFILL, 2: DECODE}
_IDLE = 4
"""forward_mode of a pass without tokens: with data parallelism a rank may have nothing to do."""

_UNKNOWN = (
    "gate weights",
    "order of a token's experts",
    "whether the mapping of experts changed while recording",
    "what other ranks routed",
    "name of the model",
)


def read(path: Path, *, model_name: str | None = None, max_bytes: int = MAX_BYTES) -> Trace:
    """Return the routing of the dump at `path`; the module's docstring describes the format.

    `model_name` is the model's name, otherwise the file's. `max_bytes` limits the file.

    Raises `InputError` when torch is missing, and when the file is damaged, hostile, incomplete or inconsistent.
    """
    dump = _load(path, max_bytes)
    records = _records(path, dump)
    _check_unfolded(path, [dump.get("last_physical_to_logical_map"), *(one.get("topk_ids_of_layer") for one in records)])
    logical = _array(path, "last_physical_to_logical_map", dump.get("last_physical_to_logical_map"), 2)
    experts = _count_experts(path, logical)
    passes = [_read_pass(path, f"records[{index}]", record, logical) for index, record in enumerate(records)]
    passes = [one for one in passes if len(one.ids)]
    if not passes:
        raise InputError(f"{path}: no pass has tokens; at least one must")
    lengths = [len(one.ids) for one in passes]
    ids, layers = _without_padding(path, np.concatenate([one.ids for one in passes]))
    number: dict[Hashable, int] = {}
    request = [number.setdefault(name, len(number)) for one in passes for name in one.requests]
    unknown = [*_UNKNOWN, *(() if all(one.named for one in passes) else ("which passes belong to one request",))]
    return Trace(
        model=ModelSpec(model_name or path.stem, layers=ids.shape[1], experts=experts, top_k=ids.shape[2]),
        provenance=imported(path, __name__, unknown, {"model_name": model_name}, layers_with_experts=layers),
        domains=("",) * len(number),
        experts=as_ids(path, "topk_ids_of_layer", ids, experts),
        request=np.array(request, np.int32),
        position=np.concatenate([one.positions for one in passes]).astype(np.int32),
        step=np.repeat(np.arange(len(passes), dtype=np.int32), lengths),
        phase=np.repeat(np.array([one.phase for one in passes], np.uint8), lengths),
        token_ids=np.concatenate([one.token_ids for one in passes]).astype(np.int32),
        ranked=False,
    )


@dataclass(frozen=True)
class _Pass:
    """One forward pass."""

    ids: Array
    """[n, layers, 8] logical ids, -1 for none."""
    positions: Array
    token_ids: Array
    phase: int
    requests: list[Hashable]
    """[n] what tells the token's request from others."""
    named: bool
    """Whether `requests` are the file's own names."""


def _load(path: Path, max_bytes: int) -> Mapping[str, Any]:
    """Return what the PyTorch file holds: tensors, numbers, texts, lists and dictionaries only."""
    _check_archive(path, max_bytes)
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise InputError(f"{path}: a .pt file needs torch, which is not installed: pip install 'foregate[real]'") from None
    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, and explains at length what it refuses to run
        reason = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise InputError(f"{path}: this file is damaged or holds more than tensors and plain values ({reason})") from None
    if not isinstance(dump, dict):
        raise InputError(f"{path}: it holds {type(dump).__name__}; the recorder writes a dictionary with 'records'")
    return dump


def _check_archive(path: Path, max_bytes: int) -> None:
    """Refuse what is no plain .pt archive: bare pickles, compressed entries, and claims beyond the limit."""
    check_file(path, max_bytes)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, struct.error) as error:
        raise InputError(f"{path}: this is no whole .pt archive ({error}); it may be truncated or another format") from None
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{path}: '{entry.filename}' is compressed, which torch.save never does; save the dump again")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise InputError(f"{path}: its entries claim more bytes than the file has; it is damaged")


def _records(path: Path, dump: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    records = dump.get("records")
    if not isinstance(records, list) or not records:
        raise InputError(f"{path}: records is {records!r:.80}; it must be a list with at least one forward pass")
    for index, record in enumerate(records):
        if not isinstance(record, dict) or "topk_ids_of_layer" not in record:
            raise InputError(f"{path}: records[{index}] has no topk_ids_of_layer; the recorder's mode must be per_token")
    return records


def _check_unfolded(path: Path, tensors: Sequence[Any]) -> None:
    """Refuse views that pose as more than is there: the recorder saves every tensor whole."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if hasattr(tensor, "element_size"))
    if claimed > path.stat().st_size:
        raise InputError(f"{path}: its tensors claim {claimed:,} bytes, the file has {path.stat().st_size:,}; it is damaged")


def _array(path: Path, field: str, tensor: Any, axes: int) -> Array:
    """Return the tensor's whole numbers as int64."""
    try:
        found: Array = tensor.numpy()
    except (AttributeError, TypeError, RuntimeError):
        raise InputError(f"{path}: {field} is {type(tensor).__name__}; it must be a dense tensor of whole numbers") from None
    if found.dtype.kind not in "iu" or found.ndim != axes:
        raise InputError(
            f"{path}: {field} is {found.dtype} of shape {list(found.shape)}; it must be whole numbers with {axes} axes"
        )
    return found.astype(np.int64)


def _count_experts(path: Path, logical: Array) -> int:
    """Return the number of logical experts: every one has a physical copy in every layer."""
    if logical.size == 0 or logical.min() < 0 or logical.max() >= MOST_EXPERTS:
        raise InputError(f"{path}: last_physical_to_logical_map must hold experts, 0 to at most {MOST_EXPERTS - 1}")
    experts = int(logical.max()) + 1
    for layer, row in enumerate(logical):
        if len(np.unique(row)) != experts:
            raise InputError(
                f"{path}: last_physical_to_logical_map[{layer}] names {len(np.unique(row))} of {experts} experts; each must"
                " have a physical copy"
            )
    return experts


def _read_pass(path: Path, where: str, record: Mapping[str, Any], logical: Array) -> _Pass:
    physical = _array(path, f"{where}.topk_ids_of_layer", record["topk_ids_of_layer"], 3)
    layers, tokens, _ = physical.shape
    if layers != len(logical):
        raise InputError(
            f"{path}: {where}.topk_ids_of_layer has {layers} layers; last_physical_to_logical_map has {len(logical)}"
        )
    mode = whole(path, f"{where}.forward_mode", record.get("forward_mode"))
    if mode not in _PHASES and not (mode == _IDLE and tokens == 0):
        raise InputError(f"{path}: {where}.forward_mode is {mode}; it must be 1 (extend) or 2 (decode)")
    phase = _PHASES.get(mode, DECODE)
    lengths = _lengths(path, where, record, tokens) if phase == PREFILL else [1] * tokens
    names = record.get("rids")
    if names is not None and (not isinstance(names, list) or len(names) != len(lengths)):
        raise InputError(f"{path}: {where}.rids must be a list that names each of {len(lengths)} sequences")
    sequences: list[Hashable] = [(where, i) for i in range(len(lengths))] if names is None else [str(name) for name in names]
    return _Pass(
        ids=_logical(path, where, physical, logical),
        positions=_numbers(path, f"{where}.positions", record.get("positions"), tokens),
        token_ids=_numbers(path, f"{where}.input_ids", record.get("input_ids"), tokens),
        phase=phase,
        requests=[name for name, length in zip(sequences, lengths, strict=True) for _ in range(length)],
        named=names is not None,
    )


def _lengths(path: Path, where: str, record: Mapping[str, Any], tokens: int) -> list[int]:
    """Return how many of a prompt pass's tokens each sequence has."""
    found = record.get("extend_seq_lens")
    if not isinstance(found, list):
        raise InputError(f"{path}: {where}.extend_seq_lens is {found!r:.80}; it must be a list of whole numbers")
    lengths = [whole(path, f"{where}.extend_seq_lens", length, most=tokens) for length in found]
    if sum(lengths) != tokens:
        raise InputError(f"{path}: {where}.extend_seq_lens add up to {sum(lengths)}; topk_ids_of_layer has {tokens} tokens")
    return lengths


def _numbers(path: Path, field: str, found: Any, count: int) -> Array:
    """Return a list of `count` whole numbers as an array."""
    if not isinstance(found, list) or len(found) != count:
        raise InputError(f"{path}: {field} must be a list of {count} whole numbers, one for each token")
    return np.array([whole(path, field, value, most=LAST_POSITION) for value in found], np.int64)


def _logical(path: Path, where: str, physical: Array, logical: Array) -> Array:
    """Return [tokens, layers, K] logical ids of [layers, tokens, K] physical ones; -1 stays."""
    wrong = (physical < -1) | (physical >= logical.shape[1])
    if wrong.any():
        raise InputError(
            f"{path}: {where}.topk_ids_of_layer holds {physical[wrong][0]}; a physical expert is 0 to {logical.shape[1] - 1}"
            " (record with --disable-shared-experts-fusion)"
        )
    rows = np.arange(len(logical))[:, None, None]
    found: Array = np.where(physical >= 0, logical[rows, np.maximum(physical, 0)], -1).transpose(1, 0, 2)
    return found


def _without_padding(path: Path, ids: Array) -> tuple[Array, Sequence[int]]:
    """Return `ids` without the layers and the ranks that are -1 throughout, and which layers are left."""
    there = ids >= 0
    layers, ranks = there.any(axis=(0, 2)), there.any(axis=(0, 1))
    if not there.any():
        raise InputError(f"{path}: topk_ids_of_layer holds no expert; at least one token must be routed")
    return ids[:, layers][:, :, ranks], np.flatnonzero(layers).tolist()
