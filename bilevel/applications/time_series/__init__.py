"""Time series by population-aware diffusion (PaD-TS): the network, its losses and scores, and the weights learnt."""

from bilevel.applications.time_series.denoiser import DEAD, PUBLISHED, Denoiser
from bilevel.applications.time_series.diffusion import Schedule
from bilevel.applications.time_series.population import (
    EVALUATION,
    TRAINING,
    cross_correlations,
    discriminative,
    fdds,
    mmd,
    pairs,
    predictive,
    vds,
)
from bilevel.applications.time_series.problem import Population, population
from bilevel.applications.time_series.windows import TimeSplit, filled, sines_windows, split_in_time, windows

__all__ = [
    "DEAD", "EVALUATION", "PUBLISHED", "TRAINING", "Denoiser", "Population", "Schedule", "TimeSplit",
    "cross_correlations", "discriminative", "fdds", "filled", "mmd", "pairs", "population", "predictive",
    "sines_windows", "split_in_time", "vds", "windows",
]  # fmt: skip
