"""What becomes of each kind of row with the chat templates that TRL ships?

    python benchmarks/chat_templates.py
    python benchmarks/chat_templates.py --templates my_template.jinja

For every template a small row of each kind is read and tokenised by the code that training uses, and its words are looked for
among the tokens. Writes docs/chat_templates.md: a line a template, a cell a kind. With --all or --templates it only prints,
unless --out names a file. No network, a few seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from isdaa.data.encoder import Encoder, TokenizationSettings
from isdaa.data.pairs import Counts, canonical_pair, canonical_sft
from isdaa.errors import UserError
from isdaa.files import write_atomically

PAGE = Path(__file__).resolve().parents[1] / "docs" / "chat_templates.md"
SETTINGS = TokenizationSettings(max_length=60_000, max_prompt_length=50_000)  # a token a byte, and some templates write pages
TOKEN = re.compile(r"<\|[^<>|\s]+\|?>|<[a-z_]+\|>|<｜[^<>\s]+｜>|<(?:start|end)_of_\w+>|</?s>|\[/?INST\]")
Row = dict[str, Any]
Kind = Sequence[tuple[str, Row]]  # what a cell says where this row is taken; the first that is taken counts


def message(role: str, content: str, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


def pair(prompt: Sequence[Row], answer: str | Row, **columns: Any) -> Row:
    chosen = answer if isinstance(answer, dict) else message("assistant", answer)
    return {"prompt": [*prompt], "chosen": [chosen], "rejected": [message("assistant", "Dunno.")], **columns}


def call(arguments: Any) -> list[Row]:
    return [{"type": "function", "function": {"name": "rainfall", "arguments": arguments}}]


QUESTION, RESULT = message("user", "Which one?"), message("tool", "Drizzle.")
THOUGHT = "Hesitate."
TAGGED = f"<think>\n{THOUGHT}\n</think>\n\nHello."
SPOKEN = message("assistant", "Hello.", reasoning_content=THOUGHT)
OBJECT, TEXT = {"place": "Bergen"}, '{"place": "Bergen"}'
TOOL = {
    "type": "function",
    "function": {
        "name": "rainfall",
        "description": "How it is outside",
        "parameters": {"type": "object", "properties": {"place": {"type": "string", "description": "Where"}}},
    },
}
ASKING = message("assistant", "Moment.", tool_calls=call(OBJECT))
ASKING_ALONE = {**ASKING, "content": ""}
# Words of the rows, which no template writes by itself.
WORDS = ("Concise.", "Which one?", "Drizzle.", THOUGHT, "Hello.", "Moment.", "Goodbye.", "Firstly,", "rainfall", "Bergen")
TURNS = [turn for answer in ("Moment.", "Hello.", "Goodbye.") for turn in (QUESTION, message("assistant", answer))]


def earlier(*turns: Row) -> Row:
    return pair([QUESTION, *turns], "Goodbye.")


def thought(answer: str | Row) -> Kind:
    return (
        ("✓", pair([QUESTION], answer)),
        ("asked", pair([QUESTION], answer, chat_template_kwargs={"enable_thinking": True})),
    )


LOST = "LOST"  # words are missing that nothing counted: a fault
KINDS: dict[str, Kind] = {
    "pair": (("✓", pair([QUESTION], "Hello.")),),
    "system": (("✓", pair([message("system", "Concise."), QUESTION], "Hello.")),),
    "developer": (("✓", pair([message("developer", "Concise."), QUESTION], "Hello.")),),
    "tool": (
        ("✓", earlier(message("assistant", "Moment."), RESULT)),
        ("after call", earlier(ASKING, RESULT)),
        ("after call", earlier(ASKING_ALONE, RESULT)),
    ),
    "call": (("✓", pair([QUESTION], ASKING)), ("alone", pair([QUESTION], ASKING_ALONE))),
    "call before": (("✓", earlier(ASKING, QUESTION)), ("alone", earlier(ASKING_ALONE, QUESTION))),
    "call as text": (("✓", pair([QUESTION], {**ASKING_ALONE, "tool_calls": call(TEXT)})),),
    "tools": (("✓", pair([QUESTION], "Hello.", tools=[TOOL])),),
    "thinking": thought(SPOKEN),
    "`<think>`": thought(TAGGED),
    "thinking before": (("✓", earlier(SPOKEN, QUESTION)),),
    "`<think>` before": (("✓", earlier(message("assistant", TAGGED), QUESTION)),),
    "prefill": (("✓", pair([QUESTION, message("assistant", "Firstly,")], " Hello.")),),
    "turns": (("one", {"messages": TURNS}),),
    "off": (("read", pair([QUESTION], "Hello.", chat_template_kwargs={"enable_thinking": False})),),
}

LEGEND = """\
A column is a kind of row:

- **pair**: a question and its answers, nothing more.
- **system**, **developer**, **tool**: a message of that role before the answer.
- **call**, **call before**: `tool_calls` in the answer, or in an earlier turn; the arguments are an object.
- **call as text**: `tool_calls` in the answer; the arguments are a JSON text, as in OpenAI's interface.
- **tools**: the column `tools`, with one function.
- **thinking**, **`<think>`**: the answer has thinking, as `reasoning_content` or between `<think>` and `</think>`.
  **thinking before**, **`<think>` before**: an earlier turn has.
- **prefill**: the prompt ends with the beginning of the answer.
- **turns**: three questions and three answers, for SFT.
- **off**: `chat_template_kwargs: {enable_thinking: false}`.

A cell says what happens to such a row:

- **✓**: accepted, and all its words are among the tokens. Whether the model was trained on such rows is another
  question: a template may write a role or `<think>` that the model has never seen.
- **shorter**: accepted. The generation prompt opens thinking, but the template writes none before such an answer, so
  the prompt ends where the template starts the answer. Counted.
- **counted**: accepted without the thinking, which the template drops from earlier turns. Counted.
- **refused**: an error; the message says what would be dropped, or why the template refuses.
- **alone**: accepted if the turn is only the call; with words beside the call, an error.
- **after call**: accepted after a call, an error without one.
- **otherwise**: accepted, but the arguments are written differently from an object, mostly quoted once more.
- **asked**: an error, unless `chat_template_kwargs` is `{enable_thinking: true}`.
- **one**: all three answers are trained on in one example.
- **apart**: in three examples, because the template writes a turn differently once others follow.
- **read**: the template reads it. **–**: it does not, and the run says so (in the configuration it is an error).
- **pictures**: a template for messages with text and images; it takes no plain text, so every row is an error.

The command fails if words are missing that nothing counted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--templates", nargs="+", type=Path, metavar="FILE", help="other templates than TRL's")
    parser.add_argument("--all", action="store_true", help="TRL's training patches, too")
    parser.add_argument("--out", type=Path, help=f"file to write; of TRL's own templates {PAGE.parent.name}/{PAGE.name}")
    given = parser.parse_args(argv)
    try:
        templates = {f.stem: f.read_text(encoding="utf-8") for f in given.templates} if given.templates else shipped(given.all)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    text = page(templates)
    print(text)
    out = given.out or (None if given.templates or given.all else PAGE)
    if out is not None:
        write_atomically(out, text)
        print(out)
    if f"| {LOST} |" in text:
        print("words are missing that nothing counted: see the cells LOST", file=sys.stderr)
        return 1
    return 0


def shipped(patches: bool) -> dict[str, str]:
    """TRL's templates by name."""
    files = (resources.files("trl") / "chat_templates").iterdir()
    found = {file.name.removesuffix(".jinja"): file for file in files if file.name.endswith(".jinja")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found) if patches or not name.endswith("_training")}


def page(templates: Mapping[str, str]) -> str:
    """The whole page, as Markdown."""
    versions = f"trl {version('trl')}, transformers {version('transformers')}"
    lines = [
        "# What chat templates make of each kind of row",
        "",
        "Which rows isdaa accepts with which published chat template. Each kind of row is read and tokenised by the code that",
        "training uses, and its words are looked up among the tokens.",
        "",
        f"Written by `python benchmarks/chat_templates.py` ({versions}).",
        "Your own template: `--templates FILE`.",
        "",
        LEGEND,
        *table(templates),
    ]
    return "\n".join(lines) + "\n"


def table(templates: Mapping[str, str]) -> Iterator[str]:
    yield f"| template | {' | '.join(KINDS)} |"
    yield "|---" * (len(KINDS) + 1) + "|"
    for name, template in templates.items():
        yield f"| {name} | {' | '.join(cells(template))} |"


def cells(template: str) -> list[str]:
    """What becomes of each kind of row."""
    tokenizer = tokenizer_with(template)
    found = {name: cell(tokenizer, rows) for name, rows in KINDS.items()}
    if found["pair"] == "refused":
        return ["pictures" if "image" in template else "refused", *[""] * (len(KINDS) - 1)]
    as_text, as_object = (tokenised(tokenizer, row) for row in (KINDS["call as text"][0][1], pair([QUESTION], ASKING_ALONE)))
    if as_text and as_object and as_text[0] != as_object[0]:
        found["call as text"] = "otherwise"
    return list(found.values())


def cell(tokenizer: PreTrainedTokenizerFast, rows: Kind) -> str:
    """What becomes of the first of these rows that is taken."""
    for sign, row in rows:
        taken = tokenised(tokenizer, row)
        if taken is None:
            continue
        text, counts = taken
        said = json.dumps([turn for turn in row["messages"] if turn["role"] == "assistant"] if "messages" in row else row)
        missing = [word for word in WORDS if word in said and word not in text]
        if missing:
            return "counted" if missing == [THOUGHT] and counts.thinking_left_out else LOST
        if rows is KINDS["pair"] and counts.opening_cut:
            return "shorter"
        return "apart" if counts.turns_apart else "–" if counts.unread else sign
    return "refused"


def tokenised(tokenizer: PreTrainedTokenizerFast, row: Row) -> tuple[str, Counts] | None:
    """The text of a pair's prompt and chosen tokens, or of an SFT row's learnt ones, and what was counted. None: refused."""
    encoder = Encoder(tokenizer, SETTINGS)
    try:
        if "messages" not in row:
            found = encoder.pairs([canonical_pair(row, "row")])[0]
            return tokenizer.decode(found.prompt.ids + found.chosen), encoder.counts
        (examples,) = encoder.examples([canonical_sft(row, "row")])
    except UserError:
        return None
    encoder.counts.turns_apart = len(examples) - 1
    learnt = [token for ids, mask in examples for token, learn in zip(ids, mask, strict=True) if learn]
    return tokenizer.decode(learnt), encoder.counts


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """A token a byte, and one for everything in the template that looks like a special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>", *sorted(set(TOKEN.findall(template)))])
    names = {"bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, clean_up_tokenization_spaces=False, **names)


if __name__ == "__main__":
    sys.exit(main())
