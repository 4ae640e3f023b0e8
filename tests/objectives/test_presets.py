"""Named methods, overrides, and every setting or combination that is an error."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from dataclasses import replace as with_fields

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from plain_objective import compositions, pairs_of

import isdaa
from isdaa.objectives import CHOICES, DEFAULTS, FIELDS, PRESETS, Objective, PairLogps, check_settings, resolve
from isdaa.objectives.formulas import describe, one_line

pytestmark = pytest.mark.fast

MITIGATED = [f"{kind}_{loss}" for kind in ("rpo", "chi", "r") for loss in ("dpo", "ipo", "slic")]
RENAMED = {"rpo_dpo": "rpo", "chi_dpo": "chi_po"}
BASES = ["dpo", "ipo", "slic", *(RENAMED.get(name, name) for name in MITIGATED), "cdpo"]
ROW = {"rw": -3.0, "rl": -4.0, "pw": -2.5, "pl": -4.5, "nw": 2, "nl": 3}


def test_the_methods() -> None:
    assert sorted(PRESETS) == sorted([*BASES, *(f"is_{name}" for name in BASES), "wpo"])
    for name, preset in PRESETS.items():
        assert preset.name == name
        assert preset.formula and "\n" not in preset.formula
        assert preset.source and "\n" not in preset.source
        assert Objective(**resolve(name)).formula()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dpo", {}),
        ("ipo", {"loss": "squared"}),
        ("slic", {"loss": "hinge"}),
        ("rpo", {"sft_coefficient": 0.005}),
        ("rpo_ipo", {"loss": "squared", "sft_coefficient": 0.005}),
        ("rpo_slic", {"loss": "hinge", "sft_coefficient": 0.005}),
        ("chi_po", {"implicit_reward": "chi_squared"}),
        ("chi_ipo", {"implicit_reward": "chi_squared", "loss": "squared"}),
        ("chi_slic", {"implicit_reward": "chi_squared", "loss": "hinge"}),
        ("r_dpo", {"length_penalty": 0.01}),
        ("r_ipo", {"loss": "squared", "length_penalty": 0.01}),
        ("r_slic", {"loss": "hinge", "length_penalty": 0.01}),
        ("cdpo", {"label_smoothing": 0.1}),
    ],
)
def test_what_each_method_is(name: str, expected: dict) -> None:
    base = {**DEFAULTS, **expected}
    assert resolve(name) == base
    assert resolve(f"is_{name}") == {**base, "weight": "importance", "clip_eps": 1.0, "clip": "joint"}


def test_wpo_and_overrides() -> None:
    assert resolve("wpo") == {**DEFAULTS, "weight": "wpo"}
    assert resolve("is_dpo", beta=0.01)["beta"] == 0.01
    assert resolve("is_dpo", weight="shuffled", clip_eps=None) == {**DEFAULTS, "weight": "shuffled", "clip_eps": None}
    assert resolve("rpo", sft_coefficient=0.5)["sft_coefficient"] == 0.5


def test_defaults_stand_in_one_place_and_in_the_promised_order() -> None:
    promised = (
        "implicit_reward loss beta weight clip_eps clip normalize length_penalty sft_coefficient label_smoothing "
        "length_normalized max_reward"
    )
    assert [f.name for f in fields(Objective)] == list(DEFAULTS) == list(FIELDS) == promised.split()
    assert vars(Objective()) == dict(DEFAULTS)
    assert all(DEFAULTS[name] in choices for name, choices in CHOICES.items())
    assert vars(PairLogps(*[torch.zeros(1)] * 6))["behaviour_chosen_logps"] is None


def test_what_an_objective_needs() -> None:
    for weight in ("none", "importance", "wpo", "shuffled", "mean"):
        objective = Objective(weight=weight)  # type: ignore[arg-type]
        assert objective.needs_wpo is (weight == "wpo")
        assert objective.needs_batch is (weight in ("shuffled", "mean"))
    assert Objective(weight="importance", normalize="batch").needs_batch


@hypothesis_settings(max_examples=120, deadline=None, derandomize=True)
@given(compositions())
def test_every_free_combination_is_accepted_and_described(s: dict) -> None:
    text = Objective(**s).formula()
    assert check_settings(**s) == s
    assert ("w·ℓ" in text) == (s["weight"] != "none")
    assert ("log π(y_w|x))" in text) == bool(s["sft_coefficient"])
    assert ("exp(clamp(Δ, −88, 20))" in text) == (s["implicit_reward"] == "chi_squared")
    assert ("|y_w| − |y_l|" in text) == bool(s["length_penalty"])
    assert ("divided by |y|" in text) == s["length_normalized"]
    assert ("clamp(" in text.split("\nu = ")[1].split("\n")[0]) == (s["max_reward"] is not None)
    assert ("over the global batch" in text.split("\n", 1)[1]) == (s["weight"] == "mean" or s["normalize"] is not None)


def test_formulas_with_their_numbers() -> None:
    assert Objective(**resolve("is_rpo", beta=0.05)).formula().splitlines() == [
        "loss = w·ℓ + 0.05·0.005·(−log π(y_w|x)), averaged over the pairs of the global batch",
        "ℓ = −log σ(u)",
        "u = 0.05·h",
        "h = r(Δ_w) − r(Δ_l), r(Δ) = Δ",
        "Δ = log π(y|x) − log π_ref(y|x), summed over the tokens of the response (EOS included)",
        "w = exp(min(ρ_w + ρ_l, 2)), ρ = log π(y|x) − log μ(y|x)",
        "μ = the pairs' behaviour policy where they carry its logps, else π_ref",
        "w is constant under differentiation",
    ]
    text = Objective(**resolve("is_chi_po", clip="per_response", clip_eps=0.25, max_reward=5, label_smoothing=0.1)).formula()
    assert "ℓ = −0.9·log σ(u) − 0.1·log σ(−u)" in text
    assert "u = clamp(0.1·h, −10, 10)" in text
    assert "w = exp(min(ρ_w, 0.25) + min(ρ_l, 0.25))" in text
    assert "ℓ = (u/0.01 − 1/(2·0.01))²" in Objective(**resolve("r_ipo", beta=0.01)).formula()
    assert PRESETS["is_ipo"].formula == "w·(Δ_w − Δ_l − 1/(2β))², w = min(π(y_w)π(y_l)/(μ(y_w)μ(y_l)), e^{2ε}), ε = 1"
    assert PRESETS["dpo"].formula == "−log σ(β·(Δ_w − Δ_l))"


@pytest.mark.parametrize("write", [one_line, describe])
@pytest.mark.parametrize("name", ["loss", "implicit_reward", "weight"])
def test_a_choice_without_a_text_does_not_get_the_formula_of_another(write: Callable[[dict], str], name: str) -> None:
    with pytest.raises(KeyError, match=f"{name} 'new' has no formula"):
        write({**DEFAULTS, name: "new"})


ERRORS = [
    ({"label_smoothing": 0.1, "loss": "hinge"}, 'label_smoothing=0.1 needs loss="logistic"'),
    ({"label_smoothing": 0.1, "loss": "squared"}, 'label_smoothing=0.1 needs loss="logistic"'),
    ({"max_reward": 5.0}, 'max_reward=5.0 needs implicit_reward="chi_squared"'),
    ({"normalize": "batch"}, 'normalize="batch" needs a weight'),
    ({"loss": "hinged"}, 'did you mean "hinge"'),
    ({"weight": "importence"}, 'did you mean "importance"'),
    ({"weight": None}, 'did you mean "none"'),
    ({"clip": "per-response"}, 'did you mean "per_response"'),
    ({"implicit_reward": "Chi_Squared"}, 'did you mean "chi_squared"'),
    ({"implicit_reward": ["log_ratio"]}, "implicit_reward must be one of log_ratio, chi_squared"),
    ({"normalize": "no"}, "normalize must be one of null, batch"),
    ({"normalize": True, "weight": "wpo"}, "normalize must be one of null, batch"),
    ({"beta": 0.0}, "beta must be a finite number > 0; got 0.0"),
    ({"beta": -0.1}, "beta must be a finite number > 0"),
    ({"beta": float("nan")}, "beta must be a finite number > 0"),
    ({"beta": float("inf")}, "beta must be a finite number > 0"),
    ({"beta": "0.1"}, "beta must be a finite number > 0; got '0.1'"),
    ({"beta": True}, "beta must be a finite number > 0; got True"),
    ({"beta": None}, "beta must be a finite number > 0; got None"),
    ({"clip_eps": -0.5, "weight": "importance"}, "clip_eps must be a finite number ≥ 0 or null"),
    ({"clip_eps": float("inf"), "weight": "importance"}, "clip_eps must be a finite number ≥ 0 or null"),
    ({"length_penalty": float("nan")}, "length_penalty must be a finite number; got nan"),
    ({"sft_coefficient": -1.0}, "sft_coefficient must be a finite number ≥ 0; got"),
    ({"label_smoothing": -0.1}, "label_smoothing must be a finite number ≥ 0 and ≤ 0.5"),
    ({"label_smoothing": 0.6}, "label_smoothing must be a finite number ≥ 0 and ≤ 0.5"),
    ({"max_reward": 0.0, "implicit_reward": "chi_squared"}, "max_reward must be a finite number > 0 or null"),
    ({"length_normalized": 1}, "length_normalized must be true or false; got 1"),
    ({"length_normalized": "yes"}, "length_normalized must be true or false"),
]


@pytest.mark.parametrize("settings, words", ERRORS, ids=lambda value: str(value))
def test_errors_are_one_clear_line(settings: dict, words: str) -> None:
    for call in (lambda: check_settings(**settings), lambda: Objective(**settings), lambda: resolve("dpo", **settings)):
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method, overrides, words",
    [
        ("is-dpo", {}, 'unknown method "is-dpo" (did you mean "is_dpo"?)'),
        ("DPO", {}, '(did you mean "dpo"?)'),
        ("is_chipo", {}, '(did you mean "is_chi_po"?)'),
        ("zzzzzz", {}, 'unknown method "zzzzzz"; known methods: dpo, ipo'),
        ("dpo", {"bta": 0.1}, 'unknown setting "bta" (did you mean "beta"?)'),
        ("dpo", {"sft_coef": 0.1}, '(did you mean "sft_coefficient"?)'),
        ("slic", {"label_smoothing": 0.1}, "label_smoothing=0.1 needs"),
        ("cdpo", {"loss": "hinge"}, "label_smoothing=0.1 needs"),
        ("dpo", {"max_reward": 1.0}, "max_reward=1.0 needs"),
        ("ipo", {"normalize": "batch"}, "needs a weight"),
    ],
)
def test_resolve_names_what_is_wrong(method: str, overrides: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        resolve(method, **overrides)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_pairs() -> None:
    pairs, objective = pairs_of([ROW] * 2), Objective(**resolve("is_dpo"))
    three, two = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for wrong, words in (
        (with_fields(pairs, reference_chosen_logps=three), r"reference_chosen_logps must have the shape \(2,\)"),
        (with_fields(pairs, policy_rejected_logps=two[:, None]), r"policy_rejected_logps must .* got \(2, 1\)"),
        (with_fields(pairs, chosen_lengths=torch.tensor(3)), r"chosen_lengths must .* got \(\)"),
        (with_fields(pairs, policy_chosen_logps=torch.tensor(1.0)), r"policy_chosen_logps must have shape \(B,\)"),
        (with_fields(pairs, policy_chosen_logps=torch.zeros(0)), r"policy_chosen_logps must have shape \(B,\)"),
        (with_fields(pairs, policy_rejected_logps=torch.ones(2, dtype=torch.long)), "must be floating point"),
        (with_fields(pairs, behaviour_chosen_logps=two), "must be given together"),
        (with_fields(pairs, policy_rejected_wpo=two), "must be given together"),
    ):
        for call in (objective, objective.raw_weights):
            with pytest.raises(ValueError, match=words):
                call(wrong)
    with pytest.raises(ValueError, match=r"weights must have the shape \(2,\)"):
        objective(pairs, weights=three)
    with pytest.raises(ValueError, match="valid must be bool"):
        objective(pairs, valid=two)
    with pytest.raises(ValueError, match='weight="wpo" needs policy_chosen_wpo and policy_rejected_wpo'):
        Objective(weight="wpo")(pairs)


def test_help_needs_no_torch() -> None:
    code = "import sys, isdaa.objectives as o; o.resolve('is_dpo').keys(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_lazy_names() -> None:
    assert isdaa.objectives.Objective is Objective
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        isdaa.objectives.nothing  # noqa: B018
