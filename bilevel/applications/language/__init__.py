"""Language models as lower levels, and the weights of the sources of text that they are trained on."""

from bilevel.applications.language.corpora import brown, documentation, folder, newsgroups, reuters
from bilevel.applications.language.entropy import chunked_entropy
from bilevel.applications.language.routes import implicit, one_step, penalty, whole_run
from bilevel.applications.language.sources import Sources, sources
from bilevel.applications.language.tokens import Bytes, Words, corrupted, sequences
from bilevel.applications.language.transformer import GPT2, Transformer

__all__ = [
    "GPT2", "Bytes", "Sources", "Transformer", "Words", "brown", "chunked_entropy", "corrupted", "documentation",
    "folder", "implicit", "newsgroups", "one_step", "penalty", "reuters", "sequences", "sources", "whole_run",
]  # fmt: skip
