"""The configuration: its sections, what they must agree on, how files and options become one, what is said of its keys."""

from isdaa.config.keys import allowed, as_written, fields, preset_value
from isdaa.config.load import departures, laid_over, lay_over, layers, load_config, methods_table, parsed, resolved, validate
from isdaa.config.rules import check_run
from isdaa.config.sections import (
    REWARD,
    STAGES,
    AlignConfig,
    Config,
    EvaluationConfig,
    Float,
    GuardConfig,
    Int,
    LabelConfig,
    Location,
    LoraConfig,
    ObjectiveConfig,
    OptimisationConfig,
    Position,
    ScorerConfig,
    Section,
    Seed,
    TokenizationConfig,
)
from isdaa.config.taken_away import TAKEN_AWAY

__all__ = [
    "REWARD", "STAGES", "TAKEN_AWAY", "AlignConfig", "Config", "EvaluationConfig", "Float", "GuardConfig", "Int", "LabelConfig",
    "Location", "LoraConfig", "ObjectiveConfig", "OptimisationConfig", "Position", "ScorerConfig", "Section", "Seed",
    "TokenizationConfig", "allowed", "as_written", "check_run", "departures", "fields", "laid_over", "lay_over", "layers",
    "load_config", "methods_table", "parsed", "preset_value", "resolved", "validate",
]  # fmt: skip
