"""Users' files are read as they are meant, whatever their kind, packing and encoding, or refused with one line."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from isdaa.data.reading.readers import SUFFIXES, divided, has_split, iterate_rows, kind_of
from isdaa.errors import UserError

ROWS = [
    {"prompt": "Où?", "chosen": "ici\u2028là\u0085\x00", "rejected": ""},
    {"prompt": "😀", "chosen": "a\tb", "rejected": 'c"'},
]
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".XZ": lzma.compress}
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"]


def rows_of(source: Path | str, *arguments: Any, **options: Any) -> list[Any]:
    return [row for row, _ in iterate_rows(str(source), *arguments, **options)]


def refusal(source: Path | str, *arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(source, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cell(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def table_of(separator: str) -> str:
    return "".join(separator.join(map(cell, line)) + "\r\n" for line in [ROWS[0].keys(), *(row.values() for row in ROWS)])


TEXTS = {
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    ".ndjson": "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    ".json": json.dumps(ROWS, ensure_ascii=False, indent=1),
    ".csv": table_of(","),
    ".tsv": table_of("\t"),
}


def encoded(text: str, encoding: str) -> bytes:
    mark = "\ufeff" if encoding.endswith("-be") else ""
    return (mark + text).encode(encoding)


# --- kinds, packing, encodings


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", TEXTS)
def test_text_of_every_unicode_encoding_gives_the_same_rows(kind: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs{kind}"
    path.write_bytes(encoded(TEXTS[kind], encoding))
    assert rows_of(path) == ROWS


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", TEXTS)
def test_packed_text_with_an_ending_in_capitals_gives_the_same_rows(kind: str, packing: str, tmp_path: Path) -> None:
    path = tmp_path / f"PAIRS{kind.upper()}{packing}"
    for encoding in ("utf-8", "utf-16"):
        path.write_bytes(PACK[packing](encoded(TEXTS[kind], encoding)))
        assert rows_of(path) == ROWS


def test_parquet_and_arrow_with_any_ending_give_the_same_rows(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "a.Parquet")
    pyarrow.feather.write_feather(table, str(tmp_path / "b.feather"))
    pyarrow.feather.write_feather(table, str(tmp_path / "c.ARROW"), compression="uncompressed")
    with pa.ipc.new_stream(str(tmp_path / "d.FEATHER"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.Parquet", "b.feather", "c.ARROW", "d.FEATHER"):
        assert rows_of(tmp_path / name) == ROWS


def test_json_lines_under_the_name_of_json_are_read_in_any_encoding(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json.gz"
    path.write_bytes(gzip.compress(TEXTS[".jsonl"].encode("utf-16")))
    assert rows_of(path) == ROWS


def test_json_lines_are_split_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    text = "".join(f'{{"a": "x{mark}y"}}\n' for mark in "\u2028\u2029\u0085\u007f") + '{"a":\r "\\u0000"}\r\n'
    for encoding in ENCODINGS:
        path.write_bytes(encoded(text, encoding))
        assert [row["a"] for row in rows_of(path)] == [*(f"x{mark}y" for mark in "\u2028\u2029\u0085\u007f"), "\0"]
        assert [where for _, where in iterate_rows(str(path))] == [f"{path}:{n}" for n in range(1, 6)]


def test_json_lines_of_two_files_with_byte_order_marks_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}\n' + b"\xef\xbb\xbf" + b'{"a": 2}\n\xef\xbb\xbf')
    assert rows_of(path) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson.gz", "a.json", "a.csv.xz", "a.tsv"])
def test_text_of_another_encoding_is_refused_with_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    pack = PACK.get(path.suffix.replace("xz", "XZ"), bytes)
    latin, bare = TEXTS[kind_of(path) or ""].replace("\u2028", "").replace("😀", ""), TEXTS[kind_of(path) or ""]
    path.write_bytes(pack(latin.encode("latin-1")))
    message = refusal(path)
    assert str(path) in message and "UTF-8" in message and "save" in message
    path.write_bytes(pack(bare.encode("utf-16-le")))
    assert "UTF-16 without its byte order mark" in refusal(path)
    path.write_bytes(pack(bare.encode("utf-16") + b"\0"))
    assert f"{path}: not valid UTF-16" in refusal(path)


def test_the_line_of_a_byte_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": "\xe9"}\n')
    assert f"{path}:3: not valid JSON, for it is not UTF-8" in refusal(path)
    path.write_bytes(b'{"a": "\xed\xa0\xbd"}\n')  # half a surrogate pair, in bytes
    assert f"{path}:1: not valid JSON, for it is not UTF-8" in refusal(path)


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("packing", [".gz", ".bz2", ".XZ"])
def test_packed_files_that_are_cut_or_not_packed_are_refused(packing: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs{kind}{packing}"
    whole = PACK[packing](TEXTS[kind].encode())
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:5], TEXTS[kind].encode(), whole[:-9] + b"\0" * 9):
        path.write_bytes(content)
        assert f"{path}: not a whole {packing.lower()} file" in refusal(path)


def test_a_packed_file_that_is_cut_late_gives_its_rows_and_then_the_refusal(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl.gz"
    packed = gzip.compress(b"".join(b'{"a": %d}\n' % (n * n) for n in range(100_000)))
    path.write_bytes(packed[: len(packed) // 2])
    rows = iterate_rows(str(path))
    assert next(rows)[0] == {"a": 0}
    with pytest.raises(UserError, match=r"not a whole \.gz file"):
        list(rows)


@pytest.mark.parametrize("name", ["a.parquet", "b.arrow", "c.feather"])
def test_parquet_and_arrow_that_are_cut_or_empty_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    table = pa.Table.from_pylist([{"a": f"{n}" * 9} for n in range(999)])
    pq.write_table(table, path) if name == "a.parquet" else pyarrow.feather.write_feather(table, str(path))
    whole = path.read_bytes()
    for content in (b"", whole[:3], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        assert f"{path}: not a readable" in refusal(path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", ".txt"),
        ("a.parquet.gz", ".parquet.gz"),
        ("a.Arrow.XZ", ".Arrow.XZ"),
        ("a.jsonl.zip", ".zip"),
        ("a.gz", ".gz"),
        ("jsonl", ""),
    ],
)
def test_files_of_unknown_kind_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    message = refusal(tmp_path / name)
    assert f"unknown kind of file '{kind}'" in message
    assert all(suffix in message for suffix in SUFFIXES)


# --- folders


def test_a_folder_named_like_a_file_is_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "pairs.jsonl"
    (folder / "train.jsonl").mkdir(parents=True)
    assert f"{folder}: holds no data file" in refusal(folder)
    assert not has_split(folder, "train")
    (folder / "train.jsonl" / "a.csv").write_text("a\n1\n")
    assert rows_of(folder, "train") == [{"a": "1"}]


def test_a_folders_files_are_found_whatever_their_ending(tmp_path: Path) -> None:
    (tmp_path / "train-1.JSONL").write_text('{"a": 1}\n')
    (tmp_path / "train-2.jsonl.gz").write_bytes(gzip.compress(b'{"a": 2}\n'))
    (tmp_path / "test.Tsv.BZ2").write_bytes(bz2.compress(b"a\n3\n"))
    (tmp_path / "dev.parquet.gz").write_bytes(b"no data")
    assert rows_of(tmp_path, "train") == [{"a": 1}, {"a": 2}]
    assert rows_of(tmp_path, "test") == [{"a": "3"}]
    assert [has_split(tmp_path, name) for name in ("train", "test", "dev")] == [True, True, False]


def test_a_file_beside_its_packed_self_is_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n'))
    assert "train.jsonl: exists twice" in refusal(tmp_path)


def test_names_that_end_like_files_are_no_names_on_the_hub() -> None:
    for name in ("data/pairs.JSONL", "data/pairs.jsonl.gz", "data/pairs.Feather", "data/pairs.tsv:small", "data/pairs:"):
        assert f"{name}: no such file or folder" in refusal(name)


# --- keys and columns given twice


TWICE = [
    ('{"prompt": "a", "prompt": "b"}', "prompt"),
    ('{"prompt": "a", "prompt": "a"}', "prompt"),
    ('{"prompt": [{"role": "user", "content": "a", "role": "user"}]}', "role"),
    ('{"facts": {"deep": [[{"x": {"": 1, "": 2}}]]}}', ""),
    ('{"a": {"x": 1, "x": 2}, "a": 3}', "x"),
    (r'{"prompt": 1, "pr\u006fmpt": 2}', "prompt"),
]


@pytest.mark.parametrize(("row", "key"), TWICE)
def test_a_key_given_twice_is_refused_with_its_row(row: str, key: str, tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text(f'{{"prompt": 1}}\n\n{row}\n{row}\n')
    assert f"{lines}:3: key '{key}' is given twice" in refusal(lines)
    assert rows_of(lines, limit=1) == [{"prompt": 1}]  # what lies behind the limit is not looked at
    wrong_name = lines.rename(tmp_path / "a.json")
    assert f"{wrong_name}:3: key '{key}' is given twice" in refusal(wrong_name)


@pytest.mark.parametrize(("row", "key"), [item for item in TWICE if '"a": 3' not in item[0]])
def test_a_key_given_twice_in_a_json_file_is_refused_with_its_row(row: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, number in (
        (f'[{{"prompt": 1}},\n\n{row}, {row}]', 2),
        (f'{{"data": [{{"a": 1}}, {{"a": 2}}, {row}]}}', 3),
        (row, 1),
    ):
        path.write_text(text)
        assert f"{path}:{number}: key '{key}' is given twice" in refusal(path)


def test_a_key_given_twice_outside_the_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text, key in (('{"data": [], "data": [{"a": 1}]}', "data"), ('{"meta": {"v": 1, "v": 2}, "data": [{"a": 1}]}', "v")):
        path.write_text(text)
        assert f"{path}: key '{key}' is given twice" in refusal(path)
    path.write_text('[{"a": {"x": 1, "x": 2}, "a": 3}]')
    assert f"{path}:1: key 'a' is given twice" in refusal(path)


@pytest.mark.parametrize("header", [["prompt", "chosen", "prompt"], ["", "", "prompt"]])
@pytest.mark.parametrize(("kind", "separator"), [(".csv", ","), (".tsv", "\t"), (".tsv.gz", "\t")])
def test_a_header_with_a_column_twice_is_refused(kind: str, separator: str, header: list[str], tmp_path: Path) -> None:
    path = tmp_path / f"a{kind}"
    path.write_bytes(PACK[path.suffix if kind.endswith(".gz") else ""](f"{separator.join(header)}\n".encode()))
    assert f"{path}:1: column '{header[0]}' is there twice" in refusal(path)


def test_one_column_without_a_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",prompt\n0,x\n")  # as pandas writes its index
    assert rows_of(tmp_path / "a.csv") == [{"": "0", "prompt": "x"}]


def test_a_parquet_or_arrow_column_twice_is_refused(tmp_path: Path) -> None:
    inner = pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["role", "role"])
    messages = pa.ListArray.from_arrays([0, 1], inner)
    for name, table in {
        "prompt": pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"]),
        "role": pa.table({"messages": messages}),
    }.items():
        pq.write_table(table, tmp_path / "a.parquet")
        for path, new in ((tmp_path / "b.arrow", pa.ipc.new_stream), (tmp_path / "c.feather", pa.ipc.new_file)):
            with new(str(path), table.schema) as writer:
                writer.write_table(table)
        for path in (tmp_path / "a.parquet", tmp_path / "b.arrow", tmp_path / "c.feather"):
            assert f"{path}: column '{name}' is there twice" in refusal(path)


# --- JSON and CSV that are broken


def test_json_that_python_cannot_hold_is_refused(tmp_path: Path) -> None:
    for value in ("[" * 100_000, "9" * 5000):
        (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": ' + value + "}\n")
        assert "a.jsonl:2: not valid JSON" in refusal(tmp_path / "a.jsonl")
        (tmp_path / "a.json").write_text('[{"a": ' + value + "}]")
        assert "a.json: not valid JSON" in refusal(tmp_path / "a.json")


def test_numbers_and_surrogates_that_python_reads_are_left(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": Infinity, "b": "\\ud83d"}\n')
    assert rows_of(tmp_path / "a.jsonl") == [{"a": float("inf"), "b": "\ud83d"}]


@pytest.mark.parametrize(("kind", "separator"), [("csv", ","), ("tsv", "\t")])
def test_a_table_row_with_a_wrong_number_of_cells_is_refused(kind: str, separator: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    start = 'a|b|c\n\n"1\n1"|2|\n\n'
    for row, words in (("1|2", "fewer"), ("1", "fewer"), (" ", "fewer"), ("1|2|3|4", "more")):
        path.write_text((start + row + "\n").replace("|", separator))
        assert f"{path}:6: {words} cells than the header has columns ({row.count('|') + 1}, not 3)" in refusal(path)
    path.write_text((start + '||""\n').replace("|", separator).replace("c\n\n", f"c{separator * 2}\n\n"))
    assert list(iterate_rows(str(path))) == [
        ({"a": "1\n1", "b": "2", "c": ""}, f"{path}:3"),
    ]  # a row of empty cells is what spreadsheets add
    path.write_text((start + '1|2|"3\n').replace("|", separator))
    assert f"{path}:6: not a valid {kind.upper()} row" in refusal(path)


def test_empty_files_have_no_rows(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.tsv"):
        for content in (b"", "\ufeff".encode(), "\ufeff".encode("utf-16-le"), b"\n"):
            (tmp_path / name).write_bytes(content)
            assert rows_of(tmp_path / name) == []


# --- subsets


def test_a_hub_source_with_a_subset_gives_it_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def load_dataset(*arguments: Any, **options: Any) -> Dataset:
        seen.append((arguments, options))
        return Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(iterate_rows("owner/pairs.v2:20220301.en", "dev")) == [({"prompt": "a"}, "owner/pairs.v2:20220301.en:1")]
    assert list(iterate_rows("owner/pairs")) == [({"prompt": "a"}, "owner/pairs:1")]
    assert seen == [
        (("owner/pairs.v2", "20220301.en"), {"split": "dev"}),
        (("owner/pairs", None), {"split": "train"}),
    ]
    for name in ("owner/pairs:", "owner/pairs:a:b", "owner/pairs:a/b", "./pairs:a", "pairs:a"):
        assert f"{name}: no such file or folder" in refusal(name)
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **o: (_ for _ in ()).throw(ValueError("no config\nmore")))
    assert refusal("owner/pairs:a").startswith("owner/pairs:a: neither a local path nor loadable from the Hub")


def test_a_folder_with_a_subset_is_its_sub_folder(tmp_path: Path) -> None:
    for name in ("en", "de", ".cache"):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "train.jsonl").write_text(json.dumps({"a": name}) + "\n")
    folder = tmp_path / "set"
    assert list(iterate_rows(f"{folder}:en", "train")) == [({"a": "en"}, f"{folder}/en/train.jsonl:1")]
    for name, hint in (("enn", ' (did you mean "en"?)'), ("", ""), (".cache", ""), ("..", "")):
        message = refusal(f"{folder}:{name}")
        assert f"{folder}:{name}: no sub-folder '{name}'{hint}; give one of de, en" in message
    assert "it has no sub-folder" in refusal(f"{folder}/en:x")
    assert f"{folder}/en/train.jsonl is a file, which has no subset" in refusal(f"{folder}/en/train.jsonl:3")
    assert "de: no file of split 'dev'" in refusal(f"{folder}:de", "dev")


def test_a_path_with_a_colon_is_read_as_that_path(tmp_path: Path) -> None:
    (tmp_path / "set:en" / "x").mkdir(parents=True)
    (tmp_path / "set:en" / "x" / "b:c.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "set" / "en").mkdir(parents=True)
    assert rows_of(f"{tmp_path}/set:en") == rows_of(f"{tmp_path}/set:en:x") == rows_of(f"{tmp_path}/set:en/x/b:c.jsonl")
    assert divided(f"{tmp_path}/set:en") == (f"{tmp_path}/set:en", None)
    assert divided(f"{tmp_path}/set:en:x") == (f"{tmp_path}/set:en", "x")
    assert divided("owner/name:a") == ("owner/name", "a")
