"""What the router chose: the trace format, a recorder, importers, a generator, statistics and bundled recordings."""

from pathlib import Path

from traces.checks import validate_trace
from traces.errors import InputError
from traces.files import content_hash, load_trace, save_trace
from traces.importers import import_trace, importers
from traces.recorder import RecordOptions, record
from traces.slices import slice_requests, take_tokens
from traces.statistics import TraceStatistics, inspect_trace, render_statistics
from traces.synthetic import CALIBRATED, Recipe, synthesize
from traces.trace import DECODE, PREFILL, ModelSpec, Provenance, Trace

__all__ = [
    "CALIBRATED",
    "DECODE",
    "PREFILL",
    "InputError",
    "ModelSpec",
    "Provenance",
    "Recipe",
    "RecordOptions",
    "Trace",
    "TraceStatistics",
    "bundled",
    "content_hash",
    "import_trace",
    "importers",
    "inspect_trace",
    "load_trace",
    "record",
    "render_statistics",
    "save_trace",
    "slice_requests",
    "synthesize",
    "take_tokens",
    "validate_trace",
]


def bundled() -> dict[str, Path]:
    """Return the recordings that come with the package: their files by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "data").glob("*.safetensors"))}
