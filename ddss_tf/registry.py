"""Imports every module whose names gin may bind.

The roots, one for each mode, are `search`, `evaluate`, `compare`, `sample`,
`export`, `inspect` and `report`; `make_strategy` is bound for all of them.
"""

from ddss_tf.datasets.load import load_dataset
from ddss_tf.denoisers.clocks import on_schedule
from ddss_tf.denoisers.gaussian import gaussian_denoiser
from ddss_tf.distribution import make_strategy
from ddss_tf.evaluation.compare import compare
from ddss_tf.evaluation.evaluate import evaluate
from ddss_tf.exporting.export import export
from ddss_tf.exporting.sample import sample
from ddss_tf.features.load import load_features
from ddss_tf.formats.load import load_denoiser
from ddss_tf.reporting.inspection import inspect
from ddss_tf.reporting.report import report
from ddss_tf.samplers.families import make_sampler
from ddss_tf.schedules import make_schedule
from ddss_tf.searching.search import search

__all__ = [
    "compare", "evaluate", "export", "gaussian_denoiser", "inspect",
    "load_dataset", "load_denoiser", "load_features", "make_sampler",
    "make_schedule", "make_strategy", "on_schedule", "report", "sample", "search",
]
