"""Options that commands share: one for each key of the configuration, and those that name models, data and a judge."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isdaa.cli.parser import NUMBERS, whole
from isdaa.config import TAKEN_AWAY, allowed, as_written, fields, layers, load_config, preset_value
from isdaa.config.settings_text import item_kind, listed_value, option_value
from isdaa.distributed import is_main, once
from isdaa.errors import DoneInPart, UserError, shown
from isdaa.exits import tell

if TYPE_CHECKING:
    from isdaa.evaluation.judges.types import Asking

# --- keys of the configuration

NEAR = {"reference": "model", "behaviour": "model", "lora": "model", "tokenization": "data"}
TITLES = {"align": "align (sft and reward have most of these, too)"}


def add_keys(parser: argparse.ArgumentParser, only: Collection[str] = ()) -> None:
    """One `--section.key` option for every key of the configuration, or of the sections and keys in `only`."""
    groups: dict[str, Any] = {}
    for dotted, field, default in fields():
        section = dotted.rpartition(".")[0]
        if only and section not in only and dotted not in only:
            continue
        group = NEAR.get(section, section) or "run"
        if group not in groups:
            groups[group] = parser.add_argument_group(TITLES.get(group, group))
        values, preset = allowed(field), preset_value(dotted)
        metavar = next((name for name, what in NUMBERS.items() if values.startswith(f"{what} ")), "VALUE")
        text, value = field.description or "", as_written(default) + (f", which is {preset}" if preset else "")
        facts = values.removeprefix(f"{NUMBERS.get(metavar)} ")
        if value == "null" and "null: " in text:
            text, facts = text.replace("null: ", "null (default): ", 1), facts.removesuffix(", null")
        else:
            facts = "; ".join(filter(None, (facts, f"default: {value}")))
        switch = not section and field.annotation is bool
        groups[group].add_argument(
            f"--{dotted}",
            type=str,  # as it is: what its key is for decides
            nargs="*" if item_kind(field.annotation) is not None else "?" if switch else None,
            **({"const": "true"} if switch else {}),
            default=argparse.SUPPRESS,
            help=(f"{text} ({facts})" if facts else text).strip().replace("%", "%%"),
            metavar=metavar,
        )
    for dotted in TAKEN_AWAY:
        if only and dotted not in only and dotted.rpartition(".")[0] not in only:
            continue
        parser.add_argument(f"--{dotted}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def overrides_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The configuration options of a parsed command line: text as it is, all else read as YAML."""
    given, found = vars(arguments), {}
    for name, field, _ in fields():
        value, kind, option = given.get(name), field.annotation, f"--{name}"
        if isinstance(value, list):
            listed = len(value) == 1 and value[0].startswith("[") and value[0].endswith("]")
            found[name] = (
                listed_value(value[0], kind, option) if listed else [option_value(v, item_kind(kind), option) for v in value]
            )
        elif value is not None:
            found[name] = option_value(value, kind, option)
    for name, (default, _) in TAKEN_AWAY.items():
        if name in given:
            found[name] = option_value(given[name], type(default), f"--{name}")
    return found | ({"model.trust_remote_code": False} if given.get("deny_remote_code") else {})


def config_of(path: str | None, settings: dict[str, Any]) -> Any:
    """The configuration of a run, which may go on from another."""
    if layers(path, settings).get("continue_from") is None:
        return load_config(path, settings)
    from isdaa.training.stages.continued import config_of

    return once(partial(config_of, path, settings))


# --- options of several commands

SHARED: dict[str, dict[str, Any]] = {
    "model_path": {"nargs": "+", "metavar": "PATH", "help": "model, checkpoint or run folders"},
    "output": {"metavar": "DIR", "help": "where records go (default: `evaluation` in the run's folder)"},
    "reference": {"metavar": "PATH", "help": "reference model (default: from the record beside the model)"},
    "tokenizer": {"metavar": "PATH", "help": "of all models (default: the first model's, its base's or the reference's)"},
    "data": {"metavar": "SOURCE", "help": "held-out prompts or pairs (default: from the record)"},
    "split": {"metavar": "NAME", "help": "split of --data"},
    "scorer": {"metavar": "NAME", "help": "`gold`, a reward model's path, or `none` (default: from the record)"},
    "scores": {"metavar": "FILE", "help": "scores of your own of the samples that --scorer none drew (docs/evaluation.md)"},
    "show_scorer_input": {
        "action": "store_true", "default": None, "help": "show once, token by token, what the scorer is fed"
    },
    "keep_thinking": {  # a short name of a key
        "dest": "evaluation.keep_thinking", "action": "store_const", "const": "true", "default": argparse.SUPPRESS,
        "help": "judge, score and measure what a model thinks aloud, too (default: its answer alone)",
    },
    "dtype": {"choices": ["float32", "bfloat16", "auto"], "help": "of the policies in memory (default: the record's)"},
    "adopt": {
        "action": "store_true",
        "help": "take a run of another machine, or of others, over as your own: you trust all that is in it",
    },
}  # fmt: skip


def add_shared(parser: argparse.ArgumentParser, *names: str) -> None:
    """Some of `SHARED`."""
    for name in names:
        parser.add_argument(f"--{name}", **SHARED[name])


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Whether a model's own code runs; where the configuration says it (`--model.trust_remote_code`), `add_deny` is enough."""
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--trust_remote_code", action="store_true", default=None, help="run code that a model's repository ships")
    trust.add_argument(
        "--no_trust_remote_code", dest="trust_remote_code", action="store_false", default=None, help="run none (the default)"
    )


def add_deny(parser: argparse.ArgumentParser) -> None:
    """`--no_trust_remote_code` over whatever the configuration says, for `overrides_of`."""
    parser.add_argument(
        "--no_trust_remote_code", dest="deny_remote_code", action="store_true",
        help="run no code of a model's repository, whatever the config says",
    )  # fmt: skip


def adopted(folders: Sequence[str]) -> None:
    """Take folders over, said first; the main process does it. Among several, those with nothing to take over are passed by."""
    from isdaa.training.trainer.checkpoints import adopt

    refusals = []
    for folder in folders:
        try:
            count = once(partial(adopt, Path(folder).expanduser()))
        except UserError as error:
            refusals.append(error)
            continue
        if is_main():
            tell(f"{shown(folder)}: yours now, with {count} records")
    if refusals and len(refusals) == len(folders):
        raise refusals[0]


def model_paths(arguments: argparse.Namespace) -> list[str]:
    """What `--model_path` names, taken over if asked. Raises UserError where it is missing, which the parser's errors precede."""
    if not arguments.model_path:
        raise UserError(f"the following arguments are required: --model_path; see `isdaa {arguments.command} --help`")
    if arguments.adopt:
        adopted(arguments.model_path)
    found: list[str] = arguments.model_path
    return found


def given_of(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The configuration options of a command line, with `dtype`, `trust_remote_code` and more of its options by their names."""
    return overrides_of(arguments) | {name: getattr(arguments, name) for name in ("dtype", "trust_remote_code", *names)}


# --- samples of checkpoints: `isdaa evaluate` and `isdaa report`

# What --help shows of them.
SAMPLES = """
    reference tokenizer data split scorer scores dtype judge_model judge_base_url judge_template max_requests
    evaluation.prompts evaluation.opponent evaluation.opponent_samples evaluation.max_new_tokens
    evaluation.temperature evaluation.top_p evaluation.batch_size evaluation.seed keep_thinking
    tokenization.max_length tokenization.max_prompt_length"""


def add_samples(parser: argparse.ArgumentParser) -> None:
    """What checkpoints are sampled, scored and judged with, for `samples_of`."""
    judge = add_judge(parser, "judge of the samples, in place of a scorer (docs/judging.md)")
    judge.add_argument(
        "--judge_template", metavar="NAME",
        help="what it is asked of two samples: hh, tldr, or a file with {prompt}, {first} and {second} (default: hh)",
    )  # fmt: skip
    add_shared(parser, "reference", "tokenizer", "data", "split", "scorer", "scores", "show_scorer_input", "keep_thinking")
    add_shared(parser, "dtype", "adopt")
    add_trust(parser)
    add_keys(parser, only=("evaluation", "tokenization", "scorer"))


def samples_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The overrides that `requests` takes. Raises UserError."""
    given = given_of(arguments, "reference", "tokenizer", "data", "split", "scorer", "scores", "show_scorer_input")
    judge, asking = None, asking_of(arguments)
    if asking is not None:
        from isdaa.evaluation.checkpoints.judged_samples import SampleJudge

        judge = SampleJudge(asking, arguments.judge_template or "hh")
    elif arguments.judge_template is not None:
        raise UserError("--judge_template is given, and no judge model; name it with --judge_model")
    every = True if "evaluation.opponent_samples" in given else None  # to be scored elsewhere, where there is no scorer
    return given | {"judge_model": judge, "all_opponents": every}


def stop_in_part(overrides: dict[str, Any]) -> None:
    """Status 3 where a budget ended the judging early; what is there is printed first."""
    judge = overrides["judge_model"]
    if judge is not None and judge.stopped is not None:
        raise DoneInPart(judge.stopped)


# --- a judge model: samples and benchmarks. Every option is None unless it is given; the defaults stand in `JudgeSettings`.

# Option -> field of `JudgeSettings`, type, metavar, help.
JUDGE: dict[str, tuple[str, Any, str, str]] = {
    "judge_model": ("model", str, "NAME", "judge model of any OpenAI-compatible endpoint"),
    "judge_base_url": ("base_url", None, "URL", "its address, up to /v1 (default: OPENAI_BASE_URL, else OpenAI)"),
    "judge_temperature": ("temperature", None, "VALUE", "a number ≥ 0, or `none` to send none (default: the question's)"),
    "judge_max_tokens": ("max_tokens", whole(), "N", "of a reply (≥ 1; default: the question's)"),
    "judge_seed": ("seed", int, "N", "sent with every request (default: none is)"),
    "judge_concurrency": ("concurrency", whole(), "N", "requests in flight at once (≥ 1; default: 8)"),
    "judge_timeout": ("timeout_s", float, "SECONDS", "of a whole request (≥ 0.001; default: 120)"),
    "judge_retries": ("retries", whole(0), "N", "after a question's first try (≥ 0; default: 6)"),
    "max_requests": ("max_requests", whole(0), "N", "at most so many HTTP requests in this call (≥ 0; default: no limit)"),
    "judge_price_in": ("price_in", float, "PRICE", "of a million tokens read (≥ 0)"),
    "judge_price_out": ("price_out", float, "PRICE", "of a million tokens written (≥ 0)"),
    "judge_api_version": ("api_version", None, "DATE", "api-version of a classic Azure endpoint"),
    "judge_key_variable": ("key_variable", None, "NAME", "environment variable of the key (default: OPENAI_API_KEY)"),
}
JUDGE_WAYS = {
    "judge_max_completion_tokens": "it knows the limit by this name",
    "judge_no_system": "it takes no system message",
    "judge_stream": "it answers in a stream alone",
}


def add_judge(parser: argparse.ArgumentParser, title: str) -> Any:
    """The options of a judge model, for `asking_of`. Returns their group."""
    who = parser.add_argument_group(title)
    for name, (_, kind, metavar, text) in JUDGE.items():
        who.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    for name, text in JUDGE_WAYS.items():
        who.add_argument(f"--{name}", action="store_true", default=None, help=text)
    return who


def asking_of(arguments: argparse.Namespace) -> Asking | None:
    """The judge model, or None where none is named. Raises UserError."""
    from isdaa.evaluation.judges.types import LIMITS, Asking, JudgeSettings, check_limit, check_variable
    from isdaa.evaluation.judges.wording import WAY_OPTIONS

    given = {field: value for name, (field, *_) in JUDGE.items() if (value := getattr(arguments, name)) is not None}
    ways = tuple(way for name, way in WAY_OPTIONS.items() if getattr(arguments, name))
    logprobs = not getattr(arguments, "judge_no_logprobs", None)
    if "model" not in given:
        if given or ways or not logprobs:
            raise UserError("options of a judge model are given, and no judge model; name it with --judge_model")
        return None
    if not given["model"].strip():
        raise UserError("--judge_model is empty; name a model that the endpoint serves")
    if not given["model"].isprintable():
        raise UserError("--judge_model holds a character that no name has; name a model that the endpoint serves")
    own_temperature = "temperature" in given
    if own_temperature:
        given["temperature"] = _temperature(given["temperature"])
    for option, (field, *_) in JUDGE.items():
        if field in LIMITS:
            check_limit(field, given.get(field), f"--{option}")
    if "key_variable" in given:
        check_variable(given["key_variable"], "--judge_key_variable")
    if ("price_in" in given) != ("price_out" in given):
        raise UserError(
            "--judge_price_in and --judge_price_out: give both prices, of a million tokens read and of a million written, or "
            "neither"
        )
    return Asking(JudgeSettings(ways=ways, **given), own_temperature, "max_tokens" in given, logprobs)


def _temperature(text: str) -> float | None:
    if text.lower() in ("none", "null"):
        return None
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--judge_temperature is {text!r}; give a number from 0, or `none`") from None
