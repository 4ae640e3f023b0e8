"""Data recipes on small files of the published schemas, read by the same code as the Hub's data sets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from isdaa.config import validate
from isdaa.data.reading.recipes import RECIPES
from isdaa.data.reading.sources import load_pairs, load_prompts, load_sft
from isdaa.errors import UserError
from isdaa.training.preflight import check_inputs

Write = Callable[..., str]
QUERY = "SUBREDDIT: r/cats\n\nTITLE: My cat\n\nPOST: She sleeps.\n\nTL;DR:"
POST = {"subreddit": "cats", "title": "My cat", "post": "She sleeps."}
# The columns of the data sets as published; columns of token ids stand for all that nobody reads.
TLDR_POST = {
    "id": "t3_1", **POST, "summary": "Cat sleeps.", "query": QUERY + " ", "query_token": [1, 2],
    "reference_response": " Cat sleeps.<|endoftext|>", "reference_response_token_len": 5,
}  # fmt: skip
TLDR_PAIR = {
    "info": {"id": "t3_1", **POST, "site": None, "article": None},
    "summaries": [{"text": " Dog.", "policy": "sup1", "note": None}, {"text": " Cat sleeps.", "policy": "sup2", "note": None}],
    "choice": 1, "worker": "w", "batch": "batch3", "split": "train", "extra": {"confidence": 8},
    "query": QUERY, "query_token": [1, 2], "chosen": " Cat sleeps.<|endoftext|>", "chosen_token": [3],
    "rejected": " Dog.<|endoftext|>[PAD][PAD]", "rejected_token": [4], "chosen_policy": "sup2", "rejected_policy": "sup1",
}  # fmt: skip
DIALOGUE = "\n\nHuman: Hi?\n\nAssistant: Hello.\n\nHuman: And now?\n\nAssistant:"
HH = {"prompt": DIALOGUE, "response": " Now this.", "chosen": " Now this.", "rejected": "That. "}
HH_WHOLE = {"chosen": DIALOGUE + " Now this.", "rejected": DIALOGUE + " That."}
ASK, GOOD, BAD = ({"content": c, "role": r} for c, r in (("Why?", "user"), ("So.", "assistant"), ("No.", "assistant")))
FEEDBACK = {
    "prompt": "Why?", "prompt_id": "a1", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "messages": [ASK, GOOD],
    "score_chosen": 8.5, "score_rejected": 3.0,
}  # fmt: skip
CHAT = {"prompt": "Why?", "prompt_id": "b2", "messages": [ASK, GOOD, {"content": "Really?", "role": "user"}, BAD]}
TURNS = [
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And now?"},
]


def parquet(path: Path, *rows: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def texts(rows: Any, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def refusal(reader: Any, source: str, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        reader(source, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tldr(tmp_path: Path, write: Write) -> None:
    """Prompts and responses as texts that join with one space; nothing of the other tokenizer's EOS and padding is left."""
    posts = "tldr:" + parquet(tmp_path / "posts.parquet", TLDR_POST)
    assert texts(load_sft(posts)[0], "prompt", "completion") == [(QUERY, " Cat sleeps.")]
    assert texts(load_prompts(posts)[0], "prompt", "chosen") == [(QUERY, " Cat sleeps.")]
    pairs = "tldr:" + parquet(tmp_path / "pairs.parquet", TLDR_PAIR)
    assert texts(load_pairs(pairs)[0], "prompt", "chosen", "rejected") == [(QUERY, " Cat sleeps.", " Dog.")]
    assert texts(load_prompts(pairs)[0], "prompt", "chosen") == [(QUERY, " Cat sleeps.")]
    raw = {key: TLDR_PAIR[key] for key in ("info", "summaries", "choice")}
    openai = write(raw, raw | {"choice": 0})
    assert texts(load_pairs(f"tldr:{openai}")[0], "prompt", "chosen") == [(QUERY, " Cat sleeps."), (QUERY, " Dog.")]
    only_reference = {key: TLDR_POST[key] for key in ("query", "reference_response")}
    assert texts(load_sft(f"tldr:{write(only_reference)}")[0], "completion") == [(" Cat sleeps.",)]


def test_tldr_rows_that_teach_nothing_are_dropped_and_counted(write: Write) -> None:
    same, empty = TLDR_PAIR | {"rejected": " Cat sleeps. "}, TLDR_PAIR | {"rejected": "<|endoftext|>"}
    pairs, counts = load_pairs("tldr:" + write(TLDR_PAIR, same, empty))
    assert (len(pairs), counts.rows, counts.kept, counts.dropped_equal, counts.dropped_no_response) == (1, 3, 1, 1, 1)
    assert "1 dropped: a response is empty, or the dialogue does not end with one" in counts.lines()
    examples, counts = load_sft("tldr:" + write(TLDR_POST, TLDR_POST | {"summary": " "}))
    assert (len(examples), counts.rows, counts.kept, counts.dropped_no_response) == (1, 2, 1, 1)


@pytest.mark.parametrize("row", [HH, HH_WHOLE, HH | {"chosen": DIALOGUE + " Now this."}], ids=["prompt", "whole", "both"])
def test_hh(row: dict[str, Any], tmp_path: Path) -> None:
    path = parquet(tmp_path / "hh.parquet", row)
    expected = (DIALOGUE, " Now this.", " That.")
    assert texts(load_pairs(f"hh:{path}")[0], "prompt", "chosen", "rejected") == [expected]
    assert texts(load_sft(f"hh:{path}")[0], "prompt", "completion") == [expected[:2]]
    assert texts(load_prompts(f"hh:{path}")[0], "prompt", "chosen") == [expected[:2]]
    answers = [[{"role": "assistant", "content": text}] for text in ("Now this.", "That.")]
    assert texts(load_pairs(f"hh_chat:{path}")[0], "prompt", "chosen", "rejected") == [(TURNS, *answers)]
    assert texts(load_sft(f"hh_chat:{path}")[0], "prompt", "completion") == [(TURNS, answers[0])]
    assert texts(load_prompts(f"hh_chat:{path}")[0], "prompt", "chosen") == [(TURNS, answers[0])]


@pytest.mark.parametrize("recipe", ["hh", "hh_chat"])
def test_hh_dialogues_without_a_common_last_turn(recipe: str, write: Write) -> None:
    whole = HH_WHOLE["chosen"]
    rows = [
        HH_WHOLE,
        HH_WHOLE | {"rejected": whole.replace("Hello.", "Hey.")},  # they differ before the last turn
        HH_WHOLE | {"rejected": whole + "\n\nHuman: Oh.\n\nAssistant: Yes."},  # one is longer
        {"chosen": whole + "\n\nHuman: Thanks.", "rejected": whole + "\n\nHuman: Bye."},  # people have the last word
        HH | {"chosen": ""},
        HH_WHOLE | {"chosen": DIALOGUE + " "},
        HH | {"rejected": HH["chosen"]},
    ]
    pairs, counts = load_pairs(f"{recipe}:{write(*rows)}")
    assert len(pairs) == counts.kept == 1
    assert (counts.dropped_no_common_prompt, counts.dropped_no_response, counts.dropped_equal) == (2, 3, 1)


def test_hh_turns_of_one_speaker_in_a_row_become_one(write: Write) -> None:
    row = HH | {"prompt": "\n\nHuman: One.\n\nHuman: Two.\n\nA list:\n\n- x\n\nAssistant:"}
    prompts, _ = load_prompts(f"hh_chat:{write(row)}")
    assert prompts[0]["prompt"] == [{"role": "user", "content": "One.\n\nTwo.\n\nA list:\n\n- x"}]


def test_ultrafeedback(tmp_path: Path) -> None:
    other_prompt = FEEDBACK | {"prompt": "Why? (said twice)"}
    empty = FEEDBACK | {"rejected": [ASK, BAD | {"content": ""}]}
    same = FEEDBACK | {"rejected": [ASK, GOOD]}
    path = parquet(tmp_path / "feedback.parquet", FEEDBACK, other_prompt, empty, same)
    pairs, counts = load_pairs(f"ultrafeedback:{path}")
    names = ("prompt", "chosen", "rejected", "chosen_reward", "rejected_reward")
    assert texts(pairs, *names) == [([ASK], [GOOD], [BAD], 8.5, 3.0)] * 2
    assert (counts.rows, counts.dropped_no_response, counts.dropped_equal) == (4, 1, 1)
    assert texts(load_sft(f"ultrafeedback:{path}")[0], "prompt", "completion")[0] == ([ASK], [GOOD])
    assert texts(load_prompts(f"ultrafeedback:{path}")[0], "prompt", "chosen") == [([ASK], [GOOD])]


def test_ultrachat(tmp_path: Path) -> None:
    path = parquet(tmp_path / "chat.parquet", CHAT, CHAT | {"messages": CHAT["messages"][:3]})
    examples, counts = load_sft(f"ultrachat:{path}")
    assert texts(examples, "prompt", "completion") == [(None, CHAT["messages"])]
    assert counts.dropped_no_response == 1
    assert texts(load_prompts(f"ultrachat:{path}")[0], "prompt", "chosen") == [(CHAT["messages"][:3], [BAD])]
    assert "no preference pairs; it is for data.prompts and data.sft" in refusal(load_pairs, f"ultrachat:{path}")


def test_splits_of_a_local_copy(tmp_path: Path) -> None:
    """Files named as on the Hub: only the split that is meant. Files named plainly, and what `datasets` saved, do, too."""
    home = tmp_path / "ultrafeedback_binarized"
    for split, row in (("train_prefs", FEEDBACK), ("train_sft", CHAT), ("test_prefs", FEEDBACK | {"score_chosen": 1.0})):
        parquet(home / "data" / f"{split}-00000-of-00001.parquet", row)
    assert texts(load_pairs(f"ultrafeedback:{home}", "train")[0], "chosen_reward") == [(8.5,)]
    assert texts(load_pairs(f"ultrafeedback:{home}", "test")[0], "chosen_reward") == [(1.0,)]
    assert texts(load_prompts(f"ultrafeedback:{home}")[0], "prompt") == [([ASK],)]
    assert load_sft(f"ultrachat:{home}")[1].kept == 1
    plain = tmp_path / "plain"
    plain.mkdir()
    for split, score in (("train", 2.0), ("test", 4.0)):
        (plain / f"{split}.jsonl").write_text(json.dumps(FEEDBACK | {"score_chosen": score}) + "\n")
    assert texts(load_pairs(f"ultrafeedback:{plain}", "test")[0], "chosen_reward") == [(4.0,)]
    saved = DatasetDict({"train": Dataset.from_list([TLDR_PAIR]), "validation": Dataset.from_list([TLDR_PAIR, TLDR_PAIR])})
    saved.save_to_disk(str(tmp_path / "saved"))
    assert [load_pairs(f"tldr:{tmp_path}/saved", split)[1].rows for split in ("train", "test")] == [1, 2]


def test_what_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: Any, split: str) -> Dataset:
        asked.append((name, split))
        rows = {"oai": TLDR_PAIR, "tldr": TLDR_POST, "hh": HH, "ultrafeedback": FEEDBACK, "ultrachat": CHAT}
        if name.startswith("vwxyzjn/"):
            return Dataset.from_list([rows["tldr" if "tldr_3" in name else "oai"]])
        return Dataset.from_list([next(row for key, row in rows.items() if key in name)])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    readers = {"pairs": load_pairs, "prompts": load_prompts, "sft": load_sft}
    for name, recipe in RECIPES.items():
        for purpose in recipe:
            for split in ("train", "test"):
                assert readers[purpose](name, split)[1].kept == 1
    posts = "vwxyzjn/summarize_from_feedback_tldr_3_filtered_oai_preprocessing_1706381144"
    pairs = "vwxyzjn/summarize_from_feedback_oai_preprocessing_1706381144"
    assert asked[:6] == [(pairs, "train"), (pairs, "validation"), *[(posts, "train"), (posts, "test")] * 2]
    assert set(asked[6:]) == {
        *(("Dahoas/full-hh-rlhf", split) for split in ("train", "test")),
        *(("HuggingFaceH4/ultrafeedback_binarized", f"{part}_{kind}") for part in ("train", "test") for kind in ("prefs", "sft")),
        *(("HuggingFaceH4/ultrachat_200k", f"{part}_sft") for part in ("train", "test")),
    }
    load_pairs("ultrafeedback", "train_gen")
    assert asked[-1][1] == "train_gen"  # a name of the data set's own is left alone


def test_offline_and_misspelt_names_are_one_line(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    message = refusal(load_pairs, "hh", "train")
    assert "Dahoas/full-hh-rlhf: neither a local path nor loadable from the Hub, split 'train'" in message
    assert "OfflineModeIsEnabled" in message and "RECIPE:PATH" in message
    message = refusal(load_pairs, "ultrafedback")
    assert 'did you mean "ultrafeedback"?' in message and "ultrachat" in message
    assert "hh:./nowhere: ./nowhere is not there" in refusal(load_pairs, "hh:./nowhere")
    assert "the path is not there" in refusal(load_pairs, "hh:")
    (tmp_path / "hh").mkdir()
    assert "also a file or folder here; write ./hh" in refusal(load_pairs, "hh")
    for row, words in (
        ({"chosen": "a"}, "column 'query' is missing"),
        (TLDR_PAIR | {"chosen": None, "choice": 2}, "'choice' must be 0 or 1"),
        (TLDR_PAIR | {"chosen": [GOOD]}, "must be text here"),
    ):
        message = refusal(load_pairs, f"tldr:{write(row)}")
        assert "pairs.jsonl:1: " in message and words in message


def test_a_run_looks_at_local_copies_before_it_starts(tmp_path: Path, write: Write) -> None:
    config = {"stages": ["sft", "align"], "model": {"path": "owner/model"}}
    good = {"sft": f"ultrachat:{write(CHAT)}", "pairs": "hh", "evaluation": "hh"}
    check_inputs(validate(config | {"data": good}, "test"), ["sft", "align"])
    for key, value in (("pairs", "ultrachat"), ("evaluation", "hh:/nowhere"), ("sft", "ultracat")):
        with pytest.raises(UserError, match=f"^data.{key}: "):
            check_inputs(validate(config | {"data": good | {key: value}}, "test"), ["sft", "align"])
