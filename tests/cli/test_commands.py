"""`isdaa evaluate`, `isdaa benchmark`, `isdaa tax`: each takes what has effect there; what was typed before still works."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from chains import refused

from isdaa.cli import main
from isdaa.cli.main import COMMANDS

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    """What the commands are called with; none of them does anything."""
    found: list[Namespace] = []
    for name in ("evaluate", "benchmark", "tax"):
        monkeypatch.setattr(f"isdaa.cli.{name}.run", found.append)
    return found


FORMER = [
    ("--model_path a --benchmark mt_bench --limit 3", "benchmark mt_bench --model_path a --limit 3"),
    ("--benchmark=hh --judge gold --model_path a b", "benchmark hh --judge gold --model_path a b"),
    ("--benchmark alpaca_eval --judge_temperature -1 --answers f", "benchmark alpaca_eval --judge_temperature -1 --answers f"),
    ("--model_path a --tax", "tax --model_path a"),
    ("--model_path a --tax gsm8k mmlu --tax-limit 5", "tax gsm8k mmlu --model_path a --limit 5"),
    (
        "--tax gsm8k --tax_shots gsm8k=8 mmlu=0 --tax-include-path=d --model_path a",
        "tax gsm8k --shots gsm8k=8 mmlu=0 --include_path=d --model_path a",
    ),
    (
        "--tax --tax_batch_size auto --tax_chat_template --model_path 'a b' --reference tax",
        "tax --batch_size auto --chat_template --model_path 'a b' --reference tax",
    ),
]


@pytest.mark.parametrize(("former", "now"), FORMER)
def test_what_was_typed_before_does_the_same_and_says_what_to_type(
    former: str, now: str, called: list[Namespace], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(shlex.split(f"evaluate {former}")) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines()[0].endswith(f"type: isdaa {now}")
    assert said.err.count("type:") == 1 and "is gone in the next release" in said.err
    assert main(shlex.split(now)) == 0
    assert "type:" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *shlex.split(former)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert end.value.code == 0 and f"isdaa {now}" in capsys.readouterr().err
    assert called[0] == called[1] == called[2]


def test_the_script_evaluates_a_model(called: list[Namespace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model_path", "path/to/model"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "scripts" / "evaluate.py"), run_name="__main__")
    assert end.value.code == 0 and called[0].command == "evaluate" and called[0].model_path == ["path/to/model"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("evaluate --model_path a --benchmark hh --tax", ["call one after the other"]),
        ("evaluate --model_path a --benchmark", ["--benchmark", "expected one argument"]),
        ("evaluate --model_path a --limit 3", ["--limit: has no effect", "`isdaa benchmark` and `isdaa tax`"]),
        ("evaluate --model_path a --shots mmlu=3", ["--shots: has no effect", "belongs to `isdaa tax`"]),
        ("evaluate --model_path a --guard.steps 5", ["--guard.steps: has no effect with `isdaa evaluate`", "isdaa train"]),
        ("benchmark hh --model_path a --judge_model j --judge_base_url http://x --judge_timeout nan", ["0.001, got nan"]),
        ("evaluate --model_path a --judge=gold", ["--judge: has no effect", "--scorer"]),
        ("evaluate mt_bench --model_path a", ["'mt_bench' belongs to no option"]),
        ("benchmark --model_path a mt_bench", ["NAME", "isdaa benchmark --help"]),
        ("benchmark mt_bench --model_path a --scorer gold", ["--scorer: has no effect with `isdaa benchmark`", "--judge"]),
        ("benchmark mt_bench --model_path a --include_path d", ["--include_path: has no effect", "`isdaa tax`"]),
        ("benchmark mt_bench --model_path a --evaluation.prompts 3", ["--evaluation.prompts", "--limit says how many"]),
        ("benchmark mt_bench --model_path a --tokenization.max_length 3", ["--tokenization.max_length", "`isdaa evaluate`"]),
        ("benchmark mt_bench --model_path a --max_new_token 3", ["unknown option --max_new_token", "--max_new_tokens"]),
        ("tax --model_path a --questions project", ["--questions: has no effect with `isdaa tax`", "come from lm-eval"]),
        ("tax --model_path a --evaluation.temperature 1", ["--evaluation.temperature: has no effect", "`isdaa evaluate`"]),
        ("tax --model_path a --tax-limit 3", ["unknown option --tax_limit", "--limit"]),
        ("tax gsm8k", ["--model_path"]),
    ],
)
def test_what_has_no_effect_is_refused_with_the_way_out(argv: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, argv.split(), *words)


def options_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        main([command, "--help-all"])
    return set(re.findall(r"--[\w.]+", capsys.readouterr().out))


def test_help_shows_what_has_effect(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate, benchmark, tax = (options_of(name, capsys) for name in ("evaluate", "benchmark", "tax"))
    shared = {"--model_path", "--output", "--dtype", "--adopt", "--evaluation.seed"}
    assert shared <= evaluate & benchmark & tax
    assert {"--reference", "--tokenizer"} <= evaluate & tax and not {"--reference", "--tokenizer"} & benchmark
    assert {"--data", "--scorer", "--judge_template", "--evaluation.prompts"} <= evaluate - benchmark - tax
    assert {"--questions", "--judge", "--answers", "--max_new_tokens"} <= benchmark - evaluate - tax
    assert {"--shots", "--include_path", "--batch_size"} <= tax - evaluate - benchmark
    assert not {option for option in evaluate | benchmark | tax if option.startswith("--tax") or option == "--benchmark"}


def test_commands_stand_beside_their_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^    {name} +\S", shown, re.M) for name in COMMANDS)
