"""Does everything that a conversation says arrive? With the templates that TRL ships, as published, and a token a byte.

What is left out is refused or counted; what is taken, stands among the tokens.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from isdaa.data.arrivals import Arrivals
from isdaa.data.chat import ChatFormat
from isdaa.data.encoder import Encoder, TokenizationSettings
from isdaa.data.pairs import Counts, canonical_pair, canonical_prompt, canonical_sft
from isdaa.errors import UserError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from chat_templates import SETTINGS, shipped, tokenizer_with

TEMPLATES = shipped(patches=True)
# They read pictures and texts as parts of a message, and no plain text.
PICTURES = {f"{name}{patch}" for name in ("idefics3", "llava_next", "smolvlm") for patch in ("", "_training")}
READABLE = [name for name in TEMPLATES if name not in PICTURES]
THOUGHT = "<think>\nHesitate.\n</think>\n\nHello."
Row = dict[str, Any]


@cache
def tokenizer(template: str) -> PreTrainedTokenizerFast:
    return tokenizer_with(TEMPLATES[template])


@cache
def shared(template: str) -> Encoder:
    return Encoder(tokenizer(template), SETTINGS)


def encoder(template: str) -> Encoder:
    """The template's encoder, which has counted nothing yet. There is one of each: what a template writes is found out once."""
    taker = shared(template)
    taker.counts = Counts()
    return taker


def message(role: str, content: str, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


QUESTION = message("user", "Which one?")


def call(arguments: Any, **more: Any) -> list[Row]:
    return [{"type": "function", "function": {"name": "rainfall", "arguments": arguments}, **more}]


def pair(prompt: Sequence[Row], answer: str | Row = "Goodbye.", **columns: Any) -> Row:
    chosen = answer if isinstance(answer, dict) else message("assistant", answer)
    return {"prompt": [*prompt], "chosen": [chosen], "rejected": [message("assistant", "Dunno.")], **columns}


def texts(taker: Encoder, row: Row) -> tuple[str, str]:
    """What prompt and chosen of a pair are, token by token."""
    found = taker.pairs([canonical_pair(row, "f:1")])[0]
    return taker.tokenizer.decode(found.prompt.ids), taker.tokenizer.decode(found.chosen)


def refusal(template: str, row: Row) -> str:
    with pytest.raises(UserError) as caught:
        texts(encoder(template), row)
    assert str(caught.value).startswith("f:1: ")
    return str(caught.value)


def learnt(taker: Encoder, messages: Sequence[Row], **columns: Any) -> list[str]:
    """What is learnt of a conversation, example by example."""
    (examples,) = taker.examples([canonical_sft({"messages": [*messages], **columns}, "f:1")])
    return [taker.tokenizer.decode([i for i, on in zip(ids, mask, strict=True) if on]) for ids, mask in examples]


def turns(*answers: str | Row) -> list[Row]:
    whole = []
    for answer in answers:
        whole += [QUESTION, answer if isinstance(answer, dict) else message("assistant", answer)]
    return whole


# --- promises for every template


@pytest.mark.parametrize("template", sorted(PICTURES))
def test_templates_of_pictures_are_refused(template: str) -> None:
    with pytest.raises(UserError, match=r"leaves out the assistant's words|refuses a question and its answer"):
        texts(encoder(template), pair([QUESTION]))


@pytest.mark.parametrize("template", READABLE)
def test_all_three_answers_of_a_conversation_are_learnt(template: str) -> None:
    taker = encoder(template)
    found = learnt(taker, turns("Alpha!", "Bravo!", "Charlie!"))
    assert len(found) in (1, 3)
    text, words = "".join(found), ["Alpha!", "Bravo!", "Charlie!"]
    assert re.findall("|".join(words), text) == words
    assert QUESTION["content"] not in text
    assert text.count(taker.chat.turn_end) == 3 or taker.chat.stop_id is None  # each is learnt with its end
    assert taker.counts.thinking_left_out == 0 and not taker.counts.unread


@pytest.mark.parametrize("template", READABLE)
@pytest.mark.parametrize("earlier", [(), ("Alpha!", "Bravo!")])
def test_a_pair_is_the_beginning_of_the_whole_conversation(template: str, earlier: tuple[str, ...]) -> None:
    taker = encoder(template)
    row = pair([*turns(*earlier), QUESTION])
    prompt, chosen = texts(taker, row)
    whole = taker.chat.render([*row["prompt"], *row["chosen"]], "f:1", opening=False)
    rest = whole.removeprefix(prompt + chosen.removesuffix("<eos>"))
    assert len(rest) < len(whole)  # it is the beginning, …
    assert taker.chat.suffix.endswith(rest)  # … through the turn's end
    assert rest.strip() in ("", "<eos>", "<|END_OF_TURN_TOKEN|>")
    assert "Goodbye." in chosen and all(words in prompt for words in (*earlier, QUESTION["content"]))


@pytest.mark.parametrize("template", READABLE)
def test_whatever_is_taken_arrives(template: str) -> None:
    """Each part of a long conversation by itself: refused, counted, or among the tokens."""
    tool = {"type": "function", "function": {"name": "rainfall", "description": "How much", "parameters": {"type": "object"}}}
    asking = message("assistant", "Moment.", tool_calls=call({"place": "Bergen", "days": [{"of": "Tuesday"}]}))
    rows = [
        ("Concise.", pair([message("system", "Concise."), QUESTION])),
        ("Concise.", pair([message("developer", "Concise."), QUESTION])),
        ("Concise.", pair([QUESTION, message("assistant", "Yes."), message("system", "Concise."), QUESTION])),
        ("Drizzle.", pair([QUESTION, message("assistant", "Yes."), message("tool", "Drizzle.")])),
        ("Drizzle.", pair([QUESTION, asking, message("tool", "Drizzle.")])),
        ("Tuesday", pair([QUESTION, asking, QUESTION])),
        ("Moment.", pair([QUESTION], asking)),
        ("Tuesday", pair([QUESTION], {**asking, "content": ""})),
        ("rainfall", pair([QUESTION], tools=[tool])),
        ("Hesitate.", pair([QUESTION], message("assistant", "Hello.", reasoning_content="Hesitate."))),
        ("Hesitate.", pair([QUESTION], message("assistant", "Hello.", thinking="Hesitate."))),
        ("Hesitate.", pair([QUESTION], message("assistant", "Hello.", reasoning="Hesitate."))),
        ("Hesitate.", pair([QUESTION], THOUGHT)),
        ("Hesitate.", pair([QUESTION, message("assistant", THOUGHT), QUESTION])),
        ("Hesitate.", pair([QUESTION, message("assistant", "Hello.", reasoning_content="Hesitate."), QUESTION])),
    ]
    for words, row in rows:
        taker = encoder(template)
        try:
            whole = "".join(texts(taker, row))
        except UserError:
            continue
        assert words in whole or (words == "Hesitate." and row["prompt"] != [QUESTION] and taker.counts.thinking_left_out), row


# --- roles


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "phi3", "glm4moe", "cohere2", "muse_glimmer", "deepseek_r1_distill"])
def test_a_developer_is_refused_where_the_template_passes_over_it(template: str) -> None:
    row = pair([message("developer", "Concise."), QUESTION])
    assert "leaves out what message 0 (role 'developer') says" in refusal(template, row)


@pytest.mark.parametrize("template", ["llama3", "llama3_1", "gptoss", "gemma4", "lfm2", "nemotron_3_nano"])
def test_a_developer_arrives_where_the_template_writes_it(template: str) -> None:
    assert "Concise." in texts(encoder(template), pair([message("developer", "Concise."), QUESTION]))[0]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("phi3", "leaves out what message 2 (role 'tool') says"),
        ("gemma4", "leaves out what message 2 (role 'tool') says"),  # written only behind a call
        ("gemma", "roles must alternate"),
        ("qwen3", None),
        ("llama3", None),
        ("deepseek_r1_distill", None),
    ],
)
def test_what_a_tool_says(template: str, said: str | None) -> None:
    row = pair([QUESTION, message("assistant", "Moment."), message("tool", "Drizzle.")])
    if said is None:
        assert "Drizzle." in texts(encoder(template), row)[0]
    else:
        assert said in refusal(template, row)


def test_a_tool_behind_its_call() -> None:
    row = pair([QUESTION, message("assistant", "", tool_calls=call({})), message("tool", "Drizzle.")])
    for template in ("gemma4", "gptoss", "qwen3", "llama3_1"):
        assert "Drizzle." in texts(encoder(template), row)[0]
    assert "leaves out 'tool_calls' of message 1" in refusal("phi3", row)


@pytest.mark.parametrize("role", ["human", "gpt", "Human"])
def test_roles_that_no_template_knows(role: str) -> None:
    with pytest.raises(UserError, match=f"no chat template knows the role '{role}'"):
        canonical_pair(pair([message(role, "Which one?")]), "f:1")
    with pytest.raises(UserError, match=f"no chat template knows the role '{role}'"):
        canonical_sft({"messages": [message(role, "Which one?"), message("assistant", "Hello.")]}, "f:1")


def test_one_of_two_system_messages() -> None:
    row = pair([message("system", "Concise."), message("system", "Polite."), QUESTION])
    assert "message 0 (role 'system')" in refusal("deepseek_r1_distill", row)  # its last one wins
    assert all(words in texts(encoder("deepseekv3"), row)[0] for words in ("Concise.", "Polite."))


def test_words_that_stand_elsewhere_hide_nothing() -> None:
    assert "message 0 (role 'developer')" in refusal("phi3", pair([message("developer", "2"), message("user", "2")], "2"))
    assert "message 2 (role 'tool')" in refusal(
        "phi3", pair([message("user", "2"), message("assistant", "2"), message("tool", "2")], "2")
    )
    assert "the thinking of message 1" in refusal("phi3", pair([message("user", "2")], message("assistant", "2", thinking="2")))
    assert "'tool_calls' of message 1" in refusal(
        "phi3", pair([message("user", "rainfall Bergen")], message("assistant", "2", tool_calls=call({"place": "Bergen"})))
    )
    tool = {"type": "function", "function": {"name": "user", "parameters": {}}}  # the template writes <|user|>
    assert "does not write column 'tools'" in refusal("phi3", pair([QUESTION], tools=[tool]))
    # Neither do words that look like ours.
    assert "isdaamark0e" in texts(encoder("phi3"), pair([message("user", "isdaamark0e")]))[0]
    assert texts(encoder("phi3"), pair([message("user", "isdaaprobe")], "isdaaprobe"))[1] == "isdaaprobe<|end|>"


# --- calls and tools


@pytest.mark.parametrize("template", ["phi3", "gemma", "llama3", "lfm2", "cohere", "qwen2_5_vl", "deepseek_r1_distill"])
@pytest.mark.parametrize("content", ["", "Moment."])
def test_calls_that_the_template_leaves_out(template: str, content: str) -> None:
    asking = message("assistant", content, tool_calls=call({"place": "Bergen"}))
    assert "leaves out 'tool_calls' of message 1 (role 'assistant')" in refusal(template, pair([QUESTION], asking))
    assert "leaves out 'tool_calls' of message 1" in refusal(template, pair([QUESTION, asking, QUESTION]))


@pytest.mark.parametrize("template", ["llama3_1", "llama3_2", "muse_glimmer"])
def test_words_beside_a_call(template: str) -> None:
    asking = message("assistant", "Moment.", tool_calls=call({"place": "Bergen"}))
    assert "leaves out what message 1 (role 'assistant') says" in refusal(template, pair([QUESTION], asking))
    assert "Bergen" in texts(encoder(template), pair([QUESTION], {**asking, "content": ""}))[1]


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "gptoss", "gemma4", "llama3_1"])
@pytest.mark.parametrize(
    "arguments",
    [{}, "{}", {"place": "Bergen"}, '{"place": "Bergen"}', {"of": {"days": [{"name": "Tuesday"}]}}, {"days": 3, "now": True}],
    ids=str,
)
def test_arguments_of_every_form_arrive(template: str, arguments: Any) -> None:
    _, chosen = texts(encoder(template), pair([QUESTION], message("assistant", "", tool_calls=call(arguments))))
    assert "rainfall" in chosen
    for word in re.findall(r"\w{3,}", json.dumps(arguments).replace("true", "")):
        assert word in chosen


def test_arguments_that_the_template_cannot_read() -> None:
    assert "refuses the conversation" in refusal(
        "gemma4_v5", pair([QUESTION], message("assistant", "", tool_calls=call("no JSON")))
    )
    # It writes text alone, as it stands: objects are given to it as JSON text.
    _, chosen = texts(encoder("deepseekv3"), pair([QUESTION], message("assistant", "", tool_calls=call({"place": "Bergen"}))))
    assert '{"place": "Bergen"}' in chosen
    _, chosen = texts(encoder("deepseekv3"), pair([QUESTION], message("assistant", "", tool_calls=call("not JSON"))))
    assert "not JSON" in chosen


def test_the_second_of_two_calls() -> None:
    asking = message("assistant", "", tool_calls=call({"place": "Bergen"}) + call({"place": "Molde"}))
    assert "leaves out 'tool_calls' of message 1" in refusal("gptoss", pair([QUESTION], asking))
    assert "single tool-calls" in refusal("llama3_1", pair([QUESTION], asking))
    assert "Molde" in texts(encoder("qwen3"), pair([QUESTION], asking))[1]


@pytest.mark.parametrize("template", ["phi3", "gemma", "llama3", "cohere2", "deepseekv3", "qwen2_5_vl"])
@pytest.mark.parametrize("wrapped", [True, False])
def test_tools_that_the_template_does_not_write(template: str, wrapped: bool) -> None:
    tool = {"name": "rainfall", "description": "How much", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": tool}] if wrapped else [tool]
    assert "does not write column 'tools'" in refusal(template, pair([QUESTION], tools=tools))
    with pytest.raises(UserError, match="does not write column 'tools'"):
        learnt(encoder(template), turns("Hello.", "Goodbye."), tools=tools)
    with pytest.raises(UserError, match="does not write column 'tools'"):
        encoder(template).prompts([canonical_prompt({"prompt": [QUESTION], "tools": tools}, "f:1")])


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1", "gptoss", "gemma4", "lfm2", "glm4moe", "nemotron_3_nano"])
def test_tools_that_it_writes(template: str) -> None:
    tool = {"name": "rainfall", "description": "How much", "parameters": {"type": "object", "properties": {}}}
    row = pair([QUESTION], tools=[{"type": "function", "function": tool}])
    assert "rainfall" in texts(encoder(template), row)[0]


# --- thinking


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("template", ["phi3", "gemma", "llama3", "qwen2_5", "qwen3_instruct_2507", "lfm2", "gemma4"])
def test_thinking_that_the_template_does_not_write(template: str, key: str) -> None:
    answer = message("assistant", "Hello.", **{key: "Hesitate."})
    assert "leaves out the thinking of message 1 (role 'assistant')" in refusal(template, pair([QUESTION], answer))
    with pytest.raises(UserError, match="leaves out the thinking of message 3"):
        learnt(encoder(template), turns("Hello.", answer))
    if template != "gemma4" or key == "thinking":  # the template has never heard of it: it is left out by no intention
        assert "leaves out the thinking of message 1" in refusal(template, pair([QUESTION, answer, QUESTION]))
        return
    taker = encoder(template)
    prompt, _ = texts(taker, pair([QUESTION, answer, QUESTION]))
    assert "Hello." in prompt and "Hesitate." not in prompt
    assert taker.counts.thinking_left_out
    assert any("have thinking in earlier turns" in line for line in taker.counts.lines())


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "template", ["qwen3", "glm4moe", "gptoss", "lfm2_2_5_v2", "muse_glimmer", "nemotron_3_nano", "gemma4_v5"]
)
def test_thinking_that_it_writes(template: str, key: str) -> None:
    taker = encoder(template)
    _, chosen = texts(taker, pair([QUESTION], message("assistant", "Hello.", **{key: "Hesitate."})))
    assert chosen.index("Hesitate.") < chosen.index("Hello.")
    assert taker.counts.thinking_left_out == 0


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "deepseekv3", "deepseekv3_training"])
def test_tags_that_are_taken_away_even_from_the_answer(template: str) -> None:
    assert "leaves out the thinking of message 1" in refusal(template, pair([QUESTION], THOUGHT))
    taker = encoder(template)
    prompt, _ = texts(taker, pair([QUESTION, message("assistant", THOUGHT), QUESTION]))
    assert "Hesitate." not in prompt and "Hello." in prompt
    assert taker.counts.thinking_left_out


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_6", "glm4moe", "lfm2_2_5", "nemotron_3_nano"])
def test_tags_that_are_taken_away_from_earlier_turns(template: str) -> None:
    taker = encoder(template)
    prompt, chosen = texts(taker, pair([QUESTION, message("assistant", THOUGHT), QUESTION], THOUGHT.replace("Hello", "Goodbye")))
    assert "Hesitate." not in prompt and "Hello." in prompt
    assert chosen.index("Hesitate.") < chosen.index("Goodbye.")
    assert taker.counts.thinking_left_out
    # In SFT each answer is learnt as it was the last one, with its thinking.
    found = learnt(encoder(template), turns(THOUGHT, THOUGHT.replace("Hello", "Goodbye")))
    assert ["Hesitate." in text for text in found] == [True, True]


@pytest.mark.parametrize("template", ["phi3", "llama3", "qwen2_5", "qwen3_8", "deepseek_r1_distill_training"])
def test_tags_are_words_where_the_template_leaves_them(template: str) -> None:
    taker = encoder(template)
    prompt, chosen = texts(taker, pair([QUESTION, message("assistant", THOUGHT), QUESTION], THOUGHT))
    assert THOUGHT in prompt and THOUGHT in chosen
    assert taker.counts.thinking_left_out == 0


def test_thinking_of_a_user_is_no_thinking() -> None:
    row = pair([message("user", "Which one?", reasoning_content="Hesitate.")])
    assert "leaves out the thinking of message 0 (role 'user')" in refusal("qwen3", row)
    assert THOUGHT in texts(encoder("deepseek_r1_distill"), pair([message("user", THOUGHT)]))[0]


def test_a_closed_channel_in_the_answer_itself() -> None:
    """Gemma 4 takes it out of every answer's words."""
    row = pair([QUESTION], "<|channel>thought\nHesitate.\n<channel|>Hello.")
    assert "leaves out what message 1" in refusal("gemma4", row)


# --- what is beside it


def test_keys_that_the_template_does_not_know_are_named() -> None:
    taker = encoder("qwen3")
    texts(taker, pair([message("user", "Which one?", mood="cheerful")], message("assistant", "Hello.", source_url="x")))
    assert taker.counts.unread == ("'mood' of messages", "'source_url' of messages")
    assert "not read: 'mood' of messages, 'source_url' of messages" in taker.counts.lines()
    taker = encoder("muse_glimmer")
    assert "to=nobody" in texts(taker, pair([QUESTION], message("assistant", "Hello.", recipient="nobody")))[1]
    assert taker.counts.unread == ()


def test_template_arguments() -> None:
    row = pair([QUESTION], chat_template_kwargs={"enable_thinking": False})
    taker = encoder("qwen3")
    assert texts(taker, row)[0].endswith("<think>\n\n</think>\n\n") and taker.counts.unread == ()
    taker = encoder("phi3")
    texts(taker, row)
    assert taker.counts.unread == ("'enable_thinking' of chat_template_kwargs",)
    # The same conversation with another argument is another shape.
    taker = encoder("nemotron_3_nano")
    earlier = [QUESTION, message("assistant", THOUGHT), QUESTION]
    for cut in (True, False):
        prompt, _ = texts(taker, pair(earlier, chat_template_kwargs={"truncate_history_thinking": cut}))
        assert ("Hesitate." in prompt) is not cut
        assert taker.counts.thinking_left_out  # of the first


def test_each_shape_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chat = ChatFormat(tokenizer("qwen3"))
    rendered: list[Any] = []
    render = ChatFormat.render
    monkeypatch.setattr(
        ChatFormat, "render", lambda self, messages, *a, **k: (rendered.append(1), render(self, messages, *a, **k))[1]
    )
    arrivals = Arrivals(chat)

    def renders(*messages: Row, answers: int = 1, **given: Any) -> int:
        rendered.clear()
        arrivals.check(messages, answers, given, "f:1")
        return len(rendered)

    hello = message("assistant", "Hello.")
    assert renders(QUESTION, hello) == 1
    assert renders(message("user", "Something else."), message("assistant", "Yes, certainly.")) == 0
    assert renders(message("user", "<b>Bold</b>"), hello) == 0  # no tag of this template
    other = [
        ((message("system", "Concise."), QUESTION, hello), {}),
        ((message("user", " "), hello), {}),
        ((QUESTION, message("assistant", THOUGHT)), {}),
        ((QUESTION, message("assistant", "Hello.", reasoning_content="Hesitate.")), {}),
        ((QUESTION, message("assistant", "Hello.", reasoning_content="")), {}),
        ((QUESTION, message("assistant", "Hello.", tool_calls=call({"place": "Bergen"}))), {}),
        ((QUESTION, message("assistant", "Hello.", tool_calls=call({"place": 3}))), {}),
        ((QUESTION, message("assistant", "Hello.", tool_calls=call('{"place": "Bergen"}'))), {}),
        ((QUESTION, hello), {"enable_thinking": True}),
        ((QUESTION, hello), {"enable_thinking": False}),
        ((QUESTION, hello), {"tools": [{"type": "function", "function": {"name": "rainfall"}}]}),
        ((QUESTION, hello, QUESTION, hello), {}),
    ]
    assert [renders(*messages, **given) for messages, given in other] == [1] * len(other)
    assert [renders(*messages, **given) for messages, given in other] == [0] * len(other)
    assert renders(QUESTION, answers=0) == 1


def test_a_refusal_is_remembered_and_names_each_row() -> None:
    taker = encoder("phi3")
    for row in (1, 2):
        with pytest.raises(UserError, match=f"^f:{row}: .*message 0 \\(role 'developer'\\)"):
            taker.pairs([canonical_pair(pair([message("developer", f"Concise {row}."), QUESTION]), f"f:{row}")])


# --- words that begin an answer


@pytest.mark.parametrize("template", READABLE)
def test_a_begun_answer_goes_on(template: str) -> None:
    taker = encoder(template)
    prompt, chosen = texts(taker, pair([QUESTION, message("assistant", "Firstly,")], " goodbye."))
    assert prompt.endswith("Firstly,")
    assert chosen.startswith(" goodbye.")


def test_thinking_before_a_begun_answer() -> None:
    begun = [QUESTION, message("assistant", THOUGHT)]
    prompt, chosen = texts(encoder("qwen3"), pair(begun, " Goodbye."))
    assert prompt.endswith(THOUGHT) and chosen == " Goodbye.<|im_end|>"
    assert "leaves out the thinking of message 1" in refusal("deepseek_r1_distill", pair(begun, " Goodbye."))
    taker = encoder("deepseek_r1_distill")
    taker.prompts([canonical_prompt({"prompt": [QUESTION, begun[1] | {"prefix": True}]}, "f:1")])
    assert taker.counts.thinking_left_out == 1


# --- parts of unusual forms: refused, counted, named, or there


def answered(**more: Any) -> Row:
    return pair([QUESTION], message("assistant", "Hello.", **more))


UNUSUAL = [
    ("phi3", answered(thinking=[{"type": "thinking", "thinking": "Hesitate."}]), "Hesitate."),
    ("qwen3", answered(reasoning={"text": "Hesitate."}), "Hesitate."),
    ("phi3", answered(tool_calls='[{"name": "rainfall", "arguments": {}}]'), "rainfall"),
    ("phi3", answered(tool_calls={"name": "rainfall", "arguments": {}}), "rainfall"),
    ("phi3", answered(tool_calls=["rainfall()"]), "rainfall"),
    ("phi3", answered(tool_calls=[{"tool": "rainfall", "input": {"place": "Bergen"}}]), "rainfall"),
    (
        "nemotron_3_nano",
        answered(tool_calls=[{"function": {"name": "rainfall", "parameters": {"place": "Bergen"}}}]),
        "Bergen",
    ),
    ("phi3", pair([QUESTION], tools=[{"type": "web_search"}]), "web_search"),
    ("gptoss", answered(analysis="Hesitate."), "Hesitate."),
    ("gemma4", answered(thought="Hesitate."), "Hesitate."),
    ("phi3", answered(system="Hesitate."), "Hesitate."),
    ("phi3", pair([QUESTION, message("assistant", "Firstly,", reasoning_content="Hesitate.")], " goodbye."), "Hesitate."),
    ("phi3", pair([QUESTION, message("assistant", "Firstly,", mood="cheerful")], " goodbye."), "cheerful"),
]


@pytest.mark.parametrize(("template", "row", "words"), UNUSUAL, ids=range(len(UNUSUAL)))
def test_parts_of_unusual_forms_do_not_go_in_silence(template: str, row: Row, words: str) -> None:
    taker = encoder(template)
    try:
        whole = "".join(texts(taker, row))
    except UserError:
        return
    assert words in whole or taker.counts.thinking_left_out or taker.counts.unread


def test_template_arguments_that_are_words_of_it_and_not_read() -> None:
    for template, given in (("qwen3", "think"), ("qwen3_instruct_2507_training", "enable_thinking")):
        taker = encoder(template)
        texts(taker, pair([QUESTION], chat_template_kwargs={given: False}))
        assert taker.counts.unread == (f"'{given}' of chat_template_kwargs",)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_values_of_template_arguments_are_part_of_the_shape(order: tuple[int, int]) -> None:
    taker = encoder("nemotron_3_nano")
    for cut in order:
        before = taker.counts.thinking_left_out
        given = {"truncate_history_thinking": cut}
        prompt, _ = texts(taker, pair([QUESTION, message("assistant", THOUGHT), QUESTION], chat_template_kwargs=given))
        assert (taker.counts.thinking_left_out > before) == ("Hesitate." not in prompt)


def test_rows_are_counted_once() -> None:
    taker = encoder("qwen3")
    texts(taker, pair([QUESTION, message("assistant", THOUGHT), QUESTION]))
    assert taker.counts.thinking_left_out == 1
    for answers in (("Hello.",), ("Hello.", "Goodbye.")):
        taker = encoder("nemotron_3_nano")
        learnt(taker, turns(*answers))
        assert taker.counts.opening_cut == 1


def test_arguments_that_are_empty_text() -> None:
    assert "rainfall" in texts(encoder("qwen3_8"), pair([QUESTION], message("assistant", "", tool_calls=call(""))))[1]


@pytest.mark.parametrize(
    ("template", "given"),
    [
        ("deepseek_r1_distill", {}),
        ("nemotron_3_nano", {}),
        ("qwen3", {"enable_thinking": False}),
        ("qwen3_5_think", {"enable_thinking": False}),
        ("phi3", {}),
    ],
)
def test_a_prompt_that_keeps_its_start_keeps_what_opens_the_answer(template: str, given: Row) -> None:
    taker = Encoder(tokenizer(template), TokenizationSettings(max_length=200, max_prompt_length=100, truncation="keep_start"))
    row = pair([message("user", "word " * 60)], "Hello.", **({"chat_template_kwargs": given} if given else {}))
    prompt, _ = texts(taker, row)
    assert "assistant" in prompt[-45:].lower() and "word" in prompt[:60]


@pytest.mark.parametrize("template", ["gptoss", "gemma4"])
def test_a_call_that_was_cut_has_no_end(template: str) -> None:
    row = {**pair([QUESTION], message("assistant", "", tool_calls=call({}))), "chosen_finished": False}
    assert not texts(encoder(template), row)[1].endswith(("<|call|>", "<|tool_response>"))


@pytest.mark.parametrize("template", ["phi3", "deepseek_r1_distill", "qwen3"])
def test_thinking_that_is_lost_from_scored_and_learnt_turns_is_refused(template: str) -> None:
    answer = [message("assistant", "Hello.", reasoning_content="Hesitate."), QUESTION, message("assistant", "Goodbye.")]
    with pytest.raises(UserError, match="reasoning_content"):
        encoder(template).pairs([canonical_pair({**pair([QUESTION]), "chosen": answer}, "f:1")])
    with pytest.raises(UserError, match="thinking"):
        learnt(encoder("deepseek_r1_distill"), turns(THOUGHT, "Goodbye."))


def test_thinking_that_two_sides_do_not_share_is_no_common_prompt() -> None:
    def side(thought: str, answer: str) -> list[Row]:
        return [QUESTION, message("assistant", "Hello.", reasoning_content=thought), QUESTION, message("assistant", answer)]

    row = canonical_pair({"chosen": side("Hesitate.", "A"), "rejected": side("Hurry.", "B")}, "f:1")
    assert len(row["prompt"]) == 1 and "Hurry." in str(row["rejected"])


@pytest.mark.parametrize("template", READABLE)
@pytest.mark.parametrize(
    "between",
    [
        [message("assistant", "Alpha!"), message("user", "Other?")],
        [message("assistant", "Alpha!", tool_calls=call({"place": "Bergen"})), message("tool", "Other?")],
        [message("assistant", "", tool_calls=call({"place": "Bergen"})), message("tool", "Other?")],
    ],
    ids=["user", "words and call", "call"],
)
def test_of_a_response_of_several_messages_what_sft_learns_is_scored(template: str, between: list[Row]) -> None:
    answer = [*between, message("assistant", "Charlie!")]
    taker = encoder(template)
    try:
        ids = taker.pairs([canonical_pair({**pair([QUESTION]), "chosen": answer}, "f:1")])[0].chosen
    except UserError:
        return
    scored = taker.tokenizer.decode([token for token in ids if token >= 0])
    assert "Other?" not in scored and "Charlie!" in scored and between[0]["content"] in scored
    found = "".join(learnt(encoder(template), [QUESTION, *answer]))
    # gpt-oss ends its last turn otherwise; Qwen 3 writes thinking before the last turn alone, and in SFT each is the last.
    otherwise = r"<\|return\|>|<\|end\|>" + (r"|(?:<think>\n)?\n</think>\n\n" if template.startswith("qwen3") else "")
    assert re.sub(otherwise, "", scored) == re.sub(otherwise, "", found)


@pytest.mark.parametrize(
    ("template", "role", "known"),
    [("lfm2", "observation", False), ("nemotron_3_nano", "critic", False), ("llama3_1", "ipython", True)],
)
def test_roles_that_the_template_itself_does_not_know(template: str, role: str, known: bool) -> None:
    """Many templates write any role as it stands; a model has never seen `observation`."""
    row = pair([QUESTION, message("assistant", "Hello."), message(role, "Drizzle."), QUESTION])
    if known:
        assert "Drizzle." in texts(encoder(template), row)[0]
    else:
        assert f"'{role}'" in refusal(template, row)
