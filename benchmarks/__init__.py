"""Measurements of the project itself."""

import real  # noqa: F401  # which says an interrupt of a command in a word
