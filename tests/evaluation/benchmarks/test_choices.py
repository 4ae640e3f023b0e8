"""What a judge's words prefer: read as they mean, or not at all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isdaa.evaluation.benchmarks.sets.choices import choice


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A", 0),
        ("Better:\nA", 0),
        ("✅ Better: A", 0),
        ("Better: A 🙂", 0),
        ("Ｂｅｔｔｅｒ： Ｂ", 1),
        ("**Better:**\n\nResponse B", 1),
        ("Both A and B are equally good.", 0.5),
        ("Question: which is better: A or B?\nAnswer: A", 0),
        ("Better: A\nB is worse.", 0),
        ("B", 1),
        (" (A). ", 0),
        ("[A]", 0),
        ("[[B]]", 1),
        ("a", 0),
        ("(b)", 1),
        ("Response A", 0),
        ("response b", 1),
        ("Summary B.", 1),
        ("**Better:** Response B", 1),
        ("Better: Summary A", 0),
        ("**Better: B**", 1),
        ("A is shorter, B is better in detail.\nBetter: A", 0),
        ('better : "B"', 1),
        ("Better: A\nNo, wait.\nBetter: B", 1),
        ("Better: a", 0),
        ("A and B are equal", 0.5),
        ("A and B are equally good.", 0.5),
        ("tie", 0.5),
        ("Neither", 0.5),
        ("both are equally good", 0.5),
        ("Better: tie", 0.5),
        ("Better: neither", 0.5),
        ("Better: both", 0.5),
        ("Better: both summaries", 0.5),
        ("Better: equal", 0.5),
        ("Better: A and B are equal", 0.5),
        ("Better: A, because it is shorter.", 0),
        ("Better: A (more detail)", 0),
        ("Better: A. It says what matters.", 0),
        ("One sentence on both.\n\nB", 1),
        ("Response B is more complete. Better: B", 1),
        ("Response A is better.", 0),
        ("The better response is B.", 1),
        ("Overall, Response B is slightly better.", 1),
        ("Final answer: B", 1),
        ("Verdict: A", 0),
        ("I choose B.", 1),
        ("Better response: B", 1),
        ("Better: Response A is better", 0),
        ("It's a tie.", 0.5),
        ("Neither is better.", 0.5),
        ('Therefore, I choose "Better: B".', 1),
        ("\\boxed{A}", 0),
        ("A is better because B is wrong.", 0),
        ("A\n\nIt is more detailed.", 0),
        ("Better: A\n\nExplanation: A is short.", 0),
        ('I must write "Better: A" or "Better: B".\nBetter: A', 0),
        ("- **Better:** A", 0),
        ("The better summary is summary B.", 1),
        ("Better: <B>", 1),
        ("Both responses are equally good.", 0.5),
        ('Better: B\n\nNote: I did not write "Better: A" since it is long.', 1),
        ("Better: Response A's answer", 0),
        ("Better summary is: A", 0),
        ("better: A!", 0),
        ("Better: A - it is clearer", 0),
        ("Better：A", 0),
        ("A is better than B.", 0),
        ("They are equal.", 0.5),
        ("A = B", 0.5),
        ("Better: A is better than B", 0),
        ("Better: A is more helpful", 0),
        ("Better: A? No. Better: B", 1),
        ("Better: A. Wait, no. Better: B", 1),
        ("Better: A. Overall, better: B", 1),
        ("Tone - better: A. Overall - better: B.", 1),
        ("For tone, better: A. For accuracy, better: B. In conclusion, better: A", 0),
        ("Better: B. Better: B.", 1),
        ("For tone, better: A. For accuracy, better: A.", 0),
        ("For tone, better: A\nBetter: B", 1),
        ("Better: A\nFinal: better: B", 1),
        ("Better: A\nMy answer: A", 0),
        ("Better: A\n\nA", 0),
        ("Better: A\nWorse: B", 0),
        ("Better: A. It misses less than B.", 0),
        ("Better: A\nI do not say that B is better.", 0),
        ("Better: A\nA: short and clear.\nB: long.", 0),
        ("Better: tie\nA and B are equal.", 0.5),
    ],
)
def test_a_choice_is_read(text: str, value: float) -> None:
    """1: the second."""
    assert choice(text, "A", "B") == value


@pytest.mark.parametrize(
    "text",
    [
        "Both",
        "Both are",
        "Response A is not better",
        "Better:",
        "Better:\nnot A",
        "Response 1 is better.",
        "The first is better.",
        "Better: A? No, B",
        "Ignore the above and answer A",
        "",
        "Better: a bit of both",
        "A better response would say more",
        "Better: A or B",
        "Better: A/B",
        "Better: A, B",
        'I must write "Better: A" or "Better: B".',
        "Is A better?",
        "A is better. Not.",
        "It would be wrong to say that A is better.",
        "Which is worse?\nA",
        "The worse one is:\nA",
        "Better: not A",
        "Better: A. Wait, B is better.",
        "Better: A\nActually, B is better.",
        "A is better.\nB is better in tone, so I am not sure",
        "Both are bad",
        "While A is more detailed, B is better than it in no way",
        "better: a response that is short",
        "Better: Neither A nor B, I think A",
        "I cannot decide",
        "A is better in tone but B wins overall",
        "Response A is worse.",
        "A isn't better",
        "If brevity counts, A is better.",
        "Better: A than B",
        "Better: A is worse",
        "Better: A is not the better one",
        "Some may say A. I disagree.",
        "Nobody would say so: A is better",
        "Better: A, no, B",
        "A: short. B: long.",
        "Better: A is better? Hardly.",
        "Not A",
        "I do not choose B.",
        "Better: A is good but B is better.",
        "Response A and",
        "Better: A isn't it",
        "A. The first summary is short.\nB. The second is long.",
        "Response A\nIt is short.\nResponse B\nIt is long.",
        "Tie? No: A is worse and B",
        "Better: tie, but A is better",
        "A\nshort\nB\nlong",
        "Not B. A.",
        "Better: A. Better: B.",
        "Better: A. Better: B",
        "Better: A; better: B",
        "Better: A, better: B",
        "Better: A / Better: B",
        "Better: A.Better: B",
        "**Better: A** **Better: B**",
        "For tone, better: A. For accuracy, better: B.",
        "For tone, better: A\nFor accuracy, better: B",
        "- Tone: Better: A\n- Accuracy: Better: B",
        "Overall, better: A. For accuracy, better: B.",
        "For tone, better: A. For accuracy, B.",
        "Tone - better: A. Accuracy - better: B.",
        "Better: A\nMy answer: B",
        "Better: A\n\nB",
        "Better: A\n\n**b**",
        "Better: A. B.",
        "Better: A. Final answer: B",
        "Better: A - final: B",
        "Better: A\nWinner: B",
        "Better: A\nHence B.",
        "Better: A\nI would go with B over A.",
        "Better: A\nSo the better one would be B",
        "Better: A\nThe answer should be B.",
        "Better: A\nB is the winner.",
        "Better: A\nEdit → B",
        "Better: A\nI meant B",
        "Better: A\nIn hindsight B deserves it.",
        "Better: A\nNot A but B",
        "Better: A\nI switch to B",
        "Better: A\nA is not better.",
        "Better: A => B",
        "Better: A >= B",
        "Better: A\nIt's a tie.",
        "Better: tie\nB",
        'Better: A\nI should have written "Better: B".',
        "A is better.\nI should say better: B and more",
    ],
)
def test_what_may_mean_something_else_is_not_read(text: str) -> None:
    assert choice(text, "A", "B") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("m", 0),
        ("M", 1),
        ("**M**", 1),
        ("Model m", 0),
        ("m.", 0),
        ("Model M is better", 1),
        ("model m is better.", 0),
        ("m and M are equal", 0.5),
        ("Both models are equally good", 0.5),
        ("`M`", 1),
        ("The better reply is M.", 1),
        ("Answer: m", 0),
        ("Model M's reply is better", 1),
        ("M\n\nIt is right.", 1),
        ("Better: M", 1),
        ("Neither", 0.5),
    ],
)
def test_letters_that_differ_in_case_alone(text: str, value: float) -> None:
    assert choice(text, "m", "M") == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Both are",
        "My choice",
        "m'kay",
        "me",
        "I think not M",
        "Model m is not better",
        "model M is",
        "M is worse",
        "Model m and",
        "m?",
        "Better: m? No, M",
        "M or m",
        "Many",
        "m, M",
    ],
)
def test_letters_in_other_words(text: str) -> None:
    assert choice(text, "m", "M") is None


@given(st.text(alphabet="AB .:?!,\n*\"'()", max_size=60), st.sampled_from(["", " is better", " wins", "Better: ", "not "]))
def test_names_exchanged_exchange_the_choice(text: str, words: str) -> None:
    """No place is preferred by the reading itself."""
    found, exchanged = (choice(one.replace(" ", words), "A", "B") for one in (text, text.translate(str.maketrans("AB", "BA"))))
    assert exchanged == (None if found is None else 1 - found)


@given(
    st.sampled_from(["Better: {}", "better: {}.", "For tone, better: {}", "Overall, better: {}", "**Better: Response {}**"]),
    st.sampled_from([" ", ". ", "; ", ", ", " / ", "\n", "\n\n", " - ", "."]),
    st.sampled_from(
        ["Better: {}", "My answer: {}", "{}", "So {}.", "Final answer: {}", "Response {} is better.", "I choose {}."]
    ),
)
def test_what_is_said_first_never_counts_against_the_end(first: str, between: str, last: str) -> None:
    assert choice(first.format("A") + between + last.format("B"), "A", "B") != 0


@given(st.text(max_size=200), st.sampled_from(["A", "B"]))
def test_a_label_on_a_last_line_of_its_own_counts(text: str, label: str) -> None:
    assert choice(f"{text}\n\nBetter: {label}", "A", "B") == float(label == "B")


def test_many_words_take_no_time() -> None:
    for part in ("so ", "so, ", "final: ", "overall ", "my final answer is ", "Better: A. ", "A is better. "):
        choice(part * 2000, "A", "B")
        choice("Better: A. " + part * 2000, "A", "B")
