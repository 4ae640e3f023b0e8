"""The pages of tasks: every command is one that isdaa takes, some run as they stand, and all that they link to is there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from chains import ROOT, chat_model, jsonl, plain_pairs, read_lines

from isdaa.cli.main import main, parse
from isdaa.cli.options import overrides_of
from isdaa.config import load_config

PAGES = ("how_to.md", "which_method.md", "metrics.md")
TEXTS = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in PAGES}
TASKS = 12
ELSEWHERE = ("going_on.md",)  # comes with `--continue_from`


def commands() -> list[tuple[str, str]]:
    found = []
    for page, text in TEXTS.items():
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL) + re.findall(r"(?:^    [^\n]+\n)+", text, re.MULTILINE)
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            if line.strip().startswith("isdaa "):
                found.append((page, " ".join(line.split())))
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_every_command_is_taken(page: str, command: str) -> None:
    arguments = parse(shlex.split(command)[1:])
    given = overrides_of(arguments)
    if arguments.command in ("train", "inspect") and "continue_from" not in given:  # which has the old run's
        load_config(None, given)


def test_there_are_commands_to_take() -> None:
    assert len(commands()) > 15
    assert len(re.findall(r"^## ", TEXTS["how_to.md"], re.MULTILINE)) == TASKS


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and files that the pages name."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("my_model", "other_model")):
        chat_model(tmp_path / name, seed=seed, max_position_embeddings=1024)
    jsonl(tmp_path / "pairs.jsonl", plain_pairs(24))
    prompts = [row["prompt"] for row in plain_pairs(4)]
    jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompts[0]}, {"prompt": [{"role": "user", "content": prompts[1]}]}])
    return tmp_path


def section(page: str, title: str) -> str:
    return re.split(r"^## ", TEXTS[page], flags=re.MULTILINE)[
        [*re.findall(r"^## (.*)$", TEXTS[page], re.MULTILINE)].index(title) + 1
    ]


def run_commands(text: str) -> None:
    text = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    for line in filter(None, text.splitlines()):
        assert main(shlex.split(line)[1:]) == 0, line


def python_of(page: Path, word: str) -> str:
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) if word in text)
    return found


@pytest.mark.parametrize(
    "title", ["Weight pairs that another model wrote", "Resume, train one more epoch, change the learning rate"]
)
def test_commands_of_a_section_run_one_after_the_other(
    title: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_commands(section("how_to.md", title))
    for folder in re.findall(r"--output_dir (\S+)", section("how_to.md", title)):
        assert (place / folder / "model" / "model.safetensors").is_file(), folder


def test_a_run_trains_the_reward_model_that_guards_it(place: Path) -> None:
    (block,) = (b for b in re.findall(r"```bash\n.*?```", TEXTS["how_to.md"], re.DOTALL) if "--stages reward align" in b)
    run_commands(block.replace("--guard.steps 50", "--guard.steps 1 --evaluation.max_new_tokens 4"))
    assert (place / "runs/rewarded/best/model.safetensors").is_file()


def test_pairs_by_ones_own_scorer_are_read(place: Path) -> None:
    exec(python_of(ROOT / "docs/how_to.md", "own_pairs.jsonl"), {})
    text, chat = read_lines(place / "own_pairs.jsonl")
    assert len(text["chosen"]) < len(text["rejected"]) and not text["chosen"].startswith(text["prompt"])
    assert [turn["role"] for turn in chat["chosen"]] == ["assistant"] and chat["prompt"][0]["role"] == "user"
    command = "train --model.path my_model --data.pairs own_pairs.jsonl --data.eval_fraction 0 --align.warmup_steps 0"
    assert main([*command.split(), "--objective.method", "chi_po", "--output_dir", "run"]) == 0


def test_an_adapter_is_merged_by_three_lines(place: Path) -> None:
    command = "train --model.path my_model --data.pairs pairs.jsonl --lora.rank 2 --align.warmup_steps 0 --output_dir run"
    assert main(command.split()) == 0
    newest = max((place / "run/checkpoints").iterdir(), key=lambda path: int(path.name.rpartition("-")[2]))
    code = python_of(ROOT / "docs/exports.md", "MERGED").replace('"ADAPTER"', repr(str(newest)))
    exec(code, {})
    assert (place / "MERGED/config.json").is_file() and not (place / "MERGED/adapter_config.json").exists()
    assert json.loads((newest / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_lines_of_the_sources_fit_a_screen() -> None:
    for page in ("how_to.md", "which_method.md"):
        long = [line for line in TEXTS[page].splitlines() if len(line) > 121 and not line.startswith("|")]
        assert not long, (page, long)


def anchor(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_place_that_is_linked_to_is_there(page: str) -> None:
    for target, _, place in re.findall(r"\]\(([\w./-]*)(#?)([\w-]*)\)", TEXTS[page]):
        file = ROOT / "docs" / (target or page)
        if target in ELSEWHERE and not file.exists():
            continue
        assert file.is_file(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
        assert not place or place in map(anchor, titles), f"{target}#{place}"
