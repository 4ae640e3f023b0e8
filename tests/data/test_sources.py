"""Every kind of source gives the same rows, and every broken one a line that names file and row."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from isdaa.data.reading.sources import as_dataset, common_prompts, hold_out, load_pairs, load_prompts, load_rows, load_sft
from isdaa.errors import UserError

pytestmark = pytest.mark.fast

ROWS = [
    {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "Lyon,\nI think."},
    {"prompt": "Is it “warm” in May?", "chosen": "Yes.", "rejected": "No."},
]
USER = {"role": "user", "content": "Hello?"}
CHAT = {
    "chosen": [USER, {"role": "assistant", "content": "Hi."}],
    "rejected": [USER, {"role": "assistant", "content": "Go."}],
}
Write = Callable[..., str]


def refusal(source: str, *arguments: Any, reader: Any = load_pairs, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        reader(source, *arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def as_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def as_json_data(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.json"
    path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    return path


def as_json_lines_under_the_wrong_name(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return as_jsonl(folder, rows).rename(folder / "pairs.json")


def as_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "pairs.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_arrow_stream(folder: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    path = folder / "pairs.arrow"
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def as_arrow_file(folder: Path, rows: list[dict[str, Any]]) -> Path:
    table = pa.Table.from_pylist(rows)
    path = folder / "pairs.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return path


def as_saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_saved_splits(folder: Path, rows: list[dict[str, Any]]) -> Path:
    splits = DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])})
    splits.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    inner = folder / "folder" / "data"
    inner.mkdir(parents=True)
    for number, row in enumerate(rows):
        (inner / f"train-{number}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (inner / "test-0.jsonl").write_text("{broken\n")
    (inner.parent / "README.md").write_text("no data")
    return inner.parent


KINDS = [
    as_jsonl, as_json, as_json_data, as_json_lines_under_the_wrong_name, as_csv, as_parquet, as_arrow_stream,
    as_arrow_file, as_saved, as_saved_splits, as_folder,
]  # fmt: skip
ROW_NUMBERS = {
    as_jsonl: (1, 3), as_json_lines_under_the_wrong_name: (1, 3), as_csv: (2, 4),  # lines, the others rows
    as_folder: (1, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_pairs(kind: Any, tmp_path: Path) -> None:
    path = kind(tmp_path, ROWS)
    pairs, counts = load_pairs(str(path), "train")
    assert [{name: row[name] for name in ROWS[0]} for row in pairs] == ROWS
    assert (counts.rows, counts.kept) == (2, 2)
    numbers = [int(row["where"].rpartition(":")[2]) for row in pairs]
    assert tuple(numbers) == ROW_NUMBERS.get(kind, (1, 2))
    assert all(row["where"].startswith(str(path)) for row in pairs)
    assert len({row["id"] for row in pairs}) == 2
    assert len(load_rows(str(path), "train", limit=1)) == 1


@pytest.mark.parametrize("kind", [as_jsonl, as_json, as_parquet, as_arrow_stream, as_saved])
def test_conversations_from_every_kind_of_source(kind: Any, tmp_path: Path) -> None:
    pairs, _ = load_pairs(str(kind(tmp_path, [CHAT])))
    assert pairs[0]["prompt"] == [USER]
    assert pairs[0]["chosen"] == [{"role": "assistant", "content": "Hi."}]


def test_rows_come_back_as_they_were_given(write: Write) -> None:
    """Plain and chat prompts in one file, text that looks like JSON, facts with nulls: no column bends them."""
    looks_like_json = ROWS[0] | {"prompt": "5", "chosen": "true", "rejected": '"x"', "facts": {"a": None, "b": [1]}}
    pairs, _ = load_pairs(write(ROWS[0], CHAT, looks_like_json, ROWS[1] | {"facts": {"c": 1.5}}))
    assert pairs[0]["prompt"] == ROWS[0]["prompt"]
    assert pairs[1]["prompt"] == [USER]
    assert (pairs[2]["prompt"], pairs[2]["chosen"], pairs[2]["rejected"]) == ("5", "true", '"x"')
    assert [row["facts"] for row in pairs] == [None, None, {"a": None, "b": [1]}, {"c": 1.5}]
    assert pairs.select([1])[0]["prompt"] == [USER]
    assert next(iter(pairs["prompt"])) == ROWS[0]["prompt"]
    assert pairs[0]["weight"] is None and pairs[0]["prompt_ids"] is None
    again = as_dataset([pairs[i] | {"weight": 2.0} for i in range(4)])
    assert again[1]["prompt"] == [USER] and again[1]["weight"] == 2.0


def test_equal_pairs_and_those_without_a_common_prompt_are_dropped_and_counted(write: Write) -> None:
    apart = {"chosen": [USER, *CHAT["chosen"]], "rejected": CHAT["rejected"]}
    pairs, counts = load_pairs(write(ROWS[0], ROWS[1] | {"chosen": "No."}, apart))
    assert len(pairs) == 1
    assert (counts.rows, counts.kept, counts.dropped_equal, counts.dropped_no_common_prompt) == (3, 1, 1, 1)


def test_no_pair_left(write: Write) -> None:
    message = refusal(write(ROWS[1] | {"chosen": "No."}))
    assert "pairs.jsonl: no pair is left" in message and "1 dropped: chosen equals rejected" in message
    assert "no pair is left" in refusal(write())


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ('{"prompt": "x", ', "not valid JSON"),
        ('"text"', "expected a JSON object"),
        (json.dumps({"prompt": "x"}), "'chosen' is missing"),
    ],
)
def test_a_broken_line_is_named(line: str, part: str, write: Write) -> None:
    message = refusal(write(ROWS[0], "", line))
    assert "pairs.jsonl:3: " in message and part in message


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n{"prompt": "\xff"}\n')
    assert "pairs.jsonl:2: not valid JSON" in refusal(str(path))
    path = path.rename(tmp_path / "pairs.json")
    path.write_bytes(b'[{"prompt": "\xff"}]')
    assert "not valid UTF-8" in refusal(str(path))
    path = path.rename(tmp_path / "pairs.csv")
    path.write_bytes(b"prompt,chosen,rejected\n\xff,b,c\n")
    assert "not valid UTF-8" in refusal(str(path))


def test_broken_files_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "x"},\n {]')
    assert "a.json:2: not valid JSON" in refusal(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text('[{"prompt": "x", "chosen": "y", "rejected": "z"}, 3]')
    assert "b.json:2: expected a JSON object" in refusal(str(tmp_path / "b.json"))
    (tmp_path / "c.json").write_text('{"data": 3}')
    assert "expected a list" in refusal(str(tmp_path / "c.json"))
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected\na,b,c\na,b,c,d\n")
    assert "d.csv:3: more cells" in refusal(str(tmp_path / "d.csv"))
    (tmp_path / "e.csv").write_text("prompt,chosen,rejected\na,b\n")
    assert "e.csv:2: fewer cells" in refusal(str(tmp_path / "e.csv"))
    (tmp_path / "f.csv").write_text('prompt,chosen,rejected\na,b,c\na,"b,c\n')
    assert "f.csv:3: not a valid CSV row" in refusal(str(tmp_path / "f.csv"))
    (tmp_path / "g.parquet").write_text("no parquet")
    assert "g.parquet: not a readable Parquet file" in refusal(str(tmp_path / "g.parquet"))
    (tmp_path / "h.arrow").write_text("no arrow")
    assert "h.arrow: not a readable Arrow file" in refusal(str(tmp_path / "h.arrow"))
    (tmp_path / "i.txt").write_text("text")
    assert "unknown kind of file '.txt'" in refusal(str(tmp_path / "i.txt"))


def test_sources_that_are_not_there(tmp_path: Path, write: Write) -> None:
    path = write(ROWS[0])
    assert 'did you mean "pairs.jsonl"?' in refusal(path.replace("pairs", "pears"))
    for name in ("pairs", "data/pairs.jsonl", "./data/pairs", "./pairs", "../pairs", "/nowhere/at/all", "~/no/such.csv"):
        message = refusal(name)
        assert name in message and "no such file or folder" in message
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no data file" in refusal(str(empty))
    assert "has no subset" in refusal(f"{path}:default")


def test_splits_of_folders(tmp_path: Path) -> None:
    folder = as_folder(tmp_path, ROWS)
    assert "test-0.jsonl:1: not valid JSON" in refusal(str(folder), "test")
    message = refusal(str(folder), "validation")
    assert "no file of split 'validation'" in message and "test, train" in message
    saved = as_saved_splits(tmp_path, ROWS)
    assert load_pairs(str(saved), "test")[1].kept == 1
    assert load_pairs(str(saved))[1].kept == 2
    assert "no split 'tests' (did you mean \"test\"?)" in refusal(str(saved), "tests")
    (saved / "train" / "dataset_info.json").write_text("{")
    assert "not a readable save_to_disk folder" in refusal(str(saved))


def test_a_folder_without_split_names_is_read_whole(tmp_path: Path, write: Write) -> None:
    write(ROWS[0], name="folder/a.jsonl")
    write(ROWS[1], name="folder/b.jsonl")
    assert load_pairs(str(tmp_path / "folder"), "train")[1].kept == 2


def test_hub_names_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def load_dataset(*arguments: Any, **options: Any) -> Dataset:
        seen.append((arguments, options))
        return Dataset.from_list([{**row, "query_token": [1, 2]} for row in ROWS])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    pairs, _ = load_pairs("owner/pairs.v2:small", "train_prefs")
    assert seen == [(("owner/pairs.v2", "small"), {"split": "train_prefs"})]
    assert pairs[1]["where"] == "owner/pairs.v2:small:2"
    load_pairs("owner/pairs")
    assert seen[-1][1] == {"split": "train"}
    assert load_rows("owner/pairs")[0]["query_token"] is None  # not decoded, but known by name
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **o: (_ for _ in ()).throw(ValueError("Unknown split\nmore")))
    message = refusal("owner/pairs", "trian")
    assert "owner/pairs" in message and "'trian'" in message and "Unknown split" in message


def test_the_embedded_world() -> None:
    sft, counts = load_sft("world:small", "train", limit=4)
    assert counts.kept == 4
    assert sft[0]["prompt"].endswith("TL;DR:") and sft[0]["completion"]
    prompts, _ = load_prompts("world:small", "train", limit=4)
    held, _ = load_prompts("world:small", "test", limit=4)
    assert prompts[0]["facts"]["size"] == "small" and prompts[0]["chosen"]
    assert not {row["prompt"] for row in sft} & {row["prompt"] for row in prompts}
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in prompts}
    assert load_prompts("world:small", "sft", limit=4)[0][0]["prompt"] == sft[0]["prompt"]
    assert load_prompts("world:small:1", "train", limit=4)[0][0]["prompt"] != prompts[0]["prompt"]
    assert load_prompts("world:small", "train", limit=2)[0][1] == prompts[1]
    for name in ("world:smal", "world:small:x", "world:small:1:2", "world:"):
        assert f"{name}: no such world" in refusal(name, reader=load_sft)
    assert "no split 'trains'" in refusal("world:small", "trains", reader=load_sft)
    assert "'chosen' is missing" in refusal("world:small", "train", limit=1)


def test_prompts_are_used_once(write: Write) -> None:
    path = write(ROWS[0], ROWS[1], ROWS[0] | {"chosen": "Rome."}, CHAT, {"prompt_ids": [1]}, {"prompt_ids": [1]})
    prompts, counts = load_prompts(path)
    assert [row["chosen"] for row in prompts][:2] == ["Paris.", "Yes."]
    assert (counts.rows, counts.kept, counts.repeated_prompts) == (6, 4, 2)
    assert "no prompt is left" in refusal(write(), reader=load_prompts)
    assert "no example" in refusal(write(), reader=load_sft)


def test_hold_out_is_by_prompt(write: Write) -> None:
    rows = [{"prompt": f"question {i // 2}", "chosen": f"yes {i}", "rejected": "no"} for i in range(40)]
    pairs, _ = load_pairs(write(*rows))
    train, held = hold_out(pairs, 0.25, seed=1)
    assert held is not None
    assert (len(train), len(held)) == (30, 10)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    backwards, _ = load_pairs(write(*reversed(rows)))
    again = hold_out(backwards, 0.25, seed=1)[1]
    other = hold_out(pairs, 0.25, seed=2)[1]
    assert again is not None and other is not None
    assert {row["prompt"] for row in again} == {row["prompt"] for row in held} != {row["prompt"] for row in other}
    assert hold_out(pairs, 0.0) == (pairs, None)
    tiny = hold_out(pairs, 1e-6)[1]
    assert tiny is not None and len(tiny) == 2
    with pytest.raises(UserError, match="has one prompt"):
        hold_out(pairs.select([0, 1]), 0.1)


def test_files_of_one_name_in_a_folder_have_their_own_ids(tmp_path: Path) -> None:
    for home in ("here", "there/below"):
        for part in ("a", "b"):
            (tmp_path / home / part).mkdir(parents=True)
            as_jsonl(tmp_path / home / part, ROWS)
        as_jsonl(tmp_path / home, ROWS)
    reads = [load_pairs, load_prompts, lambda source: load_sft(source)]
    for read in reads:
        ids = [[row["id"] for row in read(str(tmp_path / home))[0]] for home in ("here", "there/below")]
        assert ids[0] == ids[1]
        assert len(set(ids[0])) == len(ids[0])
    assert load_pairs(str(tmp_path / "here"))[0]["id"] == [f"{p}pairs.jsonl:{n}" for p in ("a/", "b/", "") for n in (1, 3)]
    assert load_pairs(str(tmp_path / "here" / "a" / "pairs.jsonl"))[0]["id"] == ["pairs.jsonl:1", "pairs.jsonl:3"]


def test_common_prompts() -> None:
    rows = [{"prompt": name, "prompt_ids": None, "chosen": "c"} for name in "aabc"]
    with_ids = [{"prompt": "a", "prompt_ids": [1]}, {"prompt": "x", "prompt_ids": [2]}]
    assert common_prompts(as_dataset(rows), as_dataset(rows[1:3])) == 2
    assert common_prompts(rows, [{"prompt": [{"role": "user", "content": "a"}]}]) == 0
    assert common_prompts(with_ids, [{"prompt": "y", "prompt_ids": [2]}]) == 1
