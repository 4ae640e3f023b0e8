"""Posts and reference summaries: determinism, splits, facts that are really in the text."""

import json
import random
import statistics

import pytest

from isdaa.world import PROMPT_END, SIZES, SPLITS, explain, gold_reward, make_posts
from isdaa.world.grammar import draw_facts, split_of
from isdaa.world.lexicon import lexicon

pytestmark = pytest.mark.fast

RECORDED = {
    "id": "small/eval/11/000000",
    "prompt": "my friend will not stop eating my lunch. it all started after the baby. this has lasted three months now. "
    "is it wrong to confront them? TL;DR:",
    "summary": "for three months, since the baby. should i tell my family?",
    "facts": {
        "size": "small",
        "relation": "friend",
        "problem": "food",
        "duration": "three-months",
        "cause": "baby",
        "question": "confront",
    },
}


@pytest.mark.parametrize("size", SIZES)
def test_same_seed_same_posts_and_a_longer_draw_begins_with_the_shorter(size):
    rows = make_posts(size, 50, split="prompts", seed=3)
    assert make_posts(size, 80, split="prompts", seed=3)[:50] == rows
    assert make_posts(size, 50, split="prompts", seed=4) != rows
    assert json.loads(json.dumps(rows)) == rows


def test_values_do_not_change_between_versions():
    """A changed draw would silently change every seed's result: this one is written down."""
    row = make_posts("small", 1, split="eval", seed=11)[0]
    assert row == RECORDED


@pytest.mark.parametrize("size", SIZES)
def test_splits_are_disjoint_by_facts_whatever_the_seeds(size):
    facts = {
        split: {json.dumps(row["facts"]) for seed in (0, 1) for row in make_posts(size, 400, split=split, seed=seed)}
        for split in SPLITS
    }
    assert not facts["sft"] & facts["prompts"] and not facts["sft"] & facts["eval"] and not facts["prompts"] & facts["eval"]


def test_no_post_and_no_id_repeats():
    rows = make_posts("small", 5000, split="prompts", seed=0)
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 5000


@pytest.mark.parametrize("size", SIZES)
def test_posts_state_their_facts_and_end_with_the_mark(size):
    words = lexicon(size)
    for row in make_posts(size, 300, split="eval", seed=5):
        assert row["prompt"].endswith(f" {PROMPT_END}") and row["prompt"].count(PROMPT_END) == 1
        # The judge, reading the post as if it were a summary, finds every fact of it, and no other.
        said = {c.kind: c.value for c in explain(row["facts"], row["prompt"].removesuffix(PROMPT_END)).clauses}
        assert "junk" not in said
        assert {name: said.get(name) for name in words.slots} == {name: row["facts"][name] for name in words.slots}


@pytest.mark.parametrize(("size", "low", "best"), [("small", 2.0, 5.1), ("medium", 2.8, 6.9)])
def test_reference_summaries_are_mostly_good_and_vary(size, low, best):
    rewards = [gold_reward(row["facts"], row["summary"]) for row in make_posts(size, 1500, split="sft", seed=0)]
    assert low < statistics.mean(rewards) < best - 1
    assert 1.0 < statistics.stdev(rewards) < 2.0
    assert max(rewards) <= best


def test_every_fact_lands_in_one_split_and_shares_are_as_stated():
    rng = random.Random(0)
    drawn = [split_of(draw_facts(lexicon("small"), rng)) for _ in range(4000)]
    for split, share in SPLITS.items():
        assert drawn.count(split) / 40 == pytest.approx(share, abs=3)


def test_unknown_names_and_impossible_numbers_are_errors():
    with pytest.raises(ValueError, match="unknown world size 'tiny': known are small, medium"):
        make_posts("tiny", 1)
    with pytest.raises(ValueError, match="unknown split 'test': known are sft, prompts, eval"):
        make_posts("small", 1, split="test")
    assert make_posts("small", 0) == []
