"""Figures of stored results, by name, as PNG, PDF or SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sim.figures.agreement import agreement_figure
from sim.figures.bars import ranking_figure, time_figure, traffic_figure
from sim.figures.crossover import crossover_figure
from sim.figures.host import host_figure
from sim.figures.lines import budget_figure, miss_figure, prediction_figure

__all__ = [
    "FIGURES",
    "agreement_figure",
    "budget_figure",
    "crossover_figure",
    "host_figure",
    "miss_figure",
    "prediction_figure",
    "ranking_figure",
    "time_figure",
    "traffic_figure",
]

FIGURES: dict[str, Callable[..., Path]] = {
    "ranking": ranking_figure,
    "budget_curve": budget_figure,
    "time_breakdown": time_figure,
    "traffic": traffic_figure,
    "crossover": crossover_figure,
    "miss_curve": miss_figure,
    "prediction_by_layer": prediction_figure,
}
"""Figures of stored rows by name: functions of (rows, *paths)."""
