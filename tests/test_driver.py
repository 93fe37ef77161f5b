"""The driver's version: from its library, else from the kernel's file, else unknown."""

import ctypes

import pytest

from real import driver

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 12.3\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@host)\n"


class Nvml:
    """A library that answers as NVML does: 0 is success, and the version ends with a zero byte."""

    def __init__(self, failing=""):
        self.failing, self.open = failing, 0

    def nvmlInit_v2(self):  # noqa: N802
        self.open += self.failing != "init"
        return int(self.failing == "init")

    def nvmlSystemGetDriverVersion(self, text, size):  # noqa: N802
        assert size >= 80
        text.value = b"580.95.05"
        return int(self.failing == "version")

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "_MODULE", tmp_path / "version")
    return tmp_path / "version"


def load(monkeypatch, library):
    def find(name):
        assert name == "libnvidia-ml.so.1"
        if library is None:
            raise OSError("no such library")
        return library

    monkeypatch.setattr(ctypes, "CDLL", find)


def test_the_library_says_it_and_is_left_again(monkeypatch, module):
    nvml = Nvml()
    load(monkeypatch, nvml)
    assert driver.driver_version() == "580.95.05"
    assert nvml.open == 0


@pytest.mark.parametrize("library", [None, object(), Nvml("init"), Nvml("version")])
def test_where_the_library_does_not_the_kernel_may(monkeypatch, module, library):
    load(monkeypatch, library)
    assert driver.driver_version() is None
    module.write_text(CLOSED)
    assert driver.driver_version() == "535.104.05"
    module.write_text(OPEN)
    assert driver.driver_version() == "580.95.05"
    module.write_text("another text")
    assert driver.driver_version() is None
    assert getattr(library, "open", 0) == 0
