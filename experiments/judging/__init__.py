"""How good are the stories that a model writes? Beginnings, what models write after them, and two kinds of judges."""

from experiments.judging.base import Judge, Story, mean_and_bootstrap
from experiments.judging.grammar_judge import GrammarJudge
from experiments.judging.language_model import Endpoint, Estimate, LanguageModelJudge
from experiments.judging.references import MIXED_SENTENCES, OWN_ENDINGS, SHUFFLED_WORDS, references
from experiments.judging.text_judge import TextJudge
from experiments.judging.writers import Material, Written, written_by_runs, written_references
from experiments.judging.writing import MAX_TOKENS, continue_texts, documents_of, text_of

__all__ = [
    "MAX_TOKENS",
    "MIXED_SENTENCES",
    "OWN_ENDINGS",
    "SHUFFLED_WORDS",
    "Endpoint",
    "Estimate",
    "GrammarJudge",
    "Judge",
    "LanguageModelJudge",
    "Material",
    "Story",
    "TextJudge",
    "Written",
    "continue_texts",
    "documents_of",
    "mean_and_bootstrap",
    "references",
    "text_of",
    "written_by_runs",
    "written_references",
]
