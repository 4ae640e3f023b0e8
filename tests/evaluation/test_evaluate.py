"""The whole of an evaluation on tiny models: records, reuse, interruption, and the way without a scorer."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
from evaluation_helpers import (
    TOKENIZATION,
    WordCount,
    moved,
    numbers,
    reward_model,
    save,
    settings,
    tiny,
    world_pairs,
    world_rows,
)

import isdaa.models.loading
import isdaa.models.packed.forward
import isdaa.models.sampling.sampling
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints import sample_and_kl
from isdaa.evaluation.checkpoints.analysis import analyse, repetition
from isdaa.evaluation.checkpoints.scoring import score
from isdaa.evaluation.checkpoints.what_to_evaluate import requests
from isdaa.evaluation.checkpoints.win_rate import win_rates
from isdaa.evaluation.evaluate import evaluate, evaluate_request, with_verdicts
from isdaa.evaluation.model_digest import model_digest
from isdaa.evaluation.records import Blocks
from isdaa.foreign import read_json, read_jsonl
from isdaa.models.sampling.sampling import Sample
from isdaa.terminal import Bar
from isdaa.world import build_tokenizer
from isdaa.world.reward import explain


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    reference = tiny()
    return {
        "reference": save(reference, folder / "reference"),
        "near": save(moved(reference, 0.05), folder / "near"),
        "far": save(moved(reference, 0.3), folder / "far"),
        "reward": reward_model(folder / "reward"),
    }


def run(models, output_dir: Path, names=("near", "far"), **changes):
    options = {"scorer": "gold", "settings": settings(), "held_out": world_pairs()} | changes
    prompts = options.pop("prompts", world_rows())
    paths = [models[name] for name in names]
    return evaluate(
        paths, reference=models["reference"], prompts=prompts, tokenization=TOKENIZATION, output_dir=output_dir, **options
    )


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("finished")
    return run(models, folder), folder


@pytest.fixture
def no_models(monkeypatch):
    """Any model that is loaded or asked to compute raises."""

    def refuse(*args, **kwargs):
        raise AssertionError("a model was needed")

    monkeypatch.setattr(isdaa.models.loading, "load_model", refuse)
    monkeypatch.setattr(isdaa.models.loading, "load_sequence_classifier", refuse)
    monkeypatch.setattr(isdaa.models.packed.forward, "prepare", refuse)


def test_metrics_say_what_was_measured(finished, models):
    metrics, folder = finished
    assert metrics == read_json(folder / "metrics.json")
    near, far = metrics["models"]
    assert 0 < near["kl"]["mean"] < far["kl"]["mean"]
    assert metrics["reference"]["kl"]["mean"] == 0 and metrics["reference"]["win_rate"]["mean"] == 0.5
    for model in (near, far):
        assert model["kl"]["low"] <= model["kl"]["mean"] <= model["kl"]["high"]
        assert model["kl"]["monte_carlo"]["n"] == model["kl"]["n"] == 8
        assert 0 <= model["win_rate"]["low"] <= model["win_rate"]["mean"] <= model["win_rate"]["high"] <= 1
        assert model["win_rate"] == model["win_rate_reference"] != model["win_rate_chosen"]
        assert 1 <= model["length"]["mean"] <= 6 and 0 <= model["truncated"] <= 1
        held_out = model["held_out"]
        assert held_out["pairs"] == 6
        drift = held_out["chosen_drift"]["mean"] - held_out["rejected_drift"]["mean"]
        assert held_out["margin"]["mean"] == pytest.approx(drift, abs=1e-6)
    assert metrics["scorer"]["name"] == "gold" and metrics["verdicts"] == {"near": None, "far": None}
    assert metrics["better"] == {"near": False, "far": False}  # on eight prompts
    assert all(math.isfinite(value) for value in numbers(metrics))


def test_every_record_is_complete(finished, models):
    _, folder = finished
    samples, scores = Blocks(folder / "samples.jsonl"), Blocks(folder / "scores.jsonl")
    kinds = [header["header"] for header in samples.headers.values()]
    assert kinds == ["prompts", "samples", "samples", "samples", "kl", "samples", "kl"]
    ids = [row["id"] for row in world_rows()]
    for key, header in samples.headers.items():
        assert {"template", "tokenizer", "tokenization", "versions", "git_revision"} <= set(header)
        if header["header"] == "prompts":
            assert {"prompt_id", "prompt", "prompt_ids", "chosen", "facts"} <= set(samples[key][0])
            continue
        assert {"model", "model_digest", "purpose", "sampling", "seed", "dtype"} <= set(header)
        assert set(header["sampling"]) == {"temperature", "top_p", "top_k", "max_new_tokens"}
        assert [record["prompt_id"] for record in samples[key]] == ids
        for record in samples[key]:
            assert {"sample", "text", "ids", "tokens", "finished"} <= set(record)
            assert record["tokens"] == len(record["ids"]) <= 6
            assert record["finished"] or record["tokens"] == 6
            assert ({"policy_logps", "reference_logps", "kl"} <= set(record)) == (header["header"] == "kl")
            assert record.get("kl", 0) >= 0
    assert {header["scorer"] for header in scores.headers.values()} == {"gold"}
    assert {header["of"] for header in scores.headers.values()} == {
        "chosen",
        *(key for key, header in samples.headers.items() if header["header"] == "samples"),
    }


def test_win_rates_follow_from_the_files(finished):
    metrics, folder = finished
    plan, scores = read_json(folder / "plan.json"), Blocks(folder / "scores.jsonl")
    by_samples = {h["of"]: [r["score"] for r in scores[key]] for key, h in scores.headers.items()}
    opponents = list(zip(*(by_samples[key] for key in plan["reference"]["opponents"]), strict=True))
    for model, result in zip(plan["models"], metrics["models"], strict=True):
        ours = by_samples[model["samples"]]
        assert result["win_rate_reference"]["mean"] == pytest.approx(win_rates(ours, opponents).mean())
        assert result["win_rate_chosen"]["mean"] == pytest.approx(win_rates(ours, by_samples["chosen"]).mean())
        assert result["reward"]["mean"] == pytest.approx(sum(ours) / len(ours))


def test_analysis_and_scoring_can_be_repeated_from_the_files(finished, no_models, tmp_path):
    metrics, folder = finished
    for name in ("plan.json", "samples.jsonl", "pairs.jsonl", "scores.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert analyse(tmp_path) == {key: value for key, value in metrics.items() if key not in ("verdicts", "no_verdict", "better")}
    assert with_verdicts(tmp_path) == metrics
    other = analyse(tmp_path, settings(ties="loss", opponent="chosen"))
    assert other["models"][0]["win_rate"] == other["models"][0]["win_rate_chosen"]
    assert other["models"][0]["win_rate_reference"]["mean"] <= metrics["models"][0]["win_rate_reference"]["mean"]
    words = WordCount()
    score(tmp_path, words)
    assert len(words.seen) == 5 * 8 and {row["finished"] for row in words.seen} <= {True, False}
    assert words.seen[0]["facts"] == world_rows()[0]["facts"]
    assert analyse(tmp_path)["scorer"] == {"name": "words", "digest": "words-1"}


def test_a_second_call_computes_nothing(finished, models, no_models):
    metrics, folder = finished
    before = (folder / "samples.jsonl").read_bytes()
    assert run(models, folder) == metrics
    assert run(models, folder, names=("far",))["models"][0] == metrics["models"][1]
    assert (folder / "samples.jsonl").read_bytes() == before
    # Moved elsewhere, the same weights are still the same model.
    run(models, folder)


def test_what_changed_is_computed_anew_and_the_rest_reused(finished, models, tmp_path, monkeypatch):
    _, folder = finished
    for name in ("samples.jsonl", "pairs.jsonl", "scores.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    drawn: list[tuple[str, list[str]]] = []
    original = sample_and_kl.Collection.sample_model

    def listed(self, path, rows, sampling, purposes, **more):
        drawn.append((Path(path).name, list(purposes)))
        return original(self, path, rows, sampling, purposes, **more)

    monkeypatch.setattr(sample_and_kl.Collection, "sample_model", listed)
    run(models, tmp_path, settings=settings(opponent_samples=3, bootstrap=200))
    assert drawn == [("reference", ["opponent/2"])]
    drawn.clear()
    run(models, tmp_path, settings=settings(temperature=0.5))
    assert drawn == [("reference", ["opponent/0", "opponent/1"]), ("near", ["policy/0"]), ("far", ["policy/0"])]
    drawn.clear()
    run(models, tmp_path, settings=settings(prompts=7), names=("near",))
    assert drawn == [("reference", ["opponent/0", "opponent/1"]), ("near", ["policy/0"]), ("near", ["kl/0"])]


@pytest.mark.parametrize("stop_at", [0, 1, 2, 4])
def test_an_interruption_loses_only_the_block_in_work(finished, models, tmp_path, monkeypatch, stop_at):
    metrics, _ = finished
    original = sample_and_kl.Collection.sample_model
    calls: list[str] = []

    def interrupted(self, path, rows, sampling, purposes, **more):
        calls.append(purposes[0])
        if len(calls) == stop_at + 1:
            raise KeyboardInterrupt
        return original(self, path, rows, sampling, purposes, **more)

    monkeypatch.setattr(sample_and_kl.Collection, "sample_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(models, tmp_path)
    assert not (tmp_path / "metrics.json").exists()
    # What a kill in the middle of writing leaves: a header and half a record.
    with open(tmp_path / "samples.jsonl", "ab") as file:
        file.write(b'{"header": "kl", "block": "x", "count": 8}\n{"block": "x", "prompt_id"')
    again: list[str] = []

    def listed(self, path, rows, sampling, purposes, **more):
        again.append(purposes[0])
        return original(self, path, rows, sampling, purposes, **more)

    monkeypatch.setattr(sample_and_kl.Collection, "sample_model", listed)
    assert run(models, tmp_path) == metrics
    assert calls[:-1] + again == ["opponent/0", "policy/0", "kl/0", "policy/0", "kl/0"]


def test_without_a_scorer(models, tmp_path, finished):
    metrics = run(models, tmp_path, scorer=None)
    assert "no verdict" in metrics["note"] and metrics["scorer"] is None
    for model, scored in zip(metrics["models"], finished[0]["models"], strict=True):
        assert model["win_rate"] is None and model["reward"] is None
        for name in ("kl", "length", "held_out"):
            assert model[name] == scored[name]
    assert not (tmp_path / "scores.jsonl").exists()


def test_a_reward_model_scores_as_well(models, tmp_path):
    metrics = run(models, tmp_path, scorer=models["reward"], names=("near",))
    assert metrics["scorer"]["name"] == models["reward"]
    assert metrics["models"][0]["tie_rate"] < 1


def test_the_reference_as_a_policy_is_an_independent_draw(models, tmp_path):
    metrics = run(models, tmp_path, names=("reference",), held_out=None)
    plan, samples = read_json(tmp_path / "plan.json"), Blocks(tmp_path / "samples.jsonl")
    ours = [record["text"] for record in samples[plan["models"][0]["samples"]]]
    for key in plan["reference"]["opponents"]:
        assert [record["text"] for record in samples[key]] != ours
    assert metrics["models"][0]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert metrics["models"][0]["kl"]["monte_carlo"]["mean"] == pytest.approx(0, abs=1e-5)


def test_batch_size_and_order_of_models_change_nothing(finished, models, tmp_path):
    metrics, _ = finished
    other = run(models, tmp_path, names=("far", "near"), settings=settings(batch_size=3))
    for model, twin in zip(metrics["models"], reversed(other["models"]), strict=True):
        assert model["win_rate"] == twin["win_rate"] and model["length"] == twin["length"]
        assert model["kl"]["mean"] == pytest.approx(twin["kl"]["mean"], rel=1e-5)


def test_repetition_is_the_share_of_repeated_4_grams():
    assert repetition([1, 2, 3, 4, 5]) == 0 == repetition([1, 2, 3])
    assert repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)  # three 4-grams, one different
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_bad_input_is_one_line(models, tmp_path):
    with pytest.raises(UserError, match="opponent is `chosen`, but 8 of 8"):
        bare = [row | {"chosen": None} for row in world_rows()]
        run(models, tmp_path, prompts=bare, settings=settings(opponent="chosen"))
    with pytest.raises(UserError, match="no prompt"):
        run(models, tmp_path, prompts=[])
    with pytest.raises(UserError, match="occurs twice"):
        run(models, tmp_path, prompts=[world_rows(1)[0]] * 2)
    with pytest.raises(UserError, match="facts"):
        run(models, tmp_path, prompts=[row | {"facts": None} for row in world_rows()])
    with pytest.raises(UserError, match="no such folder"):
        evaluate(["./nowhere"], reference=models["reference"], prompts=world_rows(), output_dir=tmp_path)
    with pytest.raises(UserError, match="no such file"):
        analyse(tmp_path / "empty")


def test_other_vocabularies_are_refused(models, tmp_path):
    tokenizer = build_tokenizer("small")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    words["my"], words["boss"] = words["boss"], words["my"]
    folder = Path(save(tiny(), tmp_path / "other"))
    file = json.loads((folder / "tokenizer.json").read_text())
    file["model"]["vocab"] = words
    (folder / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(UserError, match="share one vocabulary"):
        evaluate([str(folder)], reference=models["reference"], prompts=world_rows(), output_dir=tmp_path / "out")


def test_samples_file_is_plain_json_lines(finished):
    _, folder = finished
    lines = read_jsonl(folder / "samples.jsonl")
    assert sum("header" in line for line in lines) == 7 and all("block" in line for line in lines)


CHAT = (
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% else %}{{ ' TL;DR:' }}{% endif %}{% endfor %}"
)


def test_conversations_go_through_the_template(models, tmp_path):
    tokenizer = build_tokenizer("small")
    tokenizer.chat_template = CHAT
    policy = save(moved(tiny(), 0.1), tmp_path / "policy", tokenizer)
    reward = reward_model(tmp_path / "reward")
    tokenizer.save_pretrained(reward)
    rows = world_rows()
    for row in rows[:5]:  # the others stay plain text
        row["prompt"] = [{"role": "user", "content": row["prompt"].removesuffix(" TL;DR:")}]
        row["chosen"] = [{"role": "assistant", "content": row["chosen"]}]
    words = WordCount()
    options = {"reference": models["reference"], "prompts": rows, "settings": settings(), "tokenization": TOKENIZATION}
    evaluate([policy], scorer=words, output_dir=tmp_path / "words", **options)
    assert [type(row["prompt"]) for row in words.seen[:8]] == [list] * 5 + [str] * 3
    metrics = evaluate([policy], scorer=reward, output_dir=tmp_path / "reward_scored", **options)
    assert metrics["template"] != "none" and metrics["models"][0]["win_rate_chosen"] is not None


def test_a_request_reads_its_own_rows(models, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row | {"where": None}) + "\n" for row in world_rows()))
    overrides = {"reference": models["reference"], "data": str(prompts), "output_dir": str(tmp_path / "out")}
    overrides |= {f"evaluation.{key}": value for key, value in settings().model_dump().items() if value is not None}
    overrides |= {f"tokenization.{key}": value for key, value in dataclasses.asdict(TOKENIZATION).items()}
    found = requests([models["near"]], overrides)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({k: v for k, v in p.items() if v is not None}) + "\n" for p in world_pairs()))
    metrics = evaluate_request(dataclasses.replace(found, held_out=(str(pairs),)))
    assert metrics["prompts"] == 8 and metrics["scorer"] is None
    assert metrics["models"][0]["held_out"]["pairs"] == 6
    assert (tmp_path / "out" / "metrics.json").exists()


def test_data_of_pairs_gives_accuracy_and_drift(models, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({k: v for k, v in p.items() if v is not None}) + "\n" for p in world_pairs()))
    overrides = {"reference": models["reference"], "data": str(pairs), "output_dir": str(tmp_path / "out")}
    overrides |= {f"evaluation.{key}": value for key, value in settings(prompts=4).model_dump().items()}
    metrics = evaluate_request(requests([models["near"]], overrides))
    assert metrics["scorer"] is None and metrics["models"][0]["held_out"]["pairs"] == 4


def test_the_judge_sees_special_tokens_inside_a_response(models, tmp_path, monkeypatch):
    tokenizer = build_tokenizer("small")
    word, special, eos = tokenizer.convert_tokens_to_ids("my"), tokenizer.bos_token_id, tokenizer.eos_token_id

    def written(model, prompts, *args, n=1, **kwargs):
        return [Sample((word, special, word, eos), True) for _ in range(n * len(prompts))]

    monkeypatch.setattr(isdaa.models.sampling.sampling, "sample", written)
    words = WordCount()
    run(models, tmp_path, names=("near",), scorer=words, held_out=None)
    assert words.seen[-1]["response"] == f"my {tokenizer.bos_token} my"
    facts = world_rows()[0]["facts"]
    verdicts = [explain(facts, text, True) for text in (words.seen[-1]["response"], "my my")]
    junk = [sum(clause.words for clause in verdict.clauses if clause.kind == "junk") for verdict in verdicts]
    assert junk[0] > junk[1] and verdicts[0].total < verdicts[1].total


def test_an_adapter_beside_a_config_is_known_by_its_base(models, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = Path(save(tiny(), tmp_path / "base"))
    adapter = tmp_path / "adapter"
    get_peft_model(tiny(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    (adapter / "config.json").write_bytes((base / "config.json").read_bytes())
    config = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    before = model_digest(adapter)
    save(tiny(seed=5), base)
    assert model_digest(adapter) != before


def test_settings_name_the_scorer_that_judged(finished):
    metrics, _ = finished
    assert metrics["settings"]["scorer"] == "gold" == metrics["scorer"]["name"]


def test_a_call_that_fails_on_its_input_leaves_nothing_behind(models, tmp_path):
    for changes in ({"prompts": []}, {"settings": settings(opponent="chosen"), "prompts": [world_rows()[0] | {"chosen": None}]}):
        with pytest.raises(UserError):
            run(models, tmp_path / "out", **changes)
        assert not (tmp_path / "out").exists()


def test_gold_refuses_data_without_facts_before_the_first_sample(models, tmp_path, no_models):
    for prompts in ([row | {"facts": None} for row in world_rows()], [*world_rows()[:7], world_rows()[7] | {"facts": None}]):
        with pytest.raises(UserError, match="scorer `gold` needs the column `facts`"):
            run(models, tmp_path / "out", prompts=prompts, scorer="gold")
    assert not (tmp_path / "out").exists()


def test_progress_counts_samples(models, tmp_path, monkeypatch):
    sizes = {}

    class Watched(Bar):
        def part(self, weight, leader):
            sizes[leader.strip()] = weight
            return super().part(weight, leader)

    monkeypatch.setattr("isdaa.terminal.Bar", Watched)
    run(models, tmp_path, names=("near",), settings=settings(opponent_samples=4))
    assert sizes["opponent"] == 4 * 8 and sizes["policy"] == 8 < sizes["kl"] < 16 and 0 < sizes["pairs"] < 6
