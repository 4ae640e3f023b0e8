"""The table that is printed: readable at 80 columns, plain where there is no terminal."""

import io

import pytest
from hostile import ESCAPED, NAME, harmless, unwrapped

from isdaa.evaluation.table import fine, legend, percent, pm, print_table, short, unmoved

pytestmark = pytest.mark.fast


def interval(mean: float, half: float) -> dict:
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 384}


def metrics(scorer: str | None = "gold") -> dict:
    def model(label: str, method: str, step: int, kl: float, rate: float) -> dict:
        held_out = {name: interval(-12.5, 1.0) for name in ("accuracy", "margin", "chosen_drift", "rejected_drift")}
        return {
            "label": label,
            "method": method,
            "beta": 0.01,
            "seed": 1,
            "step": step,
            "kl": interval(kl, 0.15),
            "win_rate": interval(rate, 0.04) if scorer else None,
            "reward": interval(2.13, 0.1) if scorer else None,
            "length": interval(17.2, 0.4),
            "truncated": 0.034,
            "weight_mean": 0.713,
            "ess": 0.134,
            "held_out": held_out,
        }

    models = [
        model("dpo/checkpoint-297", "dpo", 297, 11.13, 0.423),
        model("is_dpo/checkpoint-150", "is_dpo", 150, 1.1, 0.712),
        model("is_dpo/model", "is_dpo", 297, 1.24, 0.721),
    ]
    reference = {key: interval(0.5, 0.0) for key in ("kl", "win_rate", "reward", "length")} | {"truncated": 0.0}
    settings = {"confidence": 0.95, "temperature": 1.0, "top_p": 1.0}
    named = {"name": scorer, "digest": "x"} if scorer else None
    note = "" if scorer else "No scorer, no verdict."
    return {
        "models": models, "reference": reference, "settings": settings, "prompts": 384, "scorer": named,
        "opponent": "reference", "note": note,
    }  # fmt: skip


def printed(**options) -> str:
    stream = io.StringIO()
    print_table(metrics(options.pop("scorer", "gold")), file=stream, **options)
    return stream.getvalue()


def test_fits_80_columns_and_says_everything():
    text = printed(width=80)
    assert max(map(len, text.splitlines())) <= 80
    lines = [line for line in text.splitlines() if "is_dpo/model" in line]
    assert len(lines) == 1
    for value in ("1.24 ± 0.15", "0.721 ± 0.040", "0.713", "0.13", "3 %", "17.2"):
        assert value in lines[0]
    assert "is_dpo/150" in text and "dpo/297" in text
    assert "384 held-out prompts" in text and "95 %" in text and "gold" in text


def test_plain_without_a_terminal():
    text = printed()
    assert "\x1b" not in text and max(map(len, text.splitlines())) <= 100
    assert not set(text) & set("─━│┃")


def test_without_a_scorer_there_are_drift_and_accuracy_instead():
    text = printed(scorer=None, width=80)
    assert "win rate" not in text and "accuracy" in text and "drift chosen" in text
    assert max(map(len, text.splitlines())) <= 80
    assert "no verdict" in text


def test_parts():
    assert pm(interval(0.5, 0.25), 2) == "0.50 ± 0.25"
    assert pm({"mean": 0.5, "low": None, "high": None}, 2) == "0.50" == pm(interval(0.5, 0), 2)
    assert pm(None, 2) == ""
    assert [percent(x) for x in (0, 0.001, 0.034, 1)] == ["0 %", "<1 %", "3 %", "100 %"]
    assert [short(x) for x in ("dpo/checkpoint-3", "dpo/model", "model", "a/b")] == ["dpo/3", "dpo/model", "model", "a/b"]


def test_small_figures_keep_their_digits():
    """1e-5 and 0.004 both stood as 0.00."""
    assert fine(interval(1.2e-5, 3e-6), 2) == "1.2e-05 ± 3e-06" and fine(interval(0.0042, 0.001), 2) == "0.0042 ± 0.001"
    assert fine(interval(0.0042, 0.001), 1, bare=True) == "0.0042" and fine(interval(-0.003, 0), 1, bare=True) == "-0.003"
    assert fine(interval(1.24, 0.15), 2) == "1.24 ± 0.15" and fine(interval(0.0, 0), 2) == "0.00" and fine(None, 2) == ""
    assert fine(interval(-3.14, 0.1), 1, bare=True) == "-3.1" and fine(interval(0.01, 0.001), 2) == "0.01 ± 0.00"


def test_a_run_that_has_hardly_moved_is_told_so():
    found = metrics()
    assert not any("hardly changed" in line for line in legend(found)), "it has moved"
    for model in found["models"]:
        model["kl"] = interval(1e-5, 2e-6)
    (line,) = [line for line in legend(found) if "hardly changed" in line]
    assert "at a KL of 1e-05 or less a win rate differs by 0.002 or less" in line and "larger learning rate" in line
    found["models"][0]["kl"] = interval(0.01, 2e-6)
    assert unmoved(found["models"]) is None, "one has moved"
    assert unmoved([]) is None and unmoved([{"kl": {}}]) is None
    assert unmoved([{"kl": {"mean": 1e-5, "low": None, "high": None}}]) is not None
    assert unmoved([{"kl": {"mean": 1e-5, "low": 0.0, "high": 0.5}}]) is None, "it may have moved"


def test_a_judge_that_contradicts_itself_is_told_once():
    flips = "contradicts itself on 75 % of 40 comparisons when their order is swapped"
    scorer = {"name": "judge", "digest": "x", "about": ["asked in both orders", flips]}
    found = metrics() | {"scorer": scorer}
    assert sum("contradicts itself" in line for line in legend(found)) == 1
    note = "The judge contradicts itself on 75 % of 40 comparisons when their order is swapped."
    told = [line for line in legend(found | {"judged": {"notes": [note]}}) if "contradicts itself" in line]
    assert told == [note]


def test_the_legend_counts_and_says_what_intervals_are_over():
    assert legend(metrics() | {"prompts": 1})[0].startswith("1 held-out prompt;")
    assert any("held-out pairs" in line for line in legend(metrics(scorer=None)))


def test_a_hostile_name_is_text():
    stream, found = io.StringIO(), metrics()
    found["models"][0]["label"] = NAME
    found |= {"no_verdict": {"dpo": NAME}, "scorer": {"name": NAME, "digest": "x"}}
    print_table(found, file=stream)
    harmless(stream.getvalue())
    assert unwrapped(stream.getvalue()).count(unwrapped(ESCAPED)) == 3


def test_win_rates_of_fragments_are_marked_and_it_says_what_to_type():
    found = metrics()
    found["settings"]["max_new_tokens"] = 64
    found["models"][0]["truncated"] = 0.5
    stream = io.StringIO()
    print_table(found, file=stream, width=80)
    text = stream.getvalue()
    assert "0.423 ± 0.040 !" in text and "0.721 ± 0.040 !" not in text and max(map(len, text.splitlines())) <= 80
    (line,) = [line for line in legend(found) if line.startswith("!")]
    assert "cut 3 to 50 % of the checkpoints' responses" in line and "--evaluation.max_new_tokens 128" in line
    found["reference"]["truncated"] = 0.2  # the opponent's: then every comparison has a fragment in it, now and then
    stream = io.StringIO()
    print_table(found, file=stream, width=80)
    assert stream.getvalue().count(" !") == 4
    assert not [line for line in legend(metrics()) if line.startswith("!")]


def test_columns_that_nobody_has_a_value_for_are_left_out():
    found = metrics(scorer=None)
    for model in found["models"]:
        model |= {"weight_mean": None, "ess": None, "held_out": None}
        del model["held_out"]
    stream = io.StringIO()
    print_table(found, file=stream)
    head = next(line for line in stream.getvalue().splitlines() if "KL (nats)" in line)
    assert "length" in head and not any(name in head for name in ("weight", "ESS", "accuracy", "drift", "rejected", "win rate"))


def test_where_there_is_no_verdict_it_still_says_that_none_is_better():
    why = {"dpo": "No verdict: 1 checkpoint only."}
    told = legend(metrics() | {"verdicts": {"dpo": None}, "better": {"dpo": False}, "no_verdict": why})
    assert told[-2:] == ["No checkpoint is shown to be better than the reference (95 %).", "No verdict: 1 checkpoint only."]
    told = legend(metrics() | {"verdicts": {"a": None, "b": {"sentence": "S."}}, "better": {"a": False, "b": True}})
    assert told[-2:] == ["b: S.", "a: No checkpoint is shown to be better than the reference (95 %)."]


def test_runs_without_a_verdict_say_why_once():
    why = dict.fromkeys(("dpo", "ipo"), "No verdict: 1 checkpoint only.") | {"simpo": None}
    told = legend(metrics() | {"verdicts": {"dpo": None, "ipo": None, "simpo": {"sentence": "Fine."}}, "no_verdict": why})
    assert told[-2:] == ["simpo: Fine.", "dpo; ipo: No verdict: 1 checkpoint only."]
    # Without a scorer the note says all.
    assert legend(metrics(scorer=None) | {"verdicts": {"dpo": None}, "no_verdict": why})[-1] == "No scorer, no verdict."
