"""Checkpoints that think aloud: their answers are scored, judged and measured; thinking is stored, counted and said."""

import json
from pathlib import Path

import pytest
from benchmark_run_helpers import chat_model
from evaluation_helpers import WordCount, settings
from judge_server import replying, serving
from tokenizers_for_tests import byte_level

import isdaa.models.sampling.sampling
from isdaa.evaluation.checkpoints.analysis import analyse
from isdaa.evaluation.checkpoints.judged_samples import SampleJudge
from isdaa.evaluation.checkpoints.scoring import score
from isdaa.evaluation.checkpoints.trajectory import read_study
from isdaa.evaluation.evaluate import evaluate
from isdaa.evaluation.judges.types import Asking, JudgeSettings
from isdaa.evaluation.table import legend
from isdaa.foreign import read_json, read_jsonl
from isdaa.models.sampling.sampling import Sample
from isdaa.report.samples import samples_of

WORDS = byte_level("chatml")
OPENING = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
ROWS = [
    {"id": str(i), "prompt": [{"role": "user", "content": f"Say {i}."}], "prompt_ids": None, "chosen": f"<think>x</think>No {i}"}
    | {"facts": None, "where": str(i)}
    for i in range(4)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: chat_model(folder / name, seed) for seed, name in enumerate(("reference", "one"))}


def writing(monkeypatch, *texts: str) -> None:
    """Every model writes these in turn."""

    def written(model, prompts, *args, n=1, **kwargs):
        ids = [(*WORDS(text, add_special_tokens=False)["input_ids"], WORDS.eos_token_id) for text in texts]
        return [Sample(ids[i % len(ids)], True) for i in range(n * len(prompts))]

    monkeypatch.setattr(isdaa.models.sampling.sampling, "sample", written)


def drawn_again(monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("a sample was drawn again")

    monkeypatch.setattr(isdaa.models.sampling.sampling, "sample", refuse)


def run(models, out: Path, keep: bool = False, **more):
    options = {"settings": settings(opponent_samples=1, keep_thinking=keep, max_new_tokens=40), "prompts": ROWS} | more
    return evaluate([models["one"]], reference=models["reference"], output_dir=out, **options)


def test_the_answer_alone_is_scored_and_measured(models, tmp_path, monkeypatch):
    text = "<think>hm hm hm</think>SO it is"
    writing(monkeypatch, text)
    words = WordCount()
    metrics = run(models, tmp_path, scorer=words)
    assert {row["response"] for row in words.seen} == {"SO it is"} | {f"No {i}" for i in range(4)}  # the chosen, too
    length = len(WORDS("SO it is", add_special_tokens=False)["input_ids"])
    assert metrics["models"][0]["length"]["mean"] == metrics["reference"]["length"]["mean"] == length
    assert metrics["models"][0]["thinking"] == {"share": 0.5, "answers": 4, "only": 0, "unfinished": 0}
    (note,) = metrics["thinking"]["notes"]
    assert "50 % of the characters" in note and "neither scored nor counted as length" in note and "KL is of all tokens" in note
    assert note in legend(metrics) and note in read_study(tmp_path).notes
    records = [row for row in read_jsonl(tmp_path / "samples.jsonl") if "text" in row]
    assert {row["text"] for row in records} == {text}
    assert all(row["answer_tokens"] == length < row["tokens"] == len(row["ids"]) for row in records)
    study = read_study(tmp_path)
    shown = samples_of(study.runs[0], None)
    assert shown is not None
    (first, *_) = shown["prompts"][0]["responses"]
    assert (first["text"], first["thinking"]) == ("SO it is", "hm hm hm") and first["score"] == 3
    # With --keep_thinking all of it is scored; nothing is drawn again, and the former scores do not stand for it.
    drawn_again(monkeypatch)
    words = WordCount()
    metrics = run(models, tmp_path, keep=True, scorer=words)
    assert text in {row["response"] for row in words.seen}
    assert metrics["models"][0]["length"]["mean"] > length and "is scored and counted with" in metrics["thinking"]["notes"][0]


def test_records_of_an_earlier_version_are_parted_when_they_are_read(models, tmp_path, monkeypatch):
    writing(monkeypatch, "<think>hm hm hm</think>SO it is", "It is so.")
    run(models, tmp_path, scorer=WordCount())
    lines = read_jsonl(tmp_path / "samples.jsonl")
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "answer_tokens"}) + "\n" for row in lines))
    metrics = analyse(tmp_path)
    thought = next(row for row in lines if "answer_tokens" in row)
    plain = next(row for row in lines if row.get("text") == "It is so.")
    assert metrics["models"][0]["length"]["mean"] == pytest.approx((thought["tokens"] * 0.5 + plain["tokens"]) / 2)
    assert metrics["models"][0]["thinking"]["answers"] == 2
    # Scores that were given to all that was written do not count as those of the answers.
    words = WordCount()
    plan = read_json(tmp_path / "plan.json")
    assert plan["scorer"]["digest"] != words.digest
    score(tmp_path, words)
    assert not words.seen  # those of the answers are there


def test_a_prompt_that_opens_the_thought(models, tmp_path, monkeypatch):
    for name, folder in models.items():
        (tmp_path / name).mkdir()
        for file in Path(folder).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        (tmp_path / name / "chat_template.jinja").write_text(OPENING)
    writing(monkeypatch, "hm hm</think>SO", "I am cut")
    words = WordCount()
    metrics = run({name: str(tmp_path / name) for name in models}, tmp_path / "out", scorer=words)
    assert {row["response"] for row in words.seen if not str(row["response"]).startswith("No")} == {"SO", ""}
    assert metrics["models"][0]["thinking"] == {"share": pytest.approx(26 / 30), "answers": 4, "only": 2, "unfinished": 2}
    only = metrics["thinking"]["notes"][1]
    assert "without an answer: the reference 2, one 2; 4 of them never end it: raise --evaluation.max_new_tokens" in only


def test_without_thinking_keys_and_metrics_are_as_before(models, tmp_path, monkeypatch):
    writing(monkeypatch, "It is so.")
    words = WordCount()
    metrics = run(models, tmp_path, scorer=words)
    assert "thinking" not in metrics and "thinking" not in metrics["models"][0]
    assert not any("answer_tokens" in row or "opened" in row for row in read_jsonl(tmp_path / "samples.jsonl"))


def test_the_judge_is_not_sent_what_was_thought(models, tmp_path, monkeypatch):
    writing(monkeypatch, "<think>hm hm</think>SO", "<think>hm</think>So it is")
    with serving(replying("Better: A")) as server:

        def judge() -> SampleJudge:
            return SampleJudge(Asking(JudgeSettings("judge", base_url=server.url, retries=0)))

        rows = [{**row, "prompt": [{"role": "user", "content": "Say it."}]} for row in ROWS]
        options = {"prompts": rows, "judge_model": judge()}
        opponent = settings(opponent="chosen", opponent_samples=1, max_new_tokens=40)
        run(models, tmp_path, **options | {"settings": opponent})
        assert server.asked and not any("hm" in text or "<think>" in text for text in server.contents())
        before = len(server.asked)
        drawn_again(monkeypatch)
        kept = opponent.model_copy(update={"keep_thinking": True})
        run(models, tmp_path, **options | {"settings": kept, "judge_model": judge()})
        assert len(server.asked) > before and all("<think>" in text for text in server.contents()[before:])
