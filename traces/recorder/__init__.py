"""Recording what the routers of a real model choose while it runs.

Needs torch and transformers, which are imported when a recording begins and not before.
"""

from traces.recorder.options import RecordOptions
from traces.recorder.prompts import Prompt, read_prompts
from traces.recorder.recording import record

__all__ = ["Prompt", "RecordOptions", "read_prompts", "record"]
