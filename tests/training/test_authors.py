"""Who wrote the responses: a run says where they are not the reference's own, and nothing where they are."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chains import CHAIN, read_lines, train
from training_helpers import EOS, VOCABULARY, tiny_model, token_rows, trainer_of, with_reference

from isdaa import Objective, PreferenceConfig, preference_trainer
from isdaa.cli import main
from isdaa.data.pairs import Counts
from isdaa.models.packed.forward import prepare
from isdaa.models.sampling.sampling import SamplingSettings, sample
from isdaa.training.trainer.authors import foreign_text, naming_columns
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.reference_logps import measure

PROMPTS = [[3 + i % 30, 5, 7 + i % 11] for i in range(200)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(initializer_range=0.6)


def drawn(model: Any, temperature: float, length: int = 12, count: int = 48) -> TokenisedPairs:
    keys = [f"{i}/{k}" for i in range(count) for k in range(2)]
    settings = SamplingSettings(temperature, max_new_tokens=length)
    found = sample(model, PROMPTS[:count], settings, {EOS}, 0, 1, keys, n=2)
    return TokenisedPairs(
        [{"prompt_ids": PROMPTS[i], "chosen_ids": found[2 * i].ids, "rejected_ids": found[2 * i + 1].ids} for i in range(count)]
    )


def said(model: Any, pairs: TokenisedPairs) -> list[str]:
    return foreign_text(measure(prepare(model), pairs, key={}, cache_dir=None), pairs)


def test_samples_of_the_reference_are_its_own_however_they_are_cut(model: Any) -> None:
    for length in (2, 12):
        assert said(model, drawn(model, 1.0, length)) == []


@pytest.mark.parametrize("length", [1, 3])
def test_pairs_of_equal_responses_that_were_dropped_are_no_sign_of_others(model: Any, length: int) -> None:
    """What a peaked model says twice is what it is surest of: the rest looks less likely than its samples are."""
    sure = copy.deepcopy(model)
    sure.lm_head.weight.data *= 4
    pairs = drawn(sure, 1.0, length, count=len(PROMPTS))
    unequal = [row for row in pairs if row["chosen_ids"].tolist() != row["rejected_ids"].tolist()]
    assert len(unequal) < 0.5 * len(pairs)
    assert said(sure, TokenisedPairs(unequal)) == said(sure, pairs) == []
    assert said(sure, drawn(model, 1.0, length, count=len(PROMPTS))) != []


def test_text_of_others_is_told(model: Any) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"prompt_ids": p} | {n: rng.integers(3, VOCABULARY, 9).tolist() for n in ("chosen_ids", "rejected_ids")} for p in PROMPTS
    ]
    other = tiny_model(seed=9, initializer_range=0.6)
    for pairs in (TokenisedPairs(rows), drawn(other, 1.0), drawn(model, 0.3)):
        (line,) = said(model, pairs)
        assert "not samples of the reference" in line and "isdaa logps" in line and "μ = π_ref" in line
        found, own = re.search(r"probability (\S+) on average, its own would have (\S+) ", line).groups()  # type: ignore[union-attr]
        assert float(found) != float(own)


def test_probabilities_that_are_small_are_told_apart(model: Any) -> None:
    """Random text under a random model: about 1 / vocabulary, which has more zeros than three."""
    pairs = drawn(model, 1.0)
    scored = pairs.scored_lengths()
    (line,) = foreign_text(np.stack([*(-9.0 * scored[:1]), *(-8.0 * scored[1:]), *(4e-4 * scored), *(5e-4 * scored)]), pairs)
    assert "probability 0.0004 on average, its own would have 0.0005" in line


def test_a_named_model_is_told_by_its_name_and_of_the_rows_alone_that_it_was_asked_of(model: Any) -> None:
    pairs = drawn(model, 0.3)
    found = measure(prepare(model), pairs, key={}, cache_dir=None)
    (line,) = foreign_text(found, pairs, "other_model")
    assert "not samples of other_model" in line and "named as μ" in line and "π_ref" not in line
    for count in (len(pairs), len(pairs) - 4):  # rows with logps of their own; the rest are too few
        known = np.where(np.arange(len(pairs)) < count, -9.0, np.nan)
        of_their_own = copy.copy(pairs)
        of_their_own.floats = {"behaviour_chosen_logps": known, "behaviour_rejected_logps": known}
        assert foreign_text(found, of_their_own) == foreign_text(found, of_their_own, "other_model") == []


def test_of_a_few_responses_nothing_is_said(model: Any) -> None:
    assert said(model, drawn(model, 0.3, count=7)) == [] != said(model, drawn(model, 0.3, count=16))


def test_a_head_that_measures_no_probabilities_says_nothing(model: Any) -> None:
    pairs = drawn(model, 0.3)
    found = measure(prepare(model), pairs, key={}, cache_dir=None)
    found[2:] = 0
    assert foreign_text(found, pairs) == []


def test_tokens_that_are_not_scored_take_no_part() -> None:
    pairs = TokenisedPairs([{"prompt_ids": [3], "chosen_ids": [4, ~5, 6], "rejected_ids": [~4, 2]}])
    assert pairs.scored_lengths().tolist() == [[2], [1]]


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ("chosen-model", True), ("rejected_model", True), ("model", True), ("Models", True), ("generator_1", True),
        ("source", False), ("modelling_notes", False), ("remodeled", False), ("score_chosen", False),
    ],
)  # fmt: skip
def test_a_column_that_names_a_model_is_told(column: str, told: bool) -> None:
    lines = naming_columns(Counts(unread=("score", column)))
    assert bool(lines) is told and (not told or (repr(column) in lines[0] and "isdaa logps" in lines[0]))


@pytest.mark.parametrize("known", [False, True])
def test_a_start_far_from_its_reference_is_told(
    known: bool, model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = token_rows(8, **({f"behaviour_{n}_logps": [-40.0] * 8 for n in ("chosen", "rejected")} if known else {}))
    pairs = with_reference(rows, tiny_model(seed=9, initializer_range=0.6))
    for starts, objective, warned in ((False, "importance", not known), (True, "importance", False), (False, "none", False)):
        caplog.clear()
        own = {"starts_at_reference": starts}
        trainer = trainer_of(
            tiny_model(initializer_range=0.6), tmp_path, pairs, objective=Objective(weight=objective), max_steps=1, own=own
        )
        trainer.train()
        assert ("weights are far from 1" in caplog.text) is warned
    torch.manual_seed(0)


def test_the_best_against_the_worst_is_told_where_weights_are_made_of_mu_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the label stage's own run, in a later run on its file, before either, and from Python."""
    monkeypatch.chdir(tmp_path)
    told = "not draws from μ × μ, so importance weights on them are biased"
    label = CHAIN | {"stages": ["sft", "label", "align"], "data.limit": 12, "label.samples": 3, "align.max_steps": 1}
    label |= {"label.pairing": "best_worst", "data.eval_fraction": 0.0, "sft.max_steps": 1}
    assert train("weighted", label) == 0
    assert f"align: warning: 12 pairs are the best against the worst of several samples (pairing: best_worst), {told}" in (
        said := capsys.readouterr().err
    )
    assert "not read: pairing" not in said and said.count("μ × μ") == 1
    assert train("plain", label | {"objective.method": "chi_po"}) == 0
    assert "μ × μ" not in capsys.readouterr().err
    later = {k: v for k, v in CHAIN.items() if k not in ("model.random", "data.sft", "data.prompts")}
    later |= {"stages": ["align"], "model.path": "weighted/sft", "data.pairs": "weighted/pairs/train.jsonl", "align.max_steps": 1}
    for method, weight, biased in (
        ("is_dpo", "preset", True), ("is_chi_po", "preset", True), ("is_ipo", "shuffled", True), ("is_slic", "mean", True),
        ("dpo", "preset", False), ("chi_po", "preset", False), ("wpo", "preset", False),
    ):  # fmt: skip
        given = {"objective.method": method} | ({} if weight == "preset" else {"objective.weight": weight})
        assert train(f"{method}-{weight}", later | given) == 0
        said = capsys.readouterr().err
        assert (told in said) is biased and "not read: pairing" not in said, method
        given |= {"model.path": "weighted/sft", "data.pairs": "weighted/pairs/train.jsonl", "output_dir": "none"}
        assert main(["inspect", "--no_plan", *(f"--{key}={value}" for key, value in given.items())]) == 0
        assert (told in " ".join("".join(capsys.readouterr()).split())) is biased, method
        args = PreferenceConfig("out", method=method, bf16=False, report_to="none", use_cpu=True)
        preference_trainer("weighted/sft", args=args, train_dataset=read_lines(Path("weighted/pairs/train.jsonl")))
        assert (told in capsys.readouterr().err) is biased, method
    # Random pairs are draws, and bear no mark.
    assert train("random", label | {"label.pairing": "random"}) == 0
    assert "μ × μ" not in capsys.readouterr().err
