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
from bilevel.applications.sequence.loaders import (
    Question,
    RuleScores,
    Snippets,
    Tweets,
    rule_scores,
    semeval_irony,
    snippets,
    squad,
)
from bilevel.applications.sequence.reading import Questions, cloze, encode_questions, exact_match, f1, normalise_answer
from bilevel.applications.sequence.recurrent import LSTM, parameter_count
from bilevel.applications.sequence.texts import (
    NGrams,
    Vocabulary,
    encode_characters,
    linear_classifier,
    tokenise,
    wordllama_table,
)
from bilevel.applications.sequence.weak import (
    WeakLabels,
    Weighted,
    auc,
    by_document,
    in_documents,
    inherited_labels,
    one_hot,
    weak_labels,
    weighted,
)

__all__ = [
    "LSTM", "Attention", "AttentiveBiLSTM", "BiDAF", "HierarchicalTransformer", "Interview", "NGrams", "Passage",
    "Question", "Questions", "Reading", "Relevance", "RuleScores", "Snippets", "Tweets", "Vocabulary", "WeakLabels",
    "Weighted", "adadelta", "auc", "balanced_weights", "best_span", "by_document", "character_model", "cloze",
    "cross_entropy", "encode_characters", "encode_questions", "ensemble", "ensemble_span", "exact_match", "f1",
    "in_documents", "inherited_labels", "linear_classifier", "normalise_answer", "one_hot", "parameter_count",
    "posteriors", "rule_scores", "semeval_irony", "snippets", "span_loss", "squad", "tokenise", "weak_labels",
    "weighted", "word_model", "wordllama_table",
]  # fmt: skip
