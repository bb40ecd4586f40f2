"""Pictures of results, as PNG files that a person can read: of an evaluation, a sweep, diagnostics, a training run."""

from __future__ import annotations

from f2l_vllm.evaluation.plots.diagnostics import plot_diagnostics
from f2l_vllm.evaluation.plots.efficiency import plot_efficiency
from f2l_vllm.evaluation.plots.scores import plot_scores
from f2l_vllm.evaluation.plots.sweep import plot_sweep
from f2l_vllm.evaluation.plots.training import plot_training

__all__ = ["plot_diagnostics", "plot_efficiency", "plot_scores", "plot_sweep", "plot_training"]
