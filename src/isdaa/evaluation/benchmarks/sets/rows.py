"""Rows of the original tools' files, with every complaint as one line: 'file:row', key, what stands there, how to mend it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from isdaa.data.checks import kind
from isdaa.data.reading.readers import iterate_rows
from isdaa.errors import UserError, nearest
from isdaa.evaluation.benchmarks.sets.benchmark import Answer, Question, Row, prompt_text
from isdaa.files import digest

PROJECT = "project"
Located = tuple[Row, str]


def question_rows(
    source: str,
    split: str | None,
    limit: int | None,
    *,
    hub: tuple[str, str],
    repo_type: str = "dataset",
    columns: frozenset[str] = frozenset(),
) -> list[Located]:
    """(row, 'file:row') of a path, a Hub data set, or the project's own questions in MT-Bench's format.

    hub: the original's repository and the file of its questions there, beside other files.
    """
    single = hub[1] if source == hub[0] and not Path(source).expanduser().exists() else None
    check_split(source, split, single)
    if source == PROJECT:  # a folder of that name is `./project`
        return project_rows()[:limit]
    if single is not None:
        source = downloaded(source, single, repo_type, "give its path, or `project` for isdaa's own questions")
    rows = list(iterate_rows(source, split, limit=limit, columns=columns))
    if not rows:
        raise UserError(f"{source}: no question in it")
    return rows


def check_split(source: str, split: str | None, hub_file: str | None = None) -> None:
    """Raises UserError where a split is named of questions that have none: the project's, a file's, one file's on the Hub."""
    if split is None:
        return
    if source == PROJECT:
        raise UserError(f"--split {split}: the questions that come with isdaa have no splits; leave it out")
    if hub_file is not None or Path(source).expanduser().is_file():
        file = source if hub_file is None else f"{source}: {hub_file}"
        raise UserError(f"--split {split}: the questions are all in one file, {file}, which has no splits; leave it out")


def project_rows() -> list[Located]:
    """The project's own questions: rows of MT-Bench's format, with 'file:row'."""
    text = resources.files("isdaa.evaluation.benchmarks.sets").joinpath("questions", "project.jsonl").read_text(encoding="utf-8")
    return [(json.loads(line), f"project.jsonl:{number}") for number, line in enumerate(text.splitlines(), start=1)]


def downloaded(repo: str, file: str, repo_type: str, instead: str) -> str:
    """Path of a Hub repository's file. Raises UserError that ends with what to do `instead`."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repo, file, repo_type=repo_type)
    except Exception as error:  # network, permissions, unknown names: each has its own class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{repo}: {file} cannot be had from the Hub ({reason}); download it and {instead}") from None


def key_of(row: Row, names: Sequence[str], where: str, what: str) -> str:
    """The first of `names` that the row has. Raises UserError that says what belongs there."""
    for name in names:
        if row.get(name) is not None:
            return name
    if any(name in row for name in names):
        raise UserError(f"{where}: key '{names[0]}' is null; give {what} or remove the row")
    found = ", ".join(f"'{name}'" for name in row) or "none"
    raise UserError(f"{where}: key '{names[0]}' is missing{nearest(names[0], row)}; the keys are {found}; give {what}")


def text(row: Row, names: str | Sequence[str], where: str, what: str, *, empty: bool = False) -> str:
    """A text under the first of `names`; an answer may be `empty`, a question may not."""
    name = key_of(row, [names] if isinstance(names, str) else names, where, what)
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: key '{name}' must be text, not {kind(value)}; give {what}")
    if not empty and not value.strip():
        raise UserError(f"{where}: key '{name}' is empty; give {what} or remove the row")
    return value


def texts(row: Row, names: str | Sequence[str], where: str, what: str, *, empty: bool = False) -> tuple[str, ...]:
    """A list of at least one text."""
    name = key_of(row, [names] if isinstance(names, str) else names, where, what)
    value = row[name]
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{where}: key '{name}' must be a list of texts, not {kind(value)}; give {what}")
    if not value or not (empty or all(item.strip() for item in value)):
        raise UserError(f"{where}: key '{name}' is empty or has an empty text; give {what} or remove the row")
    return tuple(value)


def identity(row: Row, names: Sequence[str], where: str) -> str:
    """A question's id as text, from a text or a whole number."""
    name = key_of(row, names, where, "the question's id")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(f"{where}: key '{name}' must be an id (text or a whole number), not {kind(value)}")
    return str(value)


def objects(row: Row, name: str, where: str, what: str) -> list[Mapping[str, Any] | None]:
    """A list of objects; a null in it stays."""
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(item is None or isinstance(item, Mapping) for item in value):
        raise UserError(f"{where}: key '{name}' must be a list of objects, not {kind(value)}; give {what}")
    return value


def without_repeats(questions: Sequence[Question]) -> list[Question]:
    """The questions, if their ids differ. Raises UserError naming the second of two."""
    first: dict[str, str] = {}
    for question in questions:
        if question.id in first:
            raise UserError(
                f"{question.where}: question {question.id} is there already ({first[question.id]}); remove or rename one"
            )
        first[question.id] = question.where
    return list(questions)


def matched(answers: Iterable[Answer], questions: Sequence[Question], path: str | Path) -> list[Answer]:
    """Those answers that belong to the questions, model by model; all of them where no question is given.

    Raises UserError where one model answers a question twice, or nothing is answered at all.
    """
    wanted = {question.id: question for question in questions}
    found: dict[tuple[str, str], Answer] = {}
    for answer in answers:
        if wanted and answer.question not in wanted:
            continue
        key = (answer.model, answer.question)
        if key in found:
            raise UserError(
                f"{answer.where}: {answer.model} answers question {answer.question} again (first at {found[key].where}); "
                "remove one"
            )
        found[key] = answer
    models = dict.fromkeys(model for model, _ in found)
    if not models:
        raise UserError(f"{path}: no answer to any of the questions; give the answers that belong to these questions")
    answered = dict.fromkeys(question for _, question in found)
    return [found[model, question] for model in models for question in wanted or answered if (model, question) in found]


class Texts:
    """Which question a text is: a text that comes again is the next of its kind, model by model.

    Without questions a text names itself, so that two files pair whatever rows either lacks.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self.known: dict[str, list[str]] = {}
        for question in questions:
            self.known.setdefault(prompt_text(question), []).append(question.id)
        self.any = bool(questions)
        self.seen: Counter[tuple[str, str]] = Counter()
        self.said: dict[tuple[str, str, str], str] = {}

    def identify(self, text: str, model: str, where: str, said: Any) -> str:
        """The id of the question; one that no question has where the text is none of theirs.

        said: what the row has beside the text. Raises UserError where a model has more of a text than the questions have
        or, where there are no questions, the same row twice.
        """
        place = self.seen[text, model]
        self.seen[text, model] += 1
        known = self.known.get(text, [])
        if place < len(known):
            return known[place]
        if known:
            times = "once" if len(known) == 1 else f"{len(known)} times"
            raise UserError(
                f"{where}: {model} has the question {shortened(text)!r} again, which the questions have {times}; remove one"
            )
        first = self.said.setdefault((text, model, repr(said)), where)
        if first != where and not self.any:
            raise UserError(f"{where}: {model} has the question {shortened(text)!r} again, word for word ({first}); remove one")
        return f"{digest(text)}{f'-{place + 1}' if place else ''}"

    def check(self, path: str | Path) -> None:
        """Raises UserError where a text stands several times among the questions, and fewer times in the file: which is it?"""
        for (text, model), count in self.seen.items():
            among = len(self.known.get(text, []))
            if count < among:
                raise UserError(
                    f"{path}: {model} has {count} of the {among} questions {shortened(text)!r}, and nothing tells which; give "
                    "all of them or none"
                )


def shortened(text: str, most: int = 40) -> str:
    """The beginning of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def check_asked(asked: Any, turns: Sequence[str], question: Question, where: str) -> None:
    """Raises UserError where what a row says was asked holds none of the texts `turns`: its id means another question here.

    asked: text, or messages; anything else says nothing.
    """
    if isinstance(asked, list):
        asked = "\n".join(str(message.get("content")) for message in asked if isinstance(message, Mapping))
    if not isinstance(asked, str) or not asked.strip():
        return
    said = "".join(asked.split())
    if not any("".join(turn.split()) in said for turn in turns):
        raise UserError(
            f"{where}: question {question.id} asks something else here than at {question.where}; give the questions that "
            "belong to this file"
        )
