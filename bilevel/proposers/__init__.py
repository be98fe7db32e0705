"""Upper levels without gradients: proposers for `bilevel.search`, and the closed grammar that their laws are read in.

A proposer has two methods, `ask(history, count, key)` and `tell(results)`; a class of one's own with these works.
What a
proposer says is parsed, bounded and interpreted, and never executed.
"""

from bilevel.proposers.evolution import GrammarProposer
from bilevel.proposers.expressions import Expression, Grammar, GrammarError, Parameter, Refused, finite
from bilevel.proposers.language_model import LLMProposer
from bilevel.proposers.optuna import OptunaProposer
from bilevel.proposers.registers import Program, assemble, assemble_terms, execute
from bilevel.proposers.replay import ReplayProposer
from bilevel.proposers.trials import Proposer, Trial

__all__ = [
    "Expression", "Grammar", "GrammarError", "GrammarProposer", "LLMProposer", "OptunaProposer", "Parameter", "Program",
    "Proposer", "Refused", "ReplayProposer", "Trial", "assemble", "assemble_terms", "execute", "finite",
]  # fmt: skip
