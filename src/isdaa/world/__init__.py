"""The embedded world: a controlled over-optimisation experiment small enough for two CPU cores.

Posts with known facts, summaries of varying quality, and a gold judge that knows the facts.
"""

from isdaa.world.grammar import SPLITS, make_posts
from isdaa.world.lexicon import PROMPT_END, SIZES
from isdaa.world.reward import Verdict, explain, gold_reward
from isdaa.world.tokenizer import build_tokenizer, model_config

__all__ = [
    "PROMPT_END",
    "SIZES",
    "SPLITS",
    "Verdict",
    "build_tokenizer",
    "explain",
    "gold_reward",
    "make_posts",
    "model_config",
]
