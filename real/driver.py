"""The version of NVIDIA's driver, told by what comes with it: neither root nor a package is needed."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

_MODULE = Path("/proc/driver/nvidia/version")


def driver_version() -> str | None:
    """Return the driver's version such as ``580.95.05``; None where no driver says it."""
    return _of_library() or _of_kernel_module()


def _of_library() -> str | None:
    """Ask NVML, which containers have too, though they may not see the kernel's files."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return None
        text = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
        failed = nvml.nvmlSystemGetDriverVersion(text, len(text))
        nvml.nvmlShutdown()
    except (OSError, AttributeError):  # no such library, or one without these calls
        return None
    return None if failed else text.value.decode() or None


def _of_kernel_module() -> str | None:
    try:
        found = re.search(r"Module.*?\s([0-9]+\.[0-9.]+)\s", _MODULE.read_text())
    except OSError:
        return None
    return found.group(1) if found else None
