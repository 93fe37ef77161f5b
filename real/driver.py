"""The GPU, if there is one, and the version of NVIDIA's driver, told by what comes with it: neither root nor a package is
needed.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from traces.errors import InputError

_MODULE = Path("/proc/driver/nvidia/version")

STAND_IN = "stand-in on a CPU"
"""What results call the device where there is none."""


def check_gpu(where: str, instead: str = "--where cpu") -> None:
    """Raise InputError where `where` is ``cuda`` and torch finds no GPU; `instead` is what does without one."""
    import torch

    if where == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"there is no GPU that torch can use; {instead} runs the same code on a stand-in, which times nothing"
        )


def device_name(where: str) -> str:
    """Return what results call the device at `where` (``cuda`` or ``cpu``)."""
    import torch

    return STAND_IN if where == "cpu" else str(torch.cuda.get_device_name())


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
