"""Mutated inputs, by thousands, each in a process of its own: `python tests/fuzz/fuzz.py --trials 1000 --seed 1`.

A trial takes a small valid input, changes it in one place and runs one command on it, in-process, with exceptions caught. Allowed
are the exit statuses 0, 2, 3, 130 and 141. A failure is any other one, an exception, a process that dies, more than 60 seconds,
an exit 0 that leaves NaN in a record or a model, and an error of more than one line. `--case N` repeats trial N of a seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
import fuzz_inputs as inputs
from fuzz_mutations import BY_SUFFIX, RAW_JSON, RAW_YAML, TEXTS, any_value, mutate_bytes, mutate_file, mutate_value, replace_file

KINDS = ("data", "yaml", "options", "records", "models")
ALLOWED = (0, 2, 3, 130, 141)
SECONDS = 60
MEMORY = 6 << 30  # bytes that a trial may have beyond what it is born with
LONGEST = 700  # characters of an error: 500 and what stands around them
EVERY = 10  # seconds between two lines of progress

SHORT = "--evaluation.max_new_tokens 4 --evaluation.bootstrap 100 --evaluation.opponent_samples 1"  # of an evaluation
Trial = tuple[list[str], str]  # (arguments of isdaa, what was changed)


@dataclass
class Outcome:
    """What became of a trial. fault: what was wrong, "" where nothing was; group: by which faults are counted."""

    case: int
    kind: str
    status: int | None = None
    seconds: float = 0.0
    command: str = ""
    what: str = ""
    said: str = ""
    fault: str = ""
    group: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# Trials, made in a copy of the inputs that is the working folder


def data_trial(random: Random) -> Trial:
    """A file of rows."""
    name, rows = random.choice(list(inputs.ROWS.items()))
    suffix = random.choice(
        (".jsonl", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".jsonl.gz", ".csv.xz", ".json.bz2")
    )
    path = Path(f"{name}{suffix}")
    changed, what = rows, ""
    how = random.choice(("value", "value", "value", "bytes", "bytes", "file"))
    if how == "value" and suffix in BY_SUFFIX:
        content, what = BY_SUFFIX[suffix](inputs.encoded(rows, suffix).decode(), random)
        path.write_bytes(content)
    else:
        if how == "value":
            changed, what, marks = mutate_value(rows, random, RAW_JSON)
            changed = _replaced(changed, marks) if isinstance(changed, list) else rows
        try:
            content = inputs.encoded(changed, suffix)
        except Exception:  # what no such file can hold is no trial; the plain rows are, with other bytes
            how, content = "bytes", inputs.encoded(rows, suffix)
        if how == "bytes":
            content, what = mutate_bytes(content, random)
            if suffix.endswith((".gz", ".xz", ".bz2")) and random.random() < 0.5:  # the bytes inside
                inner = suffix.rpartition(".")[0]
                plain, what = mutate_bytes(inputs.encoded(rows, inner), random)
                content = inputs.PACKED[suffix.removeprefix(inner)](plain)
        path.write_bytes(content)
        if how == "file":
            what = replace_file(path, random)
    template = " --model.tokenizer model" if name in ("chat", "sharegpt", "alpaca") else ""
    prompts = f"--questions {path} --max_new_tokens 4 --output out --judge run/reward"
    benchmark = random.choice(("tldr", "hh", "alpaca_eval", "mt_bench", "arena_hard"))
    command = random.choice(
        (
            f"inspect --config align.yaml --no_plan --data.pairs {path}{template}",
            f"inspect --config align.yaml --no_plan --data.pairs {path}{template} --row 3 --json",
            f"inspect --config config.yaml --no_plan --data.sft {path}{template}",
            f"train --config align.yaml --data.pairs {path}{template}",
            f"train --config align.yaml --data.eval_pairs {path}{template}",
            f"logps --model_path model --data {path} --output logps.jsonl",
            f"evaluate --model_path model --reference run/sft --data {path} --scorer run/reward --output out {SHORT}",
            f"benchmark {benchmark} --model_path model {prompts}",
        )
    )
    return command.split(), f"{path}: {what}"


def _replaced(value: Any, marks: dict[str, str]) -> Any:
    """Marks as the text that they stand for."""
    if isinstance(value, list):
        return [_replaced(item, marks) for item in value]
    if isinstance(value, dict):
        return {key: _replaced(item, marks) for key, item in value.items()}
    return marks.get(value, value) if isinstance(value, str) else value


def yaml_trial(random: Random) -> Trial:
    """A configuration or a sweep's file."""
    name = random.choice(("config.yaml", "align.yaml", "align.yaml", "sweep.yaml"))
    path = Path(name)
    chance = random.random()
    if chance < 0.7:
        value, what, marks = mutate_value(yaml.safe_load(path.read_text()), random, RAW_YAML)
        try:
            text = yaml.safe_dump(value, sort_keys=False)
        except (yaml.YAMLError, RecursionError):
            text = json.dumps(value)
        for mark, raw in marks.items():
            text = text.replace(f"'{mark}'", raw).replace(json.dumps(mark), raw)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    elif chance < 0.92:
        content, what = mutate_bytes(path.read_bytes(), random)
        path.write_bytes(content)
    else:
        what = replace_file(path, random)
    if name == "sweep.yaml":
        command = random.choice((["sweep", "--config", name, "--dry_run"], ["inspect", "--config", name, "--no_plan"]))
    else:
        small = ["--data.limit", "8"] if name == "config.yaml" and random.random() < 0.8 else []
        command = random.choice(
            (["inspect", "--config", name, "--no_plan", *small], ["train", "--config", name, "--output_dir", "new", *small])
        )
    return command, f"{name}: {what}"


def options_trial(random: Random) -> Trial:
    """Values of options."""
    from isdaa.cli.main import parser_of

    base = random.choice(
        (
            "inspect --config align.yaml --no_plan",
            "train --config align.yaml",
            "train --config config.yaml --output_dir new",
            "evaluate --model_path run --output out",
            "benchmark tldr --model_path model --questions pairs.jsonl --max_new_tokens 4 --output out",
            "report run --output out",
            f"report --checkpoints model --reference run/sft --data pairs.jsonl --scorer run/reward --output out {SHORT}",
            "logps --model_path model --data pairs.jsonl --output out.jsonl",
            "sweep --config sweep.yaml --dry_run",
            "methods",
            "demo finite --seed x",
        )
    ).split()
    options = [action for action in parser_of(base[0])._actions if action.option_strings and action.nargs != 0]
    given = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if not options or random.random() < 0.05:
            given += [random.choice(TEXTS)]
            continue
        option = random.choice(options).option_strings[-1]
        value = any_value(random)
        text = value if isinstance(value, str) else json.dumps(value)
        chosen = random.choice(
            (text, text, random.choice(("-1", "0", "1", "2", "3", "1e300", "1e-300", "nan", "null", "true", "[]", "99999999999")))
        )
        given += [f"{option}={chosen}"] if random.random() < 0.5 else [option, chosen]
    if random.random() < 0.1:
        base[random.randrange(1, len(base)) if len(base) > 1 else 0] = random.choice(TEXTS)
    # A command line holds no NUL and no lone surrogate but those that bytes outside UTF-8 become.
    command = [base[0], *(os.fsdecode(os.fsencode(word.replace("\ud800", "\udcff"))) for word in [*base[1:], *given])]
    command = [word if keep else word.replace("\0", "") for word in command for keep in [random.random() < 0.5]]
    return command, " ".join(word[:60] for word in given)


def records_trial(random: Random) -> Trial:
    """What earlier commands left: of a run, of an evaluation, of a benchmark, a cache."""
    resumed = random.random() < 0.35
    if resumed:
        _unfinish(random.choice(("align", "align", "label", "reward", "sft")))
    names = ("*.json", "*.jsonl", "*.yaml", "*.safetensors", "*.pt", "*.pth", "*.bin")
    places = [Path("run"), Path("bench"), Path(".isdaa_cache")]
    if resumed:
        places = [Path("run"), Path("run/checkpoints"), Path("run/checkpoints"), Path(".isdaa_cache")]
    place = random.choice(places)
    files = sorted({file for pattern in names for file in place.rglob(pattern) if file.is_file() and ".svg" not in file.name})
    if not resumed and place == Path("run"):  # what an evaluation reads, rather than a reward model's tokenizer
        records = [file for file in files if file.name in RECORDS]
        files = records if random.random() < 0.85 else files
    if not files:
        files = [Path("run/run.json")]
    file = random.choice(files)
    what = f"{file.parent}/{mutate_file(file, random)}"
    manifest = file.parent / "isdaa_manifest.json"
    if manifest.is_file() and file != manifest and file.is_file() and random.random() < 0.8:
        with suppress(OSError):
            _write_manifest(file.parent)
            what += ", with a new manifest"
    if file.name in ("run.json", "isdaa.json") and file.is_file():
        _own(file)
    if place == Path("bench"):
        command = random.choice((inputs.BENCHMARK, "report bench"))
    elif resumed:
        command = "train --config config.yaml"
    else:
        command = random.choice(
            (
                *("report run", "report run --output out"),
                *(
                    "evaluate --model_path run",
                    "evaluate --model_path run --output out",
                    "evaluate --model_path run/model --output out",
                ),
                *("train --config config.yaml", "inspect --config config.yaml --no_plan"),
            )
        )
    return command.split(), what


RECORDS = (
    "run.json",
    "isdaa.json",
    "plan.json",
    "metrics.json",
    "metrics.jsonl",
    "samples.jsonl",
    "scores.jsonl",
    "pairs.jsonl",
    "train.jsonl",
    "label.json",
    "responses.jsonl",
    "eval_pairs.jsonl",
    "config.yaml",
    "isdaa_manifest.json",
    "trainer_state.json",
    "report.json",
)


def _write_manifest(folder: Path) -> None:
    """Let a changed folder pass for one that was written so."""
    try:
        from isdaa.manifest import write_manifest
    except ImportError:
        from isdaa.training.trainer.checkpoints import write_manifest
    write_manifest(folder)


def _own(record: Path) -> None:
    """Give a record the user's digest again, that what it says is believed; an isdaa that has no digests believes it anyway."""
    with suppress(ImportError, ValueError, OSError, TypeError, RecursionError):
        from isdaa.ownership import sealed

        record.write_text(json.dumps(sealed(record.name, json.loads(record.read_text()))))


def _unfinish(stage: str) -> None:
    """Let the run look as if it had been killed in a stage."""
    record = Path("run/run.json")
    state = json.loads(record.read_text())
    order = ["sft", "label", "reward", "align"]
    for later in order[order.index(stage) + 1 :]:
        state["stages"].pop(later)
    state["stages"][stage]["done"] = False
    record.write_text(json.dumps(state))
    _own(record)
    made = {"sft": "sft", "label": "pairs/train.jsonl", "reward": "reward", "align": "model"}
    for later in order[order.index(stage) :]:
        shutil.rmtree(Path("run", made[later]), ignore_errors=True)
        Path("run", made[later]).unlink(missing_ok=True) if Path("run", made[later]).is_file() else None
    if stage == "align":
        shutil.rmtree("run/checkpoints/checkpoint-2")
    else:
        for folder in ("run/checkpoints", "run/evaluation", "run/report"):
            shutil.rmtree(folder, ignore_errors=True)


def models_trial(random: Random) -> Trial:
    """A model's folder, or the configuration of a random one."""
    if random.random() < 0.25:
        value, what, _ = mutate_value(inputs.TINY, random, ("0",))
        for key, number in list(value.items() if isinstance(value, dict) else ()):
            if isinstance(number, int) and random.random() < 0.25:
                value[key] = random.choice((0, -1, 1, 3, 5, 10**6, 10**9, 10**12, 2**31, 2.5, "x"))
                what += f", {key}: {value[key]}"
        config = yaml.safe_load(Path("align.yaml").read_text())
        config["model"]["random"] = value
        Path("align.yaml").write_text(json.dumps(config, default=str))
        return random.choice(
            (["inspect", "--config", "align.yaml", "--no_plan"], ["train", "--config", "align.yaml"])
        ), f"random: {what}"
    place = Path(random.choice(("model", "model", "adapter", "run/reward", "run/checkpoints/checkpoint-1")))
    files = sorted(
        file
        for file in place.iterdir()
        if file.is_file() and file.suffix not in (".md", ".pt", ".pth") and "manifest" not in file.name
    )
    (place / "isdaa_manifest.json").unlink(missing_ok=True)  # as if something else had trained it
    file = random.choice(files)
    what = mutate_file(file, random) if file.suffix != ".jinja" else _template(file, random)
    name = str(place)
    chat = Path("chat.jsonl")
    chat.write_bytes(inputs.encoded(inputs.CHAT, ".jsonl"))
    pairs = "chat.jsonl" if file.suffix == ".jinja" or random.random() < 0.3 else "pairs.jsonl"
    trained = f"--config align.yaml --model.path {name} --model.random null --model.tokenizer null --data.pairs {pairs}"
    judged = f"--reference run/sft --data {pairs} --output out {SHORT} --scorer"
    command = random.choice(
        (
            f"inspect --no_plan {trained}",
            f"train {trained}",
            f"train {trained} --lora.rank 2",
            f"logps --model_path {name} --data {pairs} --output logps.jsonl",
            f"evaluate --model_path {name} {judged} none",
            f"report --checkpoints {name} run/model {judged} run/reward",
            f"benchmark tldr --model_path {name} --questions {pairs} --max_new_tokens 4 --output out",
        )
    )
    command = f"evaluate --model_path model {judged} {name}" if name == "run/reward" else command
    return command.split(), f"{name}/{what}"


TEMPLATES = (
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'x' * 10**11 }}",
    "{% set ns = namespace(a='x') %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "{{ 9**9**9 }}",
    "{{ messages[9].x.y }}",
    "{{ raise_exception('no\\n\\nnever') }}",
    "{% for",
    "{{ 1/0 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{{ '\\ud800' }}",
    "",
    "x",
    "{{ messages }}",
    "{% include 'x' %}",
    "{{ [1] * 10**12 }}",
    "{{ '%1000000000000d' % 1 }}",
    "{% for a in range(30000) %}{% for b in range(30000) %}{% endfor %}{% endfor %}",
)


def _template(file: Path, random: Random) -> str:
    if random.random() < 0.3:
        return mutate_file(file, random)
    text = random.choice(TEMPLATES)
    file.write_text(text)
    return f"template {text}"


TRIALS: dict[str, Callable[[Random], Trial]] = {
    "data": data_trial,
    "yaml": yaml_trial,
    "options": options_trial,
    "records": records_trial,
    "models": models_trial,
}


# ---------------------------------------------------------------------------------------------------------------------
# One trial, in a process of its own


def run_trial(case: int, seed: int, kinds: Sequence[str], valid: Path, folder: Path, answer: Path) -> None:
    """In a child: make the trial in `folder`, run it, write its outcome to `answer`, and end the process."""
    random = Random(f"{seed}:{case}")
    kind = kinds[case % len(kinds)]
    outcome = Outcome(case, kind)
    began = time.monotonic()

    def tell(status: int | None = None, fault: str = "", group: str = "") -> None:
        outcome.status, outcome.fault, outcome.group, outcome.seconds = status, fault, group or fault, time.monotonic() - began
        with suppress(OSError, IndexError):
            outcome.said = Path("stderr.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-1][:LONGEST]
        answer.write_text(json.dumps(asdict(outcome)), encoding="utf-8")

    try:
        shutil.copytree(valid, folder, symlinks=True, dirs_exist_ok=True)
        _at_home(folder)
        arguments, what = TRIALS[kind](random)
        outcome.command, outcome.what = "isdaa " + " ".join(word[:200] for word in arguments), what[:300]
        began = time.monotonic()
        tell(fault="the process died", group="the process died")  # unless it says more
        now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY, now + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
        for number, name, mode in (
            (0, os.devnull, os.O_RDONLY),
            (1, "stdout.txt", os.O_WRONLY | os.O_CREAT),
            (2, "stderr.txt", os.O_WRONLY | os.O_CREAT),
        ):
            os.dup2(os.open(name, mode, 0o600), number)
    except BaseException:
        tell(fault="the fuzzer: " + traceback.format_exc()[-1500:], group="the fuzzer")
        os._exit(0)
    faults: list[BaseException] = []
    try:
        import isdaa.cli

        if hasattr(isdaa, "exits"):  # a source tree of before it has none
            told = isdaa.exits.fault
            isdaa.exits.fault = lambda error: faults.append(error) or told(error)
        status = isdaa.cli.main(arguments)
        sys.stdout.flush()
        sys.stderr.flush()
        if faults:
            raise faults[0]
        tell(status, *_wrong(status, Path(folder)))
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1 if error.code else 0
        tell(status, *_wrong(status, Path(folder)))
    except BaseException as error:
        tell(None, traceback.format_exc()[-3000:], _group(error))
    os._exit(0)


def _group(error: BaseException) -> str:
    """Kind of the error and the innermost place of isdaa that it went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/isdaa/" in frame.filename]
    inner = frames[-1] if frames else None
    return f"{type(error).__name__} in {Path(inner.filename).name}:{inner.name}" if inner else type(error).__name__


def _wrong(status: int, folder: Path) -> tuple[str, str]:
    """(what is wrong with an ended command, how it is counted), two empty texts where nothing is."""
    said = (folder / "stderr.txt").read_text(encoding="utf-8", errors="replace")
    if status not in ALLOWED:
        return f"status {status}: {said[-1500:]}", f"status {status}"
    lines = [line for line in said.splitlines() if line.startswith("isdaa: error: ")]
    if status == 2 and (len(lines) != 1 or said.splitlines()[-1] != lines[0]):
        return f"status 2 without one line that says why: {said[-1500:]}", "not one line"
    if status == 2 and len(lines[0]) > LONGEST:
        return f"an error of {len(lines[0])} characters: {lines[0][:300]}", "a long error"
    if status == 2 and re.search(r"[\x00-\x08\x0b-\x1f\x7f]", lines[0]):
        return f"an error with control characters: {lines[0]!r}", "control characters in an error"
    return _not_finite(folder) if status == 0 else ("", "")


def _not_finite(folder: Path) -> tuple[str, str]:
    """Records and models that this trial wrote and that hold NaN or an infinity."""
    import torch
    from safetensors.torch import load_file

    began = (folder / "stderr.txt").stat().st_ctime - 3600
    places = [folder / name for name in ("out", "new", "aligned")]
    for file in sorted(file for place in places if place.is_dir() for file in place.rglob("*") if file.is_file()):
        if file.stat().st_mtime < began:
            continue
        if file.suffix in (".json", ".jsonl"):
            text = file.read_text(encoding="utf-8", errors="replace")
            if re.search(r"(?<![\w\"])(NaN|-?Infinity)(?![\w\"])", text):
                return f"{file}: holds NaN or an infinity", f"not finite: {file.name}"
        elif file.suffix == ".safetensors":
            for name, tensor in load_file(file).items():
                if tensor.is_floating_point() and not math.isfinite(
                    float(torch.nan_to_num(tensor, nan=math.nan).abs().max() if tensor.numel() else 0)
                ):
                    return f"{file}: {name} is not finite", "not finite: weights"
    return "", ""


# ---------------------------------------------------------------------------------------------------------------------
# Many trials


def warm() -> None:
    """Import what commands import, so that a child does not; nothing is computed, for threads do not outlive a fork."""
    import altair  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import pyarrow.feather
    import pyarrow.parquet  # noqa: F401
    import torch
    import trl  # noqa: F401
    import vl_convert  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        GenerationConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Trainer,
    )

    from isdaa.cli.main import COMMANDS, parser_of

    torch.set_num_threads(1)
    for name in COMMANDS:
        parser_of(name)


def _at_home(folder: Path) -> None:
    """Let this process work in a folder that is its user's home, too."""
    os.chdir(folder)
    os.environ |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / ".config"), "TMPDIR": str(folder)}
    tempfile.tempdir = None


def _forked(work: Callable[[], None]) -> int:
    """A child in a process group of its own that does the work and ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setpgid(0, 0)
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(70)
    return child


def make_valid(folder: Path) -> None:
    """The valid inputs, made by a child, since this process may not compute."""

    def work() -> None:
        _at_home(folder)
        output = os.open(folder.parent / "valid.txt", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        inputs.make_inputs(folder)

    _, status = os.waitpid(_forked(work), 0)
    if status != 0:
        raise SystemExit((folder.parent / "valid.txt").read_text(errors="replace")[-4000:])


def fuzz(
    cases: Sequence[int],
    seed: int,
    kinds: Sequence[str] = KINDS,
    *,
    minutes: float = math.inf,
    jobs: int = 2,
    keep: Path | None = None,
    show: Callable[[str], None] = print,
) -> list[Outcome]:
    """Run the trials of these numbers; returns their outcomes. keep: a folder in which the last trial's files are left."""
    warm()
    root = Path(tempfile.mkdtemp(prefix="isdaa-fuzz-"))
    outcomes: list[Outcome] = []
    running: dict[int, tuple[int, float, Path]] = {}
    waiting, began, told = list(cases), time.monotonic(), time.monotonic()
    try:
        valid = root / "valid"
        valid.mkdir()
        make_valid(valid)
        show(f"inputs made in {time.monotonic() - began:.0f} s")
        began = time.monotonic()
        while running or (waiting and time.monotonic() - began < 60 * minutes):
            while waiting and len(running) < jobs and time.monotonic() - began < 60 * minutes:
                case = waiting.pop(0)
                folder = root / f"{case}"
                folder.mkdir()
                child = _forked(
                    lambda case=case, folder=folder: run_trial(case, seed, kinds, valid, folder, root / f"{case}.json")
                )
                running[child] = (case, time.monotonic(), folder)
            for child, (case, start, folder) in list(running.items()):
                late = time.monotonic() - start > SECONDS
                if late:
                    with suppress(ProcessLookupError):
                        os.killpg(child, signal.SIGKILL)
                ended, status = os.waitpid(child, 0 if late else os.WNOHANG)
                if ended == 0:
                    continue
                with suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # what it left running
                del running[child]
                outcomes.append(_outcome(root / f"{case}.json", case, kinds, status, late))
                if outcomes[-1].fault:
                    show(told_of(outcomes[-1], seed, kinds))
                if keep is not None:
                    shutil.copytree(
                        folder,
                        keep,
                        symlinks=True,
                        dirs_exist_ok=True,
                        ignore=lambda at, names: [n for n in names if _special(Path(at, n))],
                    )
                shutil.rmtree(folder, ignore_errors=True)
            time.sleep(0.005)
            if time.monotonic() - told > EVERY:
                told = time.monotonic()
                show(f"{len(outcomes)} trials in {told - began:.0f} s, {sum(bool(o.fault) for o in outcomes)} failures")
    finally:
        for child in running:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        shutil.rmtree(root, ignore_errors=True)
    return sorted(outcomes, key=lambda outcome: outcome.case)


def _special(path: Path) -> bool:
    return not path.is_symlink() and not path.is_file() and not path.is_dir()


def _outcome(answer: Path, case: int, kinds: Sequence[str], status: int, late: bool) -> Outcome:
    try:
        found = Outcome(**json.loads(answer.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        found = Outcome(case, kinds[case % len(kinds)], fault="the process died before its trial", group="the fuzzer")
    if late:
        found.status, found.fault, found.group, found.seconds = None, f"more than {SECONDS} s", f"more than {SECONDS} s", SECONDS
    elif found.fault == "the process died":
        ended = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"
        found.fault = found.group = f"the process died of {ended}"
    return found


def told_of(outcome: Outcome, seed: int, kinds: Sequence[str]) -> str:
    """A failure, with the command that repeats it."""
    only = "" if tuple(kinds) == KINDS else f" --only {' '.join(kinds)}"
    lines = (
        f"FAILURE {outcome.kind}: {outcome.group}",
        f"  command: {outcome.command}",
        f"  changed: {outcome.what}",
        f"  repeat:  python tests/fuzz/fuzz.py --seed {seed}{only} --case {outcome.case}",
    )
    return "\n".join(line.encode("utf-8", "backslashreplace").decode().replace("\x1b", "\\x1b") for line in lines)


def table(outcomes: Sequence[Outcome]) -> str:
    """Counts by kind and status, then by fault."""
    lines = [f"{'kind':<10}{'trials':>8}{'exit 0':>8}{'exit 2':>8}{'others':>8}{'failures':>10}{'seconds':>9}"]
    for kind in [*KINDS, "all"]:
        these = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        good = Counter(outcome.status for outcome in these if not outcome.fault)
        failed = sum(bool(outcome.fault) for outcome in these)
        others = sum(good.values()) - good[0] - good[2]
        seconds = sum(outcome.seconds for outcome in these) / max(1, len(these))
        lines.append(f"{kind:<10}{len(these):>8}{good[0]:>8}{good[2]:>8}{others:>8}{failed:>10}{seconds:>9.2f}")
    faults = Counter(f"{outcome.kind}: {outcome.group}" for outcome in outcomes if outcome.fault)
    lines += ["", *(f"{count:>5}  {name}" for name, count in faults.most_common())]
    return "\n".join(lines)


def main() -> int:
    """Exit status 1 where a trial failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many, whatever was done")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="kinds of input")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--case", type=int, nargs="+", help="repeat these trials and show everything")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="with --case: leave the trial's files here")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every outcome as JSON Lines")
    arguments = parser.parse_args()
    outcomes = fuzz(
        arguments.case or range(arguments.trials),
        arguments.seed,
        tuple(arguments.only),
        minutes=arguments.minutes,
        jobs=arguments.jobs,
        keep=arguments.keep,
        show=lambda text: print(text, flush=True),
    )
    if arguments.case:
        for outcome in outcomes:
            print(json.dumps({**asdict(outcome), "fault": ""}, indent=2), outcome.fault, sep="\n")
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes))
    print("\n" + table(outcomes), flush=True)
    return 1 if any(outcome.fault for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
