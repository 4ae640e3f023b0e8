"""A verdict from a judge model: checkpoints' samples through a real endpoint on loopback, up to the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import jsonl
from evaluation_helpers import TOKENIZATION, TOKENIZER, moved, save, settings, tiny, world_rows
from judge_server import Answer, JudgeServer, completion, replying, serving, sides

from isdaa.cli import main
from isdaa.errors import DoneInPart, UserError
from isdaa.evaluation.checkpoints.judged_samples import SampleJudge, question_of
from isdaa.evaluation.checkpoints.trajectory import trajectories
from isdaa.evaluation.evaluate import evaluate
from isdaa.evaluation.judges.types import Asking, JudgeSettings
from isdaa.foreign import read_json
from isdaa.world import make_posts

PROMPTS = 32


def ending(model: Any, strength: float) -> Any:
    """The model, whose responses end sooner the larger the strength: EOS has a logit that much higher on average."""
    ids = [TOKENIZER(row["prompt"])["input_ids"][:32] for row in world_rows(8)]
    with torch.no_grad():
        hidden = torch.cat([model.model(torch.tensor([row])).last_hidden_state[0] for row in ids]).mean(0)
        model.lm_head.weight[TOKENIZER.eos_token_id] += strength * hidden / hidden.square().sum()
    return model


def built(folder: Path, start: float, run: list[tuple[float, float]]) -> dict[str, str]:
    """A reference and the checkpoints of a run, each (how far it moved, how much sooner it ends)."""
    reference = ending(tiny(), start)
    found = {"reference": save(reference, folder / "reference")}
    for step, (size, strength) in enumerate(run, start=1):
        found[f"checkpoint-{step}0"] = save(ending(moved(reference, size), strength), folder / "run" / f"checkpoint-{step}0")
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models whose answers are hardly ever empty, and so hardly ever equal."""
    return built(tmp_path_factory.mktemp("judged"), -2.0, [(0.02, 4.0), (0.03, 8.0), (0.05, 2.0), (0.3, -12.0)])


@pytest.fixture(scope="module")
def falling(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run whose answers first become shorter, then longer again, while it moves further and further away."""
    return built(tmp_path_factory.mktemp("falling"), 1.5, [(0.02, 2.5), (0.03, 6.0), (0.05, 1.0), (0.12, -14.0)])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    rows = [{"id": p["id"], "prompt": p["prompt"], "chosen": p["summary"]} for p in make_posts("small", PROMPTS, split="eval")]
    file.write_text("".join(json.dumps({**row, "rejected": "no"}) + "\n" for row in rows))
    return str(file)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def command(models: dict[str, str], prompts: str, out: Path, url: str, *more: str) -> list[str]:
    steps = [path for name, path in models.items() if name != "reference"]
    words = ["report", "--checkpoints", *steps, "--reference", models["reference"], "--data", prompts]
    words += ["--evaluation.prompts", str(PROMPTS), "--evaluation.max_new_tokens", "12", "--evaluation.bootstrap", "100"]
    words += ["--evaluation.temperature", "1", "--evaluation.top_p", "1", "--output", str(out)]
    words += ["--tokenization.max_length", "128", "--tokenization.max_prompt_length", "96"]
    return [*words, "--judge_model", "judge", "--judge_base_url", url, *more]


def shorter(number: int, body: dict[str, Any]) -> Answer:
    first, second = sides(body)
    return Answer(f"One is shorter.\nBetter: {'A' if len(first) < len(second) else 'B'}")


def run(models: dict[str, str], out: Path, server: JudgeServer | str, names: tuple[str, ...] = ("20", "40"), **more: Any) -> Any:
    """An evaluation in Python, with its judge. What is no setting of the judge's is one of `evaluate`'s."""
    url = server if isinstance(server, str) else server.url
    asked = {key: more.pop(key) for key in list(more) if key in JudgeSettings.__dataclass_fields__}
    chosen = Asking(JudgeSettings(**{"model": "judge", "base_url": url, "retries": 0} | asked))
    judge = SampleJudge(more.pop("asking", chosen), more.pop("template", "hh"))
    options = {"settings": settings(opponent_samples=1, max_new_tokens=12), "prompts": world_rows()} | more
    paths = [models[f"checkpoint-{name}"] for name in names]
    metrics = evaluate(
        paths, reference=models["reference"], tokenization=TOKENIZATION, output_dir=out, judge_model=judge, **options
    )
    return metrics, judge


def rates(metrics: dict[str, Any]) -> list[float]:
    return [model["win_rate"]["mean"] for model in metrics["models"]]


def test_a_judge_that_prefers_shorter_answers_gives_the_verdict_and_the_page(
    falling: dict[str, str], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    home = Path(falling["checkpoint-10"]).parent
    with serving(shorter) as server:
        assert main(command(falling, prompts, tmp_path / "page", server.url)) == 0
        told = capsys.readouterr()
        asked = len(server.asked)
        assert main(command(falling, prompts, tmp_path / "page", server.url)) == 0
        assert len(server.asked) == asked
    assert f"at most {2 * PROMPTS * 4} requests ({PROMPTS} prompts × 4 models × 1 opponent (" in " ".join(told.err.split())
    assert "all is judged already, so nothing is asked" in " ".join(capsys.readouterr().err.split())
    report = read_json(tmp_path / "page/report.json")
    (found,) = report["runs"]
    wins = [row["win_rate"]["mean"] for row in found["checkpoints"]]
    assert found["verdict"]["finding"] == "over-optimised" and wins[1] > 0.9 > 0.75 > wins[-1]
    assert found["recommended"]["label"] in ("checkpoint-10", "checkpoint-20")
    assert "judged by judge (contradicts itself on" in report["summary"] and report["scorer"]["kind"] == "judge"
    assert all(row["reward"] is None for row in found["checkpoints"]) and report["samples"][0]["prompts"]
    page = (tmp_path / "page/report.html").read_text(encoding="utf-8")
    assert "Win rate and distance" in page and "--judge_model judge --judge_base_url" in page
    assert "reward" not in told.out
    # The page is read again without a judge and without a server.
    evaluations = list(home.rglob("judged.jsonl"))
    (run_,) = trajectories(evaluations[0].parent)
    assert run_.wins is not None and run_.rewards is None and run_.start == 0.5
    assert run_.wins.shape == run_.kl.shape == (4, PROMPTS)


def test_a_judge_of_one_place_gives_half_and_says_that_it_contradicts_itself(models: dict[str, str], tmp_path: Path) -> None:
    with serving(replying("Better: A")) as server:
        metrics, judge = run(models, tmp_path, server)
    assert rates(metrics) == [0.5, 0.5] and judge.stopped is None
    assert metrics["judged"]["flip_rate"] == 1.0 and "contradicts itself on 100 %" in metrics["judged"]["notes"][0]
    assert metrics["models"][0]["tie_rate"] == 1.0 and metrics["models"][0]["reward"] is None


def test_win_rates_follow_from_the_texts(models: dict[str, str], tmp_path: Path) -> None:
    with serving(shorter) as server:
        metrics, _ = run(models, tmp_path, server, settings=settings(opponent_samples=2, max_new_tokens=12))
    plan = read_json(tmp_path / "plan.json")
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    def texts(block: str) -> list[str]:
        return [line["text"].strip() for line in lines if line["block"] == block and "header" not in line]

    for model, entry in zip(plan["models"], metrics["models"], strict=True):
        # The judge says B where lengths are equal: each order's first text loses once, a tie.
        values = [
            0.5 if len(own) == len(other) else float(len(own) < len(other))
            for block in plan["reference"]["opponents"]
            for own, other in zip(texts(model["samples"]), texts(block), strict=True)
        ]
        assert entry["win_rate"]["mean"] == pytest.approx(sum(values) / len(values))


def test_equal_texts_are_a_tie_that_nobody_is_asked_about(models: dict[str, str], tmp_path: Path) -> None:
    greedy = settings(opponent_samples=1, temperature=0)
    with serving(replying("Better: A")) as server:
        paths = {"checkpoint-20": models["reference"], "reference": models["reference"]}
        metrics, _ = run(paths, tmp_path, server, names=("20",), settings=greedy)
        assert server.asked == []
    assert rates(metrics) == [0.5] and metrics["judged"]["same"] == 8 and metrics["judged"]["flip_rate"] is None


def test_a_spent_budget_leaves_whole_prompts_and_the_next_call_goes_on(models: dict[str, str], tmp_path: Path) -> None:
    with serving(shorter) as server:
        metrics, judge = run(models, tmp_path, server, max_requests=14, concurrency=1)
        first = metrics["judged"]
        assert len(server.asked) == 14 and 3 <= first["prompts"] < 8 == first["of"]
        assert judge.stopped and f"{first['prompts']} of 8 prompts" in judge.stopped and "--max_requests" in judge.stopped
        assert "Judged in part" in first["notes"][0] and metrics["prompts"] == first["prompts"]
        (found,) = trajectories(tmp_path)
        assert found.wins.shape == found.kl.shape == found.lengths.shape == (2, first["prompts"])
        metrics, judge = run(models, tmp_path, server)
        assert judge.stopped is None and metrics["judged"]["prompts"] == 8
        asked = [json.dumps(body["messages"]) for body in server.asked]
        assert len(set(asked)) == len(asked)  # nothing twice
    with serving(shorter) as server:
        again, _ = run(models, tmp_path / "at-once", server)
    assert rates(again) == rates(metrics)


def test_a_budget_that_completes_no_prompt_is_one_line_and_is_not_lost(models: dict[str, str], tmp_path: Path) -> None:
    with serving(shorter) as server:
        with pytest.raises(DoneInPart, match=r"no prompt is judged .* of --max_requests are used up"):
            run(models, tmp_path, server, max_requests=2)
        metrics, _ = run(models, tmp_path, server)
        assert metrics["judged"]["prompts"] == 8 and len({json.dumps(b["messages"]) for b in server.asked}) == len(server.asked)


def test_the_command_ends_with_3_after_the_page_is_written(
    models: dict[str, str], prompts: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(shorter) as server:
        words = command(models, prompts, tmp_path / "page", server.url, "--judge_template", "tldr", "--max_requests", "60")
        assert main([*words, "--judge_price_in", "1", "--judge_price_out", "2"]) == 3
        assert "Here are a forum post" in server.contents()[0]
    told = capsys.readouterr()
    assert "which cost about" in told.err and "is enough for about 7 of the prompts" in " ".join(told.err.split())
    assert (tmp_path / "page/report.html").is_file() and "Judged in part: all numbers are of the" in told.out
    assert told.err.splitlines()[-1].startswith("isdaa: error: ") and "the same command goes on" in told.err
    assert any("Judged in part" in note for note in read_json(tmp_path / "page/report.json")["notes"])


def test_replies_that_cannot_be_read_leave_their_prompts_out(models: dict[str, str], tmp_path: Path) -> None:
    lost = world_rows()[2]["prompt"].strip()

    def mumbling(number: int, body: dict[str, Any]) -> Answer:
        return Answer("Hm, both.") if lost in body["messages"][-1]["content"] else shorter(number, body)

    with serving(mumbling) as server:
        metrics, judge = run(models, tmp_path, server)
        asked = len(server.asked)
        again, _ = run(models, tmp_path, server)
        assert len(server.asked) == asked  # an unreadable reply is a reply
    assert metrics["judged"]["prompts"] == 7 and metrics["judged"]["unread"] == 1 and judge.stopped is None
    assert "1 of 8 prompts are left out" in metrics["judged"]["notes"][0] and again["judged"] == metrics["judged"]
    with serving(replying("Hm.")) as server, pytest.raises(DoneInPart, match="no prompt has a reply that could be read"):
        run(models, tmp_path / "none", server)


def test_a_reply_that_did_not_come_is_asked_for_again(models: dict[str, str], tmp_path: Path) -> None:
    def failing(number: int, body: dict[str, Any]) -> Answer:
        return Answer(status=500) if number == 5 else shorter(number, body)

    with serving(failing) as server:
        metrics, _ = run(models, tmp_path, server, concurrency=1)
        assert metrics["judged"]["unread"] == 1
        before = len(server.asked)
        metrics, _ = run(models, tmp_path, server, concurrency=1)
        assert metrics["judged"]["prompts"] == 8 and len(server.asked) == before + 1


def test_reasons_that_pass_are_done_in_part_and_others_are_told(models: dict[str, str], tmp_path: Path) -> None:
    lost = [row["prompt"].strip() for row in world_rows()[4:6]]

    def full(number: int, body: dict[str, Any]) -> Answer:
        which = next((i for i, prompt in enumerate(lost) if prompt in body["messages"][-1]["content"]), None)
        return Answer(status=429) if which == 0 else Answer("<think>Better: A</think>") if which == 1 else shorter(number, body)

    with serving(full) as server:
        metrics, judge = run(models, tmp_path, server, concurrency=1)
    (calls, thoughts) = (
        {row["lack"]: row for row in metrics["judged"]["lacks"]}[name] for name in ("rate-limited", "thought only")
    )
    assert calls["prompts"] == thoughts["prompts"] == 1 and calls["tokens"] > 0
    count = calls["replies"]
    assert judge.stopped is not None and judge.stopped.endswith(
        f"{count} replies did not come (rate-limited {count}): the same command asks for them again"
    )
    notes = " ".join(metrics["judged"]["notes"])
    assert f"rate-limited {count}" in notes and f"thought only {thoughts['replies']}" in notes and "Thought only: " in notes


def test_the_page_tells_why_prompts_are_left_out(
    models: dict[str, str], prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lost = json.loads(Path(prompts).read_text().splitlines()[4])["prompt"].strip()

    def mumbling(number: int, body: dict[str, Any]) -> Answer:
        return Answer("Hm, both.") if lost in body["messages"][-1]["content"] else shorter(number, body)

    with serving(mumbling) as server:
        assert main(command(models, prompts, tmp_path / "page", server.url)) == 0
    page = (tmp_path / "page/report.html").read_text()
    assert "Prompts without a verdict" in page and '<td class="l">unreadable</td>' in page
    assert read_json(tmp_path / "page/report.json")["judged"]["lacks"][0]["prompts"] == 1


def test_more_room_asks_only_the_replies_that_were_cut(models: dict[str, str], tmp_path: Path) -> None:
    lost = world_rows()[2]["prompt"].strip()

    def cut(number: int, body: dict[str, Any]) -> Answer:
        short = lost in body["messages"][-1]["content"] and body["max_tokens"] < 900
        return Answer(body=completion("Better: A", finish_reason="length")) if short else shorter(number, body)

    with serving(cut) as server:
        metrics, judge = run(models, tmp_path, server)
        count = next(row["replies"] for row in metrics["judged"]["lacks"] if row["lack"] == "cut")
        asked = len(server.asked)
        assert metrics["judged"]["unread"] == 1 and judge.stopped is None and count > 0
        run(models, tmp_path, server)
        assert len(server.asked) == asked
        # A higher limit is the same judge: `Replaces` is not raised, and what was read stays.
        settings = Asking(JudgeSettings("judge", base_url=server.url, retries=0, max_tokens=900), own_max_tokens=True)
        metrics, _ = run(models, tmp_path, server, asking=settings)
        assert len(server.asked) == asked + count
        assert metrics["judged"]["prompts"] == 8 and metrics["judged"]["lacks"] == []
        run(models, tmp_path, server, asking=settings)
        run(models, tmp_path, server)
        assert len(server.asked) == asked + count


def test_replies_are_parsed_again_and_not_asked_again(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(shorter) as server:
        before, _ = run(models, tmp_path, server, keep=True)
        asked = len(server.asked)
        monkeypatch.setattr("isdaa.evaluation.checkpoints.judged_samples.FORMAT", 3)
        _, judge = run(models, tmp_path / "other", server)
        with monkeypatch.context() as patch:
            patch.setattr(SampleJudge, "digests", property(lambda self: (self.digest, before["scorer"]["digest"])))
            more = len(server.asked)
            again, _ = run(models, tmp_path, server, keep=True)
        assert len(server.asked) == more == 2 * asked
        assert rates(again) == rates(before) and again["scorer"]["digest"] == judge.digest != before["scorer"]["digest"]


def test_a_judge_that_dies_half_way_loses_no_reply(models: dict[str, str], tmp_path: Path) -> None:
    with serving(lambda number, body: shorter(number, body) if number < 9 else Answer(status=401)) as server:
        with pytest.raises(UserError):
            run(models, tmp_path, server, concurrency=1)
        answered = [json.dumps(body["messages"]) for body in server.asked[:9]]
    assert not (tmp_path / "metrics.json").exists()
    with serving(shorter) as server:
        metrics, _ = run(models, tmp_path, server)
        assert not {json.dumps(body["messages"]) for body in server.asked} & set(answered)
    assert metrics["judged"]["prompts"] == 8
    # As a kill leaves it where an earlier evaluation stands: the plan is new, the metrics are not.
    plan = read_json(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"scorer": None}))
    with pytest.raises(UserError, match="its last evaluation was cut off"):
        trajectories(tmp_path)


def test_a_checkpoint_more_is_judged_beside_the_others(models: dict[str, str], tmp_path: Path) -> None:
    with serving(shorter) as server:
        before, _ = run(models, tmp_path, server, names=("20", "40"))
        count = len(server.asked)
        metrics, _ = run(models, tmp_path, server, names=("30",), keep=True)
        assert 0 < len(server.asked) - count <= 2 * 8
        assert metrics["models"][:2] == before["models"] and len(metrics["models"]) == 3
        with pytest.raises(UserError, match=r"another scorer \(judge\), which is not replaced"):
            run(models, tmp_path, server, names=("30",), keep=True, model="other-judge")


def test_the_chosen_responses_are_an_opponent_for_the_reference_too(models: dict[str, str], tmp_path: Path) -> None:
    against = settings(opponent="chosen", opponent_samples=1, max_new_tokens=12)
    with serving(shorter) as server:
        metrics, _ = run(models, tmp_path, server, settings=against)
        assert 2 * 8 * 2 < len(server.asked) <= 2 * 8 * 3  # two empty answers to one prompt are one question
        assert all(any(row["chosen"].strip() in sides(body) for row in world_rows()) for body in server.asked)
    (found,) = trajectories(tmp_path)
    assert found.start_wins is not None and found.start == pytest.approx(found.start_wins.mean())
    assert metrics["models"][0]["win_rate_chosen"] == metrics["models"][0]["win_rate"]
    assert metrics["reference"]["win_rate"]["mean"] == found.start


def test_ties_as_losses_count_as_such(models: dict[str, str], tmp_path: Path) -> None:
    with serving(replying("Better: B")) as server:
        metrics, _ = run(models, tmp_path, server, settings=settings(opponent_samples=1, ties="loss"))
    assert rates(metrics) == [0.0, 0.0] and metrics["reference"]["win_rate"] is None


def test_a_file_is_the_question_and_texts_bring_no_places_in(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.txt"
    file.write_text('Post {prompt}\nX: {first}\nY: {second}\nAs JSON {"why": …}. "Better: A" for X.', encoding="utf-8")
    bench = question_of(str(file))
    from isdaa.evaluation.benchmarks.sets.benchmark import Answer as Said
    from isdaa.evaluation.benchmarks.sets.benchmark import Question

    asked = bench.judge_questions(Question("1", "{second}"), Said("1", "m", ("ours",)), Said("1", "o", ("{prompt}",)))
    words = [one.messages[-1]["content"].splitlines() for one in asked]
    assert words[0][:3] == ["Post {second}", "X: {prompt}", "Y: ours"] and words[1][1:3] == ["X: ours", "Y: {prompt}"]
    capsys.readouterr()
    question_of(str(file))
    assert "asks neither" not in capsys.readouterr().err
    digests: dict[str, int] = {}
    with serving(replying("A")) as server:
        for content in ("{prompt} {first} {second}", "{prompt}: {first} {second}"):
            file.write_text(content, encoding="utf-8")
            _, judge = run(models, tmp_path / "out", server, template=str(file))
            digests[judge.digest] = len(server.asked)
    assert "mine.txt asks neither for a line `Better: A`" in capsys.readouterr().err
    first, both = digests.values()
    assert both == 2 * first > 0  # another word is another question


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--judge_template", "tldrr"], 'no such file (did you mean "tldr"?); give hh, tldr or a file'),
        (["--judge_template", "bare.txt"], "bare.txt: the judge's question lacks {first} and {second}"),
        (["--judge_template", "latin.txt"], "latin.txt: the judge's question cannot be read (not valid UTF-8)"),
        (["--scorer", "gold"], "--judge_model and --scorer both say who judges"),
        (["--scores", "x.jsonl"], "--judge_model and --scores both say who judges"),
        (["--judge_price_in", "1"], "give both prices"),
        (
            ["--judge_base_url", "https://api.openai.com/v1", "--judge_seed", "5"],
            "needs a key: set the environment variable OPENAI_API_KEY",
        ),
        (["--judge_base_url", "ftp://x"], "ftp://x"),
        (["--judge_model", "\udcff"], "--judge_model holds a character that no name has"),
        (["--data", "nul.jsonl"], "holds a NUL character"),
        (["--data", "long.jsonl"], "1,048,577 characters"),
    ],
)
def test_what_can_be_known_is_said_before_a_sample(
    models: dict[str, str],
    prompts: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("isdaa.evaluation.checkpoints.sample_and_kl.Collection.run", lambda self: pytest.fail("sampled"))
    (tmp_path / "bare.txt").write_text("only {prompt}")
    jsonl(tmp_path / "nul.jsonl", [{"prompt": "a\0", "chosen": "b", "rejected": "c"}])
    jsonl(tmp_path / "long.jsonl", [{"prompt": "a", "chosen": "b" * ((1 << 20) + 1), "rejected": "c"}])
    (tmp_path / "latin.txt").write_bytes(b"\xff{prompt}{first}{second}")
    words = command(models, prompts, tmp_path / "page", "http://127.0.0.1:1/v1")
    for option in {"--judge_base_url", "--judge_model", "--data"} & set(more):
        place = words.index(option)
        words = [*words[:place], *words[place + 2 :]]
    assert main([*words, *more]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "page").exists()


def test_options_of_a_judge_need_a_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in [
        (["report", "x", "--judge_template", "hh"], "--judge_template is given, and no judge model"),
        (["evaluate", "--model_path", "x", "--max_requests", "3"], "options of a judge model are given, and no judge model"),
        (["evaluate", "--model_path", "x", "--judge", "gold"], "a reward model is named with --scorer"),
        (["tax", "--model_path", "x", "--judge_model", "j"], "--judge_model: has no effect with `isdaa tax`"),
        (["benchmark", "hh", "--model_path", "x", "--judge_template", "hh"], "has no effect with `isdaa benchmark`"),
    ]:
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_the_key_is_in_no_file_and_no_line(
    models: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-quite-a-secret-key-0815")
    with serving(shorter) as server:
        run(models, tmp_path, server)
        assert "sk-quite-a-secret-key-0815" in server.headers[0]["authorization"]
    told = capfd.readouterr()
    files = [file.read_text(encoding="utf-8") for file in tmp_path.rglob("*") if file.is_file()]
    assert all("sk-quite-a" not in text for text in [told.out, told.err, *files])


def test_a_spent_budget_leaves_the_former_evaluation_as_it_was(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(shorter) as server:
        before, _ = run(models, tmp_path, server)
        with pytest.raises(DoneInPart, match="no prompt is judged"):
            run(models, tmp_path, server, seed=3, max_requests=1)
        assert "the evaluation that was here before stays as it was" in " ".join(capsys.readouterr().err.split())
        assert read_json(tmp_path / "metrics.json") == before and len(trajectories(tmp_path)) == 1
        asked = len(server.asked)
        after, _ = run(models, tmp_path, server, seed=3)  # goes on: the reply that was had is not asked for again
        assert after["scorer"]["digest"] != before["scorer"]["digest"] and len(server.asked) > asked
        bodies = [json.dumps(body, sort_keys=True) for body in server.asked]
        assert len(set(bodies)) == len(bodies)


def test_so_does_a_scorer_that_fails(models: dict[str, str], tmp_path: Path) -> None:
    class Broken:
        name, digest = "broken", "broken-1"

        def score(self, rows, progress=None):
            raise UserError("no")

    with serving(shorter) as server:
        before, _ = run(models, tmp_path, server)
    given = {"prompts": world_rows(), "settings": settings(opponent_samples=1, max_new_tokens=12), "tokenization": TOKENIZATION}
    with pytest.raises(UserError, match="no"):
        evaluate([models["checkpoint-20"]], reference=models["reference"], output_dir=tmp_path, scorer=Broken(), **given)
    assert read_json(tmp_path / "metrics.json") == before and len(trajectories(tmp_path)[0].labels) == 2
