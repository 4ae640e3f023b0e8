"""The gold judge, worked by hand."""

import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isdaa.world import SIZES, explain, gold_reward, make_posts
from isdaa.world.lexicon import CONJUNCTIONS, PUNCTUATION, lexicon
from isdaa.world.reward import LENGTH_ALLOWED, split_words

pytestmark = pytest.mark.fast

FACTS = {
    "size": "small",
    "relation": "boss",
    "problem": "messages",
    "duration": "three-weeks",
    "cause": "divorce",
    "question": "leave",
}
PERFECT = "my boss has been reading my messages for three weeks, since the divorce. should i move out?"  # 20 words and marks

# relation, problem, question 1.0 each; duration, cause 0.6 each: the perfect summary is worth 4.2
BY_HAND = {
    "perfect": (PERFECT, 4.2),
    "perfect, in the post's own words": (
        "my boss will not stop going through my phone. it has been three weeks. i blame the divorce. is it wrong to move out?",
        4.2 - 4 * 0.08,  # 28 words and marks, 24 are free
    ),
    "who and what alone": ("my boss keeps reading my messages.", 2.0),
    "nobody is named": ("someone keeps reading my messages.", 1.0),
    "lone person": ("it is about my boss. should i move out?", 2.0),
    "wrong person": ("my sister keeps reading my messages.", 0.0),
    "wrong person, hedged": ("i think my sister keeps reading my messages.", 1.0 - 0.3 + 0.2),
    "hedge without need": ("i think my boss keeps reading my messages.", 2.2),
    "hedge over hedge": ("maybe my boss keeps reading my messages. i think should i move out?", 3.0 + 0.2 - 0.5),
    "right, then contradicted": ("my boss keeps reading my messages for two years, for three weeks.", 2.0 - 1.0 + 0.6),
    "repetition": ("should i move out? should i move out?", 1.0 - 0.6),
    "one plea": ("should i move out? please help.", 1.5),
    "two pleas": ("should i move out? please help. any advice?", 1.7),
    "four pleas": ("should i move out? please help. any advice? please help. please help.", 1.7 - 2 * 0.5),
    "chatter": ("should i move out? i am on mobile.", 1.0 - 0.5),
    "somebody's opinion": ("should i move out? my sister told me to wait longer.", 1.0 - 0.5),
    "junk words": ("should i move out? zebra of the", 1.0 - 3 * 0.4),
    "broken clause inside": ("my boss keeps reading. should i move out?", 2.0 - 2 * 0.4),
    "broken clause at the end": ("should i move out? my boss keeps reading", 2.0 - 0.5),
    "hedge of nothing": ("should i move out? maybe", 1.0 + 0.2 - 0.5),
    "marks doubled": ("should i move out??", 1.0 - 0.4),
    "mark at the start": (". should i move out", 1.0 - 0.4),
    "empty": ("", -1.0),
    "blank": (" \n", -1.0),
    "pleas alone": ("please help. any advice?", 0.7),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_by_hand(name):
    text, points = BY_HAND[name]
    verdict = explain(FACTS, text)
    assert verdict.total == pytest.approx(points)
    assert sum(verdict.parts.values()) == pytest.approx(verdict.total)
    assert gold_reward(FACTS, text, finished=False) == pytest.approx(points - 1.0)


def test_words_and_text_and_case_are_the_same():
    assert gold_reward(FACTS, PERFECT.upper()) == gold_reward(FACTS, PERFECT) == gold_reward(FACTS, PERFECT.split())
    assert gold_reward(FACTS, PERFECT.replace("?", " ?").replace(".", " .")) == gold_reward(FACTS, PERFECT)


def test_a_fact_the_post_does_not_have_is_wrong_when_claimed():
    facts = {**FACTS, "cause": None}
    assert explain(facts, PERFECT).parts["wrong"] == -1.0
    assert gold_reward(facts, "should i move out?") == 1.0


def test_special_tokens_in_the_text_are_junk():
    assert gold_reward(FACTS, "should i move out? <bos>") < gold_reward(FACTS, "should i move out?")


def test_overdoing_what_pays_is_bad():
    """The exploitable side: pleas pay at first, then cost, then cost length as well."""
    rewards = [gold_reward(FACTS, PERFECT + " please help." * n) for n in range(7)]
    assert rewards[0] < rewards[1] and rewards[3] < rewards[2]
    assert rewards[6] < rewards[0] - 2


@pytest.mark.parametrize("size", SIZES)
def test_plain_complete_summaries_earn_every_worth(size):
    for row in make_posts(size, 100, split="eval", seed=2):
        slots = lexicon(size).slots
        told = {name: slot for name, slot in slots.items() if row["facts"][name]}
        text = ". ".join(slot.summary[0].format(slot.values[row["facts"][name]][0]) for name, slot in told.items())
        assert gold_reward(row["facts"], text) == pytest.approx(sum(slot.worth for slot in told.values()))
        assert len(text.replace(".", " .").split()) <= LENGTH_ALLOWED[size]


def test_judging_is_fast():
    rows = make_posts("small", 2000, split="eval")
    start = time.process_time()
    for row in rows:
        gold_reward(row["facts"], row["summary"])
    assert time.process_time() - start < 1.0


facts_of = {
    size: st.fixed_dictionaries(
        {"size": st.just(size)} | {name: st.sampled_from([None, *slot.values]) for name, slot in lexicon(size).slots.items()}
    )
    for size in SIZES
}
any_facts = st.one_of(*facts_of.values())
worldly = st.lists(st.sampled_from([*lexicon("medium").vocabulary(), "zebra", "<bos>"])).map(" ".join)


@settings(max_examples=80, deadline=None)
@given(facts=any_facts, text=st.one_of(st.text(), st.text(string.printable), worldly), finished=st.booleans())
def test_any_text_is_judged(facts, text, finished):
    verdict = explain(facts, text, finished)
    assert isinstance(verdict.total, float) and verdict.total == gold_reward(facts, text, finished)
    assert verdict.total <= sum(slot.worth for slot in lexicon(facts["size"]).slots.values()) + 0.2 + 0.7
    # Nothing is lost in reading: a word stands in a clause, is a mark or 'and', or belongs to the broken end.
    free = [word for word in split_words(text) if word in (*PUNCTUATION, *CONJUNCTIONS)]
    if "unfinished_clause" not in verdict.parts:
        assert sum(clause.words for clause in verdict.clauses) >= len(split_words(text)) - len(free)
