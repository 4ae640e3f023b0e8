"""Alignment tax: lm-eval's real evaluator on tiny models and tasks that the test writes, and scores worked by hand."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmark_run_helpers import judge_server
from chains import chat_model, jsonl, read_lines, refused
from hostile import ESCAPED, NAME, harmless, unwrapped

from isdaa.cli import main
from isdaa.evaluation.tax.scores import Answers, scores, sentence
from isdaa.evaluation.tax.table import MEAN, print_tax, tax_rows

FRUITS = ("pear", "plum", "fig", "quince", "apple")
PLACES = [
    {"question": f"What is in basket {i}?", "choices": [f"a {FRUITS[i % 5]}", "no idea", f"{i} {FRUITS[-1]}s"], "answer": i % 3}
    for i in range(12)
]
SUMS = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(6)]
TASKS: dict[str, dict[str, Any]] = {
    "baskets": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "num_fewshot": 1,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "few": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "sums": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
        "num_fewshot": 0,
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [
            {"name": "strict", "filter": [{"function": "take_first"}]},
            {"name": "loose", "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}]},
        ],
    },
}
GROUP = {"group": "both", "task": ["baskets", "few"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}


def write_tasks(folder: Path) -> Path:
    """A folder with three tasks, a group, and their data."""
    folder.mkdir()
    for name, rows in (("baskets", PLACES), ("few", PLACES[:4]), ("sums", SUMS)):
        data = jsonl(folder / f"{name}.jsonl", rows)
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **source, "fewshot_split": "test", **TASKS[name]}))
    (folder / "both.yaml").write_text(yaml.safe_dump(GROUP))
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tasks`, the models `before`, `after` and `twin` (the weights of `before`), and `first`, a measured tax."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (requirements-dev.txt has it)")
    folder = tmp_path_factory.mktemp("tax")
    write_tasks(folder / "tasks")
    chat_model(folder / "before", seed=0, initializer_range=1.0)
    chat_model(folder / "after", seed=1, initializer_range=1.0)
    shutil.copytree(folder / "before", folder / "twin")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(command("baskets", "sums", models=["after", "twin"], output="first")) == 0
    return folder


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`home` as the current folder."""
    monkeypatch.chdir(home)
    return home


def command(*tasks: str, models: list[str], output: str, more: tuple[str, ...] = ()) -> list[str]:
    where = ["--reference", "before", "--output", output, "--include_path", "tasks", "--evaluation.bootstrap", "200"]
    return ["tax", *tasks, "--model_path", *models, *where, *more]


def tax_of(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "tax.json").read_text())


def entry(model: dict[str, Any], task: str) -> dict[str, Any]:
    return next(found for found in model["tasks"] if found["task"] == task)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any model that is loaded from here on is an error."""

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model is loaded for what is on disk")

    monkeypatch.setattr("isdaa.evaluation.tax.tax.load_for_tasks", load)


def plain_lm_eval(model: str, task: str, shots: int | None = None) -> dict[str, float]:
    """lm-eval by itself, as its own users call it."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path="tasks", include_defaults=False)
    arguments = {"pretrained": model, "device": "cpu", "dtype": "float32"}
    found: Any = simple_evaluate(
        "hf", model_args=arguments, tasks=[task], num_fewshot=shots, task_manager=manager, batch_size=4, bootstrap_iters=0
    )
    return found


def kept(folder: str, model: str, task: str) -> list[dict[str, Any]]:
    """Records of a task under a model."""
    lines = read_lines(Path(folder) / "tax.jsonl")
    heads = {line["block"] for line in lines if "header" in line and line["model"] == model}
    return [line for line in lines if line.get("task") == task and line["block"] in heads]


def test_scores_are_those_of_lm_eval_itself(place: Path) -> None:
    after, twin = tax_of("first")["models"]
    for task in ("baskets", "sums"):
        own = plain_lm_eval("after", task)
        for metric, found in entry(after, task)["metrics"].items():
            assert found["score"]["mean"] == pytest.approx(own["results"][task][metric]), (task, metric)
        answers = {sample["doc_id"]: [answer[0] for answer in sample["resps"]] for sample in own["samples"][task]}
        for record in kept("first", "after", task):
            expected = [value if isinstance(value, str) else value[0] for value in answers[record["item"]]]
            assert record["answers"] == (expected if task == "sums" else pytest.approx(expected, rel=1e-4)), record
    assert list(entry(after, "baskets")["metrics"]) == ["acc,none", "acc_norm,none"]
    assert entry(after, "baskets")["shots"] == 1
    assert list(entry(after, "sums")["metrics"]) == ["exact_match,strict", "exact_match,loose"]
    assert entry(after, "sums")["shots"] == 0
    assert entry(after, "baskets")["items"] == entry(after, "baskets")["of"] == 12
    assert twin["label"] == "twin"


def test_differences_are_paired_by_item(place: Path) -> None:
    tax = tax_of("first")
    after, twin = tax["models"]
    ones, others = ([line["values"]["acc,none"] for line in kept("first", name, "baskets")] for name in ("after", "before"))
    gaps = [one - other for one, other in zip(ones, others, strict=True)]
    assert any(gaps), "models that answer alike show nothing"
    found, base = entry(after, "baskets"), entry(tax["reference"], "baskets")
    assert found["difference"]["mean"] == pytest.approx(sum(gaps) / 12)
    assert found["difference"]["mean"] == pytest.approx(found["score"]["mean"] - base["score"]["mean"])
    assert found["difference"]["low"] <= found["difference"]["mean"] <= found["difference"]["high"]
    # The same weights: no difference, and no doubt about it, though each score alone is uncertain.
    assert entry(twin, "baskets")["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 12}
    assert entry(twin, "baskets")["score"]["low"] < entry(twin, "baskets")["score"]["high"]
    assert twin["mean"]["difference"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 18}
    assert not kept("first", "twin", "baskets"), "the twin's answers are the reference's"


def test_the_table_and_its_rows(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    forbid(monkeypatch)
    capsys.readouterr()
    former = [
        "--tax-include-path" if word == "--include_path" else word for word in command(models=["after", "twin"], output="first")
    ]
    for asked in (
        ["evaluate", *former[1:], "--tax", "baskets", "sums"],
        command("baskets", "sums", models=["after", "twin"], output="first"),
    ):
        assert main(asked) == 0
    shown = capsys.readouterr()
    for text in ("baskets (acc)", "sums (exact_match, strict)", MEAN, "+0.000 ± 0.000", "alignment tax of after: "):
        assert text in shown.out, shown.out
    assert "below zero, alignment cost ability" in shown.out
    assert "lm_eval" not in shown.err and "it/s" not in shown.err, shown.err
    rows = tax_rows(tax_of("first"))
    assert [(row["task"], row["model"]) for row in rows[:3]] == [("baskets", name) for name in ("reference", "after", "twin")]
    assert [row["difference"] is None for row in rows] == [True, False, False] * 3
    assert rows[-1]["task"] == MEAN


def test_a_killed_call_goes_on_and_a_changed_task_is_asked_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isdaa.evaluation.tax.harness import Harness

    output, tasks = tmp_path / "records", tmp_path / "tasks"
    write_tasks(tasks)
    argv = command("baskets", "few", models=["after"], output=str(output))
    argv[argv.index("tasks")] = str(tasks)
    asked: list[str] = []
    run = Harness.run

    def counted(self: Any, lm: Any, task: Any, part: Any, *rest: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(part.name)
        return run(self, lm, task, part, *rest)

    monkeypatch.setattr(Harness, "run", counted)
    assert main(argv) == 130
    with open(output / "tax.jsonl", "a") as file:
        file.write('{"header": "tax", "block": "cut o')  # what a kill during a write leaves
    assert asked == ["baskets", "few", "baskets"]
    monkeypatch.setattr(Harness, "run", lambda *rest: asked.append(rest[3].name) or run(*rest))
    assert main(argv) == 0
    assert asked == ["baskets", "few", "baskets", "few"]
    assert len(tax_of(str(output))["models"][0]["tasks"]) == 2
    jsonl(tasks / "few.jsonl", PLACES[:5])
    assert main(argv) == 0
    assert asked[4:] == ["few", "few"]
    assert entry(tax_of(str(output))["reference"], "few")["items"] == 5


def test_limit_shots_and_groups(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--limit", "3", "--shots", "both=2", "--batch_size", "2")
    assert main(command("both", models=["after"], output="limited", more=more)) == 0
    tax = tax_of("limited")
    (found,) = tax["models"][0]["tasks"]
    own = plain_lm_eval("after", "few", shots=2)["samples"]["few"]
    for record in kept("limited", "after", "few"):
        expected = next(sample["resps"] for sample in own if sample["doc_id"] == record["item"])
        assert record["answers"] == pytest.approx([answer[0][0] for answer in expected], rel=1e-4)
    assert (found["task"], found["items"], found["of"], found["shots"], found["metric"]) == ("both", 6, 16, 2, "acc,none")
    assert {line["part"] for line in read_lines(Path("limited/tax.jsonl")) if "header" in line} == {"baskets", "few"}
    assert tax["models"][0]["mean"] is None
    shown = capsys.readouterr().out
    assert "Not every item was asked (`isdaa tax --limit`): both." in shown
    assert "Under 50 items, where intervals are somewhat too narrow: both." in shown


def test_the_machine_is_not_described_once_a_part_and_lm_eval_is_left_as_it_was(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator
    import lm_eval.models.huggingface
    import torch.utils.collect_env

    theirs = [lm_eval.evaluator.add_env_info, lm_eval.evaluator.get_git_commit_hash, lm_eval.models.huggingface.tqdm]
    monkeypatch.setattr(torch.utils.collect_env, "get_pretty_env_info", lambda: pytest.fail("pip is started"))
    assert main(command("few", models=["after"], output="undescribed")) == 0
    assert theirs == [lm_eval.evaluator.add_env_info, lm_eval.evaluator.get_git_commit_hash, lm_eval.models.huggingface.tqdm]
    with pytest.raises(pytest.fail.Exception):
        plain_lm_eval("after", "few")


def test_a_task_and_a_group_that_holds_it_keep_their_own_numbers_of_examples(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("both", "baskets", "few", models=["after"], output="twice", more=("--shots", "few=2"))) == 0
    reference = tax_of("twice")["reference"]
    assert [found["shots"] for found in reference["tasks"]] == [[0, 1], 1, 2]
    assert "0 to 1" in capsys.readouterr().out
    blocks = [(line["part"], line["count"]) for line in read_lines(Path("twice/tax.jsonl")) if "header" in line]
    assert blocks[: len(blocks) // 2] == [("baskets", 12), ("few", 4), ("few", 4)], "baskets is asked once for both names"


def test_a_chat_template_and_prompts_that_do_not_fit(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--limit", "2", "--chat_template", "--shots", "baskets=10")
    assert main(command("baskets", models=["after"], output="chat", more=more)) == 0
    assert "Prompts longer than a model's context lost their beginning: baskets" in capsys.readouterr().out
    assert entry(tax_of("chat")["reference"], "baskets")["truncated"]


def test_a_chat_template_that_cannot_be_used_is_named_by_its_file(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "after", tmp_path / "broken")
    (tmp_path / "broken" / "chat_template.jinja").write_text("{% if")
    argv = command("few", models=[str(tmp_path / "broken")], output=str(tmp_path / "out"), more=("--chat_template",))
    refused(capsys, argv, "broken/chat_template.jinja: the chat template refuses", "TemplateSyntaxError")
    assert not (tmp_path / "out").exists()


def test_a_benchmarks_page_shows_the_tax_of_its_models(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "records"
    records.mkdir()
    shutil.copy("first/tax.jsonl", records)
    where = ["--output", str(records / "mt_bench"), "--limit", "2", "--max_new_tokens", "4", "--evaluation.bootstrap", "100"]
    asked = ["benchmark", "mt_bench", "--model_path", "after", "--questions", "project", *where]
    with judge_server(lambda talk: "[[5]]") as (_, url):
        assert main([*asked, "--judge_model", "toy", "--judge_base_url", url]) == 0
    page = records / "mt_bench" / "report.html"
    assert "Alignment tax" not in page.read_text()
    capsys.readouterr()
    assert main(command("baskets", "sums", models=["after", "twin"], output=str(records))) == 0
    assert f"report: {page}" in capsys.readouterr().out
    after, twin = tax_of(str(records))["models"]
    shown = page.read_text()
    assert after["sentence"].removeprefix("a") in shown and twin["sentence"].removeprefix("a") not in shown
    difference = entry(after, "baskets")["difference"]["mean"]
    assert f"{difference:+.3f} ±".replace("-", "−") in shown
    assert all(text in shown for text in ("baskets (acc)", "sums (exact_match, strict)", MEAN, 'id="tax"'))
    assert (page.parent / "charts" / "tax.svg").is_file()


def test_the_five_tasks_are_known_with_the_leaderboards_examples(place: Path) -> None:
    from isdaa.evaluation.tax.harness import SHOTS, Harness

    harness = Harness(list(SHOTS), {"gsm8k": 8})
    asked = {task.name: task for task in harness.asked}
    assert [(name, task.shots, len(task.parts)) for name, task in asked.items()] == [
        ("mmlu", 5, 57), ("gsm8k", 8, 1), ("arc_challenge", 25, 1), ("hellaswag", 10, 1), ("winogrande", 5, 1),
    ]  # fmt: skip
    assert asked["mmlu"].by_size
    (subject,) = Harness(["mmlu_anatomy"], {}).asked
    assert subject.shots == 5
    assert subject.parts[0] in asked["mmlu"].parts


def test_bad_input_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import lm_eval.tasks

    gsm8k = str(Path(lm_eval.__file__).parent / "tasks" / "gsm8k")

    class Few(lm_eval.tasks.TaskManager):
        """One task in the place of all of lm-eval's, which take it ten seconds."""

        def __init__(self, include_path: Any = None, **options: Any) -> None:
            super().__init__(include_path=include_path or gsm8k, include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    base = ["--model_path", "after", "--reference", "before", "--output", "refused"]
    refused(capsys, ["tax", "gsm8kk", *base], "no task 'gsm8kk'", 'did you mean "gsm8k"?')
    refused(capsys, ["tax", "gsm8k", *base, "--limit", "some"], "--limit", "'some'")
    refused(capsys, ["tax", "gsm8k", *base, "--shots", "5"], "--shots", "TASK=N")
    refused(capsys, ["tax", "gsm8k", *base, "--shots", "mmlu=5"], "mmlu is not among the tasks", "gsm8k")
    refused(capsys, ["tax", "gsm8k", *base, "--data", "rows.jsonl"], "--data", "no effect with `isdaa tax`")
    refused(capsys, ["tax", "gsm8k", *base, "--include_path", "nowhere"], "nowhere", "no such folder")
    refused(capsys, ["tax", "gsm8k", "--model_path", "after"], "--reference")
    refused(capsys, ["tax", "--model_path", "after", "gsm8k"], "gsm8k: is a task", "isdaa tax gsm8k --model_path")
    fixed = command("sums", models=["after"], output="refused", more=("--shots", "sums=2"))
    refused(capsys, fixed, "sums fixes 0 examples", "leave sums=2 out")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    refused(capsys, ["tax", *base], "lm-eval is not installed", "pip install 'isdaa[lm-eval]'")
    assert not Path("refused").exists()


def test_a_task_that_cannot_be_loaded_says_which(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    (tasks / "few.jsonl").unlink()
    argv = command("few", models=["after"], output=str(tmp_path / "out"))
    argv[argv.index("tasks")] = str(tasks)
    refused(capsys, argv, "few: lm-eval cannot load this task")


def answers(name: str, values: dict[str, list[float]], by_size: bool = True, **changes: Any) -> Answers:
    """A task, or a group of several, with the metric `acc`."""
    items = [
        {"task": task, "item": i, "doc": str(i), "values": {"acc,none": value}}
        for task, column in values.items()
        for i, value in enumerate(column)
    ]
    metric = {"value": 0.0, "by_item": True, "higher": True} | changes
    results = {task: {"shots": 0, "of": len(column), "metrics": {"acc,none": metric}} for task, column in values.items()}
    return Answers(name, [{"results": results, "truncated": False}], items, by_size)


OPTIONS: dict[str, Any] = {"bootstrap": 500, "confidence": 0.95, "seed": 0}


def test_groups_count_items_or_tasks() -> None:
    values = {"a": [1.0] * 30, "b": [0.0] * 10}
    for by_size, mean in ((True, 0.75), (False, 0.5)):
        (found,) = scores([answers("g", values, by_size)], None, **OPTIONS)["tasks"]
        assert found["score"]["mean"] == pytest.approx(mean)
        assert found["difference"] is None


def test_the_mean_of_tasks_and_its_sentence() -> None:
    better, worse = [1.0] * 60 + [0.0] * 40, [1.0] * 30 + [0.0] * 70
    reference = [answers("a", {"a": better}), answers("b", {"b": worse})]
    measured = scores([answers("a", {"a": worse}), answers("b", {"b": worse})], reference, **OPTIONS)
    assert measured["mean"]["score"]["mean"] == pytest.approx(0.3)
    gap = measured["mean"]["difference"]
    assert gap["mean"] == pytest.approx(-0.15)
    # Half of the spread of a's difference, since b's is none: 1.96 * sqrt(0.3 * 0.7 / 100) / 2.
    assert (gap["high"] - gap["low"]) / 2 == pytest.approx(0.045, abs=0.006)
    line = sentence("m", measured)
    assert line.startswith("alignment tax of m: -0.150 ± 0.0")
    assert line.endswith("over 2 tasks; worse on a")


def tax_with(measured: dict[str, Any], reference: list[Answers]) -> dict[str, Any]:
    """What `tax.json` holds of one model's scores, as far as a table needs it."""
    model = {"label": "m", "path": "m", **measured}
    return {"statistics": OPTIONS, "reference": {"path": "r", **scores(reference, None, **OPTIONS)}, "models": [model]}


@pytest.mark.parametrize(("differing", "alike"), [(5, 0), (6, 0), (5, 95), (6, 94)])
def test_fewer_differing_items_than_a_sign_test_needs_are_not_marked(differing: int, alike: int) -> None:
    reference = [answers("a", {"a": [1.0] * (differing + alike)})]
    measured = scores([answers("a", {"a": [0.0] * differing + [1.0] * alike})], reference, **OPTIONS)
    assert measured["tasks"][0]["difference"]["high"] < 0, "the interval alone would be marked"
    assert [row["clear"] for row in tax_rows(tax_with(measured, reference))] == [0, -1 if differing == 6 else 0]
    assert sentence("m", measured).endswith("; worse on a" if differing == 6 else "; clearly worse on none")


def test_the_mean_of_tasks_is_not_marked_by_a_task_of_few_items() -> None:
    """Two items that were lost weigh as much as a hundred: the mean's interval has no width, and says nothing."""
    reference = [answers("few", {"few": [1.0] * 2}), answers("many", {"many": [1.0, 0.0] * 50})]
    measured = scores([answers("few", {"few": [0.0] * 2}), answers("many", {"many": [0.0, 1.0] * 50})], reference, **OPTIONS)
    assert measured["mean"]["difference"]["high"] < 0 and measured["mean"]["differing"] == 2
    assert [row["clear"] for row in tax_rows(tax_with(measured, reference))] == [0] * 6


def test_metrics_that_are_no_means_and_metrics_of_which_less_is_better() -> None:
    def corpus(value: float) -> list[Answers]:
        return [answers("bleu", {"bleu": [0.0, 1.0]}, by_item=False, value=value), answers("a", {"a": [1.0, 0.0]})]

    measured = scores(corpus(3.0), corpus(5.0), **OPTIONS)
    assert measured["tasks"][0]["difference"] == {"mean": -2.0, "low": None, "high": None, "n": 2}
    assert measured["mean"] is None
    reference = [answers("loss", {"loss": [1.0] * 9}, higher=False)]
    measured = scores([answers("loss", {"loss": [2.0] * 9}, higher=False)], reference, **OPTIONS)
    assert "worse on loss" in sentence("m", measured)


def test_other_items_are_not_paired() -> None:
    from isdaa.errors import UserError

    with pytest.raises(UserError, match=r"a: its data changed"):
        scores([answers("a", {"a": [1.0, 0.0]})], [answers("a", {"a": [1.0]})], **OPTIONS)


def test_a_hostile_name_is_text() -> None:
    reference = [answers(NAME, {NAME: [1.0] * 9})]
    tax = tax_with(scores([answers(NAME, {NAME: [0.0] * 9})], reference, **OPTIONS), reference)
    tax["models"][0] |= {"label": NAME, "sentence": f"of {NAME}"}
    tax |= {"settings": {"limit": None, "chat_template": False}}
    out = io.StringIO()
    print_tax(tax, out)
    harmless(out.getvalue())
    assert unwrapped(out.getvalue()).count(unwrapped(ESCAPED)) == 2  # the table folds it
