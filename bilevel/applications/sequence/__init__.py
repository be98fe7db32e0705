"""Sequence models as lower levels, and weak labels cleaned by a few human ones."""

from bilevel.applications.sequence.attentive import (
    Attention,
    AttentiveBiLSTM,
    balanced_weights,
    character_model,
    cross_entropy,
    ensemble,
    posteriors,
    word_model,
)
from bilevel.applications.sequence.bidaf import (
    BiDAF,
    Passage,
    Reading,
    adadelta,
    best_span,
    ensemble_span,
    span_loss,
)
from bilevel.applications.sequence.hierarchical import HierarchicalTransformer, Interview, Relevance
from bilevel.applications.sequence.recurrent import LSTM, parameter_count

__all__ = [
    "LSTM",
    "Attention",
    "AttentiveBiLSTM",
    "BiDAF",
    "HierarchicalTransformer",
    "Interview",
    "Passage",
    "Reading",
    "Relevance",
    "adadelta",
    "balanced_weights",
    "best_span",
    "character_model",
    "cross_entropy",
    "ensemble",
    "ensemble_span",
    "parameter_count",
    "posteriors",
    "span_loss",
    "word_model",
]
