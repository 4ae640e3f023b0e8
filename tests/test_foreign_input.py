"""Files that isdaa did not write, or that were damaged: one line with file and row or key, and never a traceback."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from isdaa.cli import main
from isdaa.data.reading.readers import iterate_rows
from isdaa.data.reading.sources import load_pairs
from isdaa.errors import LONGEST, UserError
from isdaa.foreign import DEPTH, ROW, check_limits, check_shape, no_panics, read_json, readable, readable_jsonl
from isdaa.models.loading import load_model, load_tokenizer, random_config, random_model
from isdaa.objectives.presets import resolve

DIGITS = "9" * 5000
DEEP = "[" * 5000 + "]" * 5000
ROW_TEXT = '{"prompt": "a", "chosen": "b c", "rejected": "d e"%s}\n'
TINY = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": 40}


def line_of(call: Any) -> str:
    """The error of a call, which must be one line of limited length."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable() and len(line) <= LONGEST
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Rows


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (f', "weight": {DIGITS}', "4300 digits"),
        (f', "weight": {DEEP}', "nested"),
        (', "tools": ' + "[" * 200 + "1" + "]" * 200, "nested more than 100 deep"),
        (f', "prompt_ids": [{2**31}], "chosen_ids": [1], "rejected_ids": [2]', "no token's id"),
        (f', "prompt_ids": [{"1" + "0" * 400}], "chosen_ids": [1], "rejected_ids": [2]', "no token's id"),
        (', "facts": "\\ud800"', "lone surrogate"),
        (', "tools": "\\ud800"', "tools"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_bad_value_is_named_with_file_and_row(cell: str, words: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [ROW_TEXT % "", ROW_TEXT % cell]
    path.write_text("".join(rows) if suffix == ".jsonl" else f"[{','.join(rows)}]")
    line = line_of(lambda: load_pairs(str(path)))
    assert words in line and path.name in line
    assert f"{path.name}:2" in line or suffix == ".json"


def test_invalid_utf8_in_parquet_and_arrow(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    text = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    table = pa.table({"prompt": text, "chosen": ["a"], "rejected": ["b"]})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    pa.feather.write_feather(table, tmp_path / "rows.feather")
    for name in ("rows.parquet", "rows.feather"):
        assert name in line_of(lambda name=name: load_pairs(str(tmp_path / name)))


@pytest.mark.parametrize("suffix", ["parquet", "feather"])
@pytest.mark.parametrize("zone", [None, "Nowhere/Land"])
def test_a_date_that_is_none_is_named_with_row_and_column(zone: str | None, suffix: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import feather, parquet

    file, texts = tmp_path / f"rows.{suffix}", [f"text {i}" for i in range(3)]
    times = pa.array([None, 10**18, 3], pa.timestamp("us", tz=zone))
    table = pa.table({"prompt": texts, "chosen": texts, "rejected": texts[::-1], "made": times})
    (parquet.write_table if suffix == "parquet" else feather.write_feather)(table, file)
    line = line_of(lambda: list(iterate_rows(str(file))))
    assert line.startswith(f"{file}:2: column 'made' holds a value that cannot be read (")


def test_a_row_has_a_largest_size_and_depth(tmp_path: Path) -> None:
    check_limits({"a": "x" * 1000}, "f:1")
    nested: Any = 1
    for _ in range(DEPTH):
        nested = [nested]
    check_limits(nested, "f:1")
    assert "f:1" in line_of(lambda: check_limits([nested], "f:1")) and "f:1" in line_of(
        lambda: check_limits({"a": nested}, "f:1")
    )
    endless: list[Any] = []
    endless.append(endless)
    line_of(lambda: check_limits(endless, "f:1"))
    half = "x" * (ROW // 2)
    for large in ({"a": half, "b": half}, [half, half, "y"], {"a": [1] * (ROW // 8 + 1)}, {"x" * (ROW + 1): 1}):
        assert "64 MiB" in line_of(lambda large=large: check_limits(large, "f:1"))
    for name, content in (
        ("rows.jsonl", ROW_TEXT % f', "more": "{half}{half}"'),
        ("rows.csv", f"prompt,text\na,{half}{half}x\n"),
    ):
        (tmp_path / name).write_text(content)
        assert "64 MiB" in line_of(lambda name=name: list(iterate_rows(str(tmp_path / name))))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow", "rows.jsonl.gz"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "loop", "dangling"])
def test_no_file_where_one_should_be(kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(name)
    else:
        path.symlink_to({"device": "/dev/zero", "loop": name, "dangling": "nowhere"}[kind])
    assert name in line_of(lambda: load_pairs(name))
    assert name in line_of(lambda: read_json(name))


@pytest.mark.parametrize("splits", ["[]", '"train"', '["../.."]', "{}", "[1]", DEEP, "[NaN]"])
def test_a_saved_data_set_whose_list_of_splits_is_wrong(splits: str, tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text(f'{{"splits": {splits}}}')
    assert "dataset_dict.json" in line_of(lambda: load_pairs(str(tmp_path)))


# ---------------------------------------------------------------------------------------------------------------------
# Records


@pytest.mark.parametrize(
    "text",
    ["", "[1", DIGITS, DEEP, "NaN", '{"a": Infinity}', '{"a": 1, "a": 2}', "\ud800", '{"a": ' + "[" * 200 + "]" * 200 + "}"],
)
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "record.json" in line_of(lambda: read_json(path))
    path.write_bytes(text.encode("utf-8", "surrogatepass") + b"\n")
    if text:
        assert "record.json" in line_of(lambda: readable_jsonl(path))


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"n": "1"}, "n"),
        ({"n": True}, "n"),
        ({"n": 2**60}, "n"),
        ({"n": 1.5}, "n"),
        ({}, "n"),
        ({"n": 1, "x": 1e31}, "x"),
        ({"n": 1, "x": float("nan")}, "x"),
        ({"n": 1, "l": []}, "l"),
        ({"n": 1, "l": ["a", 1]}, "l.1"),
        ({"n": 1, "d": {"e": 1}}, "d.e"),
        ({"n": 1, "any": {"k": 1, "l": "a"}}, "any.l"),
        ([1], "object"),
        (None, "object"),
    ],
)
def test_a_shape_says_which_key_is_wrong(value: Any, key: str) -> None:
    shape = {"n": int, "x?": (float, None), "l?": [str, ...], "d?": ({"e": str}, None), "any?": {"*": int}}
    check_shape({"n": 1, "x": None, "l": ["a"], "d": {"e": "a"}, "any": {"k": 1}, "more": object()}, shape, "f")
    check_shape({"n": 1, "x": 3, "d": None}, shape, "f")
    line = line_of(lambda: check_shape(value, shape, "f"))
    assert line.startswith("f: ") and key in line


RECORD = {"kind": "policy", "config": {}, "reference": None, "evaluation": None, "scorer": None, "step": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"config": []},
        {"config": {"model": 3}},
        {"config": {"evaluation": [1]}},
        {"step": "1"},
        {"step": 10**30},
        {"reference": 5},
        {"evaluation": {}},
        {"scorer": [1]},
        {"kind": None},
        {"config": {"objective": {"method": {}}}},
        {"unknown": 1},
        {"tokens": "x"},
    ],
)
def test_records_of_wrong_types(change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "isdaa.json").write_text(json.dumps(RECORD | change))
    assert main(["evaluate", "--model_path", str(tmp_path)]) == 2
    assert "isdaa.json" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "content",
    [
        '{"stages": []}',
        '{"stages": {"sft": 1}}',
        '{"stages": {"sft": {"values": 1}}}',
        '{"stages": {"sft": {"done": 1}}}',
        "[]",
        '{"stages": {"sft": {"notes": "x"}}}',
        '{"stages": {"sft": {"tokens": "2"}}}',
        '{"stages": {"sft": {"pinned": {"a": 1}}}}',
    ],
)
def test_a_run_whose_record_has_wrong_types(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    for command in ("train", "inspect"):
        options = ["--model.path", "m", "--data.pairs", str(tmp_path / "p.jsonl"), "--output_dir", str(tmp_path / "run")]
        assert main([command, *options]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("isdaa: error: ") and "run.json" in line


# ---------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 3}, "no model can be made"),
        ({"num_attention_heads": 3}, "no model can be made"),
        ({"num_attention_heads": 0}, "no model can be made"),
        ({"hidden_act": "none such"}, "no model can be made"),
        ({"pad_token_id": 99}, "no model can be made"),
        ({"vocab_size": 10**12}, r"GB of memory"),
        ({"hidden_size": 10**9}, r"GB of memory"),
        ({"num_hidden_layers": 10**8}, r"GB of memory"),
        ({"vocab_size": 10**30}, "no model can be made"),
    ],
)
def test_a_random_model_works_and_fits_the_memory(change: dict[str, Any], words: str) -> None:
    began = time.process_time()
    assert words in line_of(lambda: random_model(TINY | change, 0))
    assert time.process_time() - began < 60


def test_deep_random_models_are_counted_by_two_of_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from isdaa.models import memory

    model = random_model(TINY | {"num_hidden_layers": 70}, 0)
    needs = sum(p.numel() for p in model.parameters()) * 4 + 70 * memory.LAYER
    config = random_config(TINY | {"num_hidden_layers": 70})
    monkeypatch.setattr(memory, "free_memory", lambda: float(needs))
    memory.check_fits(config, torch.float32)
    monkeypatch.setattr(memory, "free_memory", lambda: float(needs - 1))
    line = line_of(lambda: memory.check_fits(config, torch.float32))
    assert "need" in line and "free" in line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from isdaa.models.loading import save_model
    from isdaa.world import build_tokenizer

    tokenizer = build_tokenizer("small")
    save_model(random_model(TINY | {"vocab_size": len(tokenizer)}, 0), tokenizer, tmp_path / "model")
    (tmp_path / "model" / "isdaa_manifest.json").unlink(missing_ok=True)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 3),
        ("vocab_size", 7),
        ("hidden_size", "x"),
        ("rms_norm_eps", None),
        ("hidden_act", 5),
        ("model_type", []),
    ],
)
def test_a_model_whose_config_is_wrong(folder: Path, key: str, value: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    assert str(folder) in line_of(lambda: load_model(folder))


@pytest.mark.parametrize(
    "content", ["", "{}", '{"version": "1.0"}', DEEP, '{"version": "1.0", "model": {"type": "BPE"}}', "\x00"]
)
def test_a_tokenizer_that_cannot_be_read(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    assert str(folder) in line_of(lambda: load_tokenizer(folder))


@pytest.mark.parametrize("length", [0, 1, 2**40, 2**64 - 1])
def test_weights_whose_header_is_wrong(folder: Path, length: int) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + data[8:])
    assert str(folder) in line_of(lambda: load_model(folder))


@pytest.mark.parametrize("base", [None, 5, ["a"], ".", "../adapter", "/nowhere", ""])
def test_an_adapter_whose_base_is_wrong_or_itself(folder: Path, base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    monkeypatch.chdir(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    assert "adapter" in line_of(lambda: load_model(adapter))


def test_adapters_that_stand_on_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for name, base in (("one", "../two"), ("two", "../one")):
        (folder.parent / name).mkdir()
        text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
        (folder.parent / name / "adapter_config.json").write_text(text)
    assert "leads back" in line_of(lambda: load_model(folder.parent / "one"))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
        "{{ 1/0 }}",
        "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ 'x' * 10**13 }}",
        "{% for",
        "{{ messages[9].x.y }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_templates_that_fail_or_never_end(folder: Path, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from isdaa.data import chat

    monkeypatch.setattr(chat, "PATIENCE", 1.0)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    began = time.process_time()
    line_of(lambda: chat.ChatFormat(tokenizer, "here.jinja"))
    assert time.process_time() - began < 30


# ---------------------------------------------------------------------------------------------------------------------
# Settings, and the means by which all this is done


@pytest.mark.parametrize("name", ["clip_eps", "beta", "length_penalty", "sft_coefficient"])
@pytest.mark.parametrize("value", [1e300, 10**400, 1e31])
def test_settings_beyond_float32(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        resolve("is_dpo", **{name: value})


@pytest.mark.parametrize(
    "error", [KeyError("k"), TypeError("t"), RecursionError(), MemoryError(), OverflowError("o"), OSError(5, "io")]
)
def test_whatever_a_reader_raises_is_one_line(error: Exception) -> None:
    def read() -> None:
        with readable("file:3", "not a row", "mend it"):
            raise error

    line = line_of(read)
    assert line.startswith("file:3: not a row (") and line.endswith("; mend it")


def test_what_a_reader_does_not_swallow() -> None:
    class PanicException(BaseException):
        pass

    with pytest.raises(KeyboardInterrupt), readable("file", "x"):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="full"), readable("file", "x"):
        raise OSError(28, "full")
    with pytest.raises(UserError, match="own words"), readable("file", "x"):
        raise UserError("own words")
    with pytest.raises(RuntimeError, match="PanicException: at line"), no_panics():
        raise PanicException("at line")


def test_the_shells_pipes_are_files(tmp_path: Path) -> None:
    read, write = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(write, b'{"a": 1}'), os.close(write)))
    writer.start()
    assert read_json(f"/dev/fd/{read}") == {"a": 1}
    writer.join()
    os.close(read)


@pytest.mark.parametrize("command", ["train", "inspect", "sweep"])
def test_a_pipe_is_no_configuration(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "c.yaml")
    assert main([command, "--config", str(tmp_path / "c.yaml")]) == 2
    assert "c.yaml: a named pipe" in capsys.readouterr().err


def test_half_a_character_in_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    from isdaa.files import append_jsonl, write_json

    write_json(tmp_path / "a.json", {"a": "x\ud800"})
    append_jsonl(tmp_path / "a.jsonl", [{"a": "x\ud800"}])
    assert read_json(tmp_path / "a.json") == {"a": "x\ud800"} == readable_jsonl(tmp_path / "a.jsonl")[0]
