"""Thinking and answer are told apart in every form that models give them, and in nothing else."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from real_tokenizers import trl_template
from transformers.utils.chat_template_utils import render_jinja_template

from isdaa.evaluation.judges.replies import Parts, begins_thought, opened_by, split

PAIRS = [
    ("<think>", "</think>"),
    ("<think>\n", "\n</think>\n\n"),
    ("<thinking>", "</thinking>"),
    ("<thought>\n", "\n</thought>\n\n"),  # EXAONE Deep
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),  # MiniMax M3
    ("[THINK]", "[/THINK]"),  # Magistral
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThoughts
    ("<|channel>thought\n", "<channel|>"),  # Gemma 4
    ("<unused94>thought\n", "<unused95>"),  # MedGemma
]
OWN = ("<thinking>", "<thought>", "<reasoning>")  # tags that an answer may have of its own
# Words without any character that a marker or code is made of.
WORDS = st.text(alphabet="abcdefg ,.\n0", min_size=1).map(str.strip).filter(bool)


@pytest.mark.parametrize(("opener", "closer"), PAIRS)
@given(thought=WORDS, answer=WORDS)
def test_every_pair(opener: str, closer: str, thought: str, answer: str) -> None:
    assert split(f"{opener}{thought}{closer}{answer}") == Parts(thought, answer, True)
    assert split(f" \n{opener}{thought}{closer}{answer}\n") == Parts(thought, answer, True)
    assert split(f"{opener}{thought}") == Parts(thought, "", True, unfinished=True)
    whole = f"{opener}{thought}{closer}"
    assert split(whole) == (Parts("", whole) if opener.strip() in OWN else Parts(thought, "", True))
    assert split(f"{thought}{closer}", opened=opener) == Parts(thought, "", True)
    # The prompt opened the thought: whether the reader knows it or not.
    assert split(f"{thought}{closer}{answer}", opened=opener) == Parts(thought, answer, True)
    assert split(f"{thought}{closer}{answer}") == Parts(thought, answer, True)
    assert split(thought, opened=opener) == Parts(thought, "", True, unfinished=True)
    assert opened_by(f"some prompt\n<|assistant|>{opener}") == opener
    assert opened_by(f"some prompt\n<|assistant|>{opener}{closer}") == ""
    assert begins_thought(opener.strip())


@given(st.text())
@example("<html>\n<b>x</b>")
def test_a_text_without_a_marker_is_the_answer_unchanged(text: str) -> None:
    if not any(mark in text for mark in ("think", "analysis", "assistant", "<|", "|>", "/", "[")):
        assert split(text) == Parts("", text)


@given(st.text(), st.text(), st.sampled_from(["", "<think>\n"]))
def test_any_text_at_all(text: str, thinking: str, opened: str) -> None:
    parts = split(text, thinking, opened)
    assert parts.answer in text or parts.answer.strip() in text
    assert not parts.unfinished or not parts.answer


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        # gpt-oss, with its special tokens and without
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>so<|return|>", "hm", "so"),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>so", "hm", "so"),
        ("<|start|>assistant<|channel|>final<|message|>so<|return|>", "", "so"),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
            "<|start|>assistant<|channel|>final<|message|>so",
            "a\n\nb",
            "so",
        ),
        ("analysisWe need to judge.assistantfinalBetter: A", "We need to judge.", "Better: A"),
        ("assistantfinalBetter: A", "", "Better: A"),
        # Muse
        (" to=self<|message|>hm<|eom|><|start|>assistant<|message|>so<|eot|>", "hm", "so"),
        (" to=user<|message|>so<|eot|>", "", "so"),
        # answers in wrappers of their own
        ("<think>hm</think><answer>so</answer>", "hm", "so"),  # Hunyuan
        ("<thinking>a</thinking>\n<reflection>b</reflection>\n<output>so</output>", "a\n\nb", "so"),
        ("<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>so<|END_RESPONSE|>", "hm", "so"),
        ("<|open|>think<|sep|>hm<|close|>think<|sep|><|open|>response<|sep|>so<|close|>response<|sep|>", "hm", "so"),
        ("Here is my thought process: hm Here is my response: so", "hm", "so"),  # Granite 3.2
        ("hm\n[BEGIN FINAL RESPONSE]\nso\n[END FINAL RESPONSE]\n<|end|>", "hm", "so"),  # Apriel
        ("<think>\n\n</think>\n\nso", "", "so"),  # Qwen 3 that is not to think
        ("<think>It says `</think>` there.</think>so", "It says `</think>` there.", "so"),
        ("<THINK>hm</THINK>so", "hm", "so"),
        ("<think >hm</think >so", "hm", "so"),
        ('<thinking mode="long">hm</thinking>so', "hm", "so"),
        # heads of a turn that a server left in
        ("<|im_start|>assistant\n<think>\nhm\n</think>\n\nso", "hm", "so"),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n<think>hm</think>so", "hm", "so"),
        ("<｜Assistant｜><think>hm</think>so", "hm", "so"),
        ("<|turn>model\n<|channel>thought\nhm<channel|>so", "hm", "so"),
        # thoughts within a thought
        ("<think>a<think>b</think>c</think>d", "a<think>b</think>c", "d"),
        ("[THINK]a[THINK]b[/THINK]c[/THINK]d", "a[THINK]b[/THINK]c", "d"),
        ("<think>\n<think>\nhm\n</think>so", "<think>\nhm", "so"),
        # a thought that speaks of its end, and an answer that does
        ("<think>I'll write </think> in the text.</think>Real", "I'll write </think> in the text.", "Real"),
        ("[THINK]I'll write [/THINK], then so.\n[/THINK]\nReal", "I'll write [/THINK], then so.", "Real"),
        ("<think>hm</think>The tag </think> closes it.", "hm", "The tag </think> closes it."),
        ("<think>hm</think>Write\n</think>\nthere.", "hm", "Write\n</think>\nthere."),
        ("<think>hm</think>Write `</think>` there.", "hm", "Write `</think>` there."),
        ("<think>hm</think>Write\n```\n<think>x</think>\n```", "hm", "Write\n```\n<think>x</think>\n```"),
        ("<think> hm </think> so", "hm", "so"),
        ("<think> hm </think> It is </think> there.", "hm", "It is </think> there."),
        ("<think>As <think>\n`</think>` so", "As <think>\n`", "` so"),
        ("The tag <think> is odd.\n</think>\nso", "The tag <think> is odd.", "so"),
        ("a <b>c</b>\n</think>\nso", "a <b>c</b>", "so"),
        ("First:\n</thinking>\nso", "First:", "so"),
        ("Say `<b>x</b>`.\n</thought>\nso", "Say `<b>x</b>`.", "so"),  # EXAONE Deep, opened by its template
        ("analysis\nWe need to judge.assistantfinalBetter: A", "We need to judge.", "Better: A"),
    ],
)
def test_forms(text: str, thinking: str, answer: str) -> None:
    assert split(text) == Parts(thinking, answer, True)


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("<|channel|>analysis<|message|>We", ""),
        ("<|channel|>analysis", ""),
        ("<|channel|>", ""),
        ("analysisWe need to", ""),
        ("We need to", "<|channel|>analysis<|message|>"),
        ("First,", "Here are my reasoning steps:\n"),
    ],
)
def test_thoughts_without_an_end(text: str, opened: str) -> None:
    parts = split(text, opened=opened)
    assert parts.unfinished and not parts.answer


@pytest.mark.parametrize(
    "text",
    [
        "The tag <think> is closed by </think>, as in XML.",
        "Close it with </think>, then answer.",
        "```html\n<think>a</think>\n```\nshows it.",
        "It is written `</think>` there.",
        "~~~\nx\n</think>\n~~~",
        "Sure. <think>hm</think> so",
        "analysis of the data",
        "analysis: none",
        "Here is my thought process: first, I add.",
        "Here are my reasoning steps:\n1. add",
        "The channel is <|channel|> there",
        "<b>think</b>",
        "<answer>42</answer>",
        "An array [THINK] of words",
        "to=self is an argument",
        # an answer under a heading, and elements of its own
        "analysis\n\nSummary A is short.\nBetter: B",
        "analysis(x) is called",
        "analysisResult = 3",
        "<thought>\nBoth are short.\nBetter: B\n</thought>",
        "<reflection>a</reflection>\n<reasoning>b</reasoning>\n",
        "<a>\n <b>1</b>\n</thinking>\n<c>2</c>\n</a>",
        "so\n</reasoning>\n</root>",
        "<|im_start|>assistant\nso",
    ],
)
def test_talk_of_markers_is_no_marker(text: str) -> None:
    assert split(text) == Parts("", text)


# Chat templates of models that think, as TRL ships them; those that leave the thought out of what is rendered are not here.
TEMPLATES = [
    "diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "muse_glimmer", "nemotron_3_5_lightning",
    "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8",
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_real_chat_templates_render_is_parted(name: str) -> None:
    asked = [{"role": "user", "content": "Hi?"}]
    replied = {
        "role": "assistant",
        "content": "Answer it.",
        "reasoning_content": "Hm hm.",
        "thinking": "Hm hm.",
        "reasoning": "Hm hm.",
    }

    def render(messages: list[dict[str, str]], prompt: bool, **more: bool) -> str:
        options = {"chat_template": trl_template(name), "add_generation_prompt": prompt, "bos_token": "", "eos_token": ""}
        return render_jinja_template([messages], **options, **more)[0][0]

    prompt, whole = render(asked, True), render([*asked, replied], False)
    assert whole.startswith(prompt)
    reply = whole.removeprefix(prompt).strip().removesuffix("<|im_end|>").removesuffix("<turn|>")  # a stop token is none of it
    opened = opened_by(prompt)
    assert split(reply, opened=opened) == Parts("Hm hm.", "Answer it.", True)
    assert split(reply) == Parts("Hm hm.", "Answer it.", True)  # nor need the reader know the prompt
    assert bool(opened) == prompt.rstrip().endswith("<think>")
    assert opened_by(render(asked, True, enable_thinking=False)) == ""


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_templates_that_render_no_thought_open_one(name: str) -> None:
    asked = [{"role": "user", "content": "Hi?"}]
    prompt = render_jinja_template([asked], chat_template=trl_template(name), add_generation_prompt=True, bos_token="")[0][0]
    assert opened_by(prompt) == "<think>\n"


def test_what_the_endpoint_gave_apart() -> None:
    assert split("so", "hm") == Parts("hm", "so", True)
    assert split("", "hm") == Parts("hm", "", True)
    assert split("<think>b</think>so", "a") == Parts("a\n\nb", "so", True)


def test_first_tokens() -> None:
    assert all(map(begins_thought, ["<think>", "<think", "<|channel|>", "<|channel>", "[THINK]", " <think>"]))
    assert not any(map(begins_thought, ["m", "M", "<", "The", "A", "thinking", "", "<|im_end|>"]))


def test_long_texts_take_no_time() -> None:
    for part in (" ", "`", "```\n", "</think> ", "</think>\n", "</thought>\n<b>", "<think>", "\n", "[", "a. "):
        split(part * 20_000)
        split("<think>" + part * 20_000)
