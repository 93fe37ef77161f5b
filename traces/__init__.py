"""What the router chose: the trace format, a recorder, importers, a generator, statistics and bundled recordings."""

from pathlib import Path

from traces.checks import validate_trace
from traces.errors import InputError
from traces.evidence import Evidence, find_evidence, render_evidence, shuffled
from traces.files import content_hash, load_trace, save_trace
from traces.importers import import_trace, importers
from traces.recorder import RecordOptions, record
from traces.slices import first_tokens, join_requests, one_after_another, slice_requests, split_requests, take_tokens
from traces.statistics import TraceStatistics, inspect_trace, render_statistics
from traces.synthetic import CALIBRATED, Recipe, synthesize
from traces.trace import DECODE, PREFILL, ModelSpec, Provenance, Trace

__all__ = [
    "CALIBRATED",
    "DECODE",
    "PREFILL",
    "Evidence",
    "InputError",
    "ModelSpec",
    "Provenance",
    "Recipe",
    "RecordOptions",
    "Trace",
    "TraceStatistics",
    "bundled",
    "content_hash",
    "find_evidence",
    "first_tokens",
    "import_trace",
    "importers",
    "inspect_trace",
    "join_requests",
    "load_trace",
    "one_after_another",
    "record",
    "render_evidence",
    "render_statistics",
    "save_trace",
    "shuffled",
    "slice_requests",
    "split_requests",
    "synthesize",
    "take_tokens",
    "validate_trace",
]


def bundled() -> dict[str, Path]:
    """Return the recordings that come with the package: their files by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "data").glob("*.safetensors"))}
