"""Tokenizers and chat templates that lie elsewhere than beside the model, and base models named by a relative path."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from chains import refused
from peft import LoraConfig, get_peft_model
from published_models import QWEN, language_model, prompts, save
from real_tokenizers import CHATML, build
from transformers import AutoModelForCausalLM

from isdaa.errors import UserError
from isdaa.evaluation.checkpoints.what_to_evaluate import requests
from isdaa.evaluation.vocabulary import choose
from isdaa.foreign import read_json
from isdaa.models.loading import load_model, load_tokenizer
from isdaa.models.places import base_of


def without(tokenizer: Any) -> Any:
    """The same without a chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = None
    return other


def adapter(folder: Path, base: str, named: str, tokenizer: Any = None) -> str:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
    path = save(model, folder, tokenizer)
    settings = read_json(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": named}))
    return path


def said(capsys: Any) -> str:
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with `models/base` and its tokenizer."""
    monkeypatch.chdir(tmp_path)
    save(language_model(len(QWEN)), tmp_path / "models" / "base")
    return tmp_path


def test_an_adapter_without_a_tokenizer_has_its_bases(here, capsys):
    names = [adapter(here / "out" / f"checkpoint-{n}", "models/base", "models/base") for n in (1, 2, 3)]
    reference = save(language_model(len(QWEN), seed=1), here / "reference", build("llama3"))
    shutil.rmtree(reference)
    save(language_model(len(QWEN), seed=1), here / "reference", None)
    chosen = choose(names, reference)
    assert chosen.place == "models/base" and chosen.tokenizer.get_vocab() == QWEN.get_vocab()
    assert f"{names[0]} and 2 more: no tokenizer there; that of models/base is used" in said(capsys)


@pytest.mark.parametrize("cls", ["TokenizersBackend", "Qwen2Tokenizer"])
def test_a_tokenizer_without_a_vocabulary_is_none(here, capsys, cls):
    """transformers makes an empty tokenizer of a `tokenizer_config.json` alone."""
    name = adapter(here / "adapter", "models/base", "models/base", QWEN)
    (here / "adapter" / "tokenizer.json").unlink()
    config = here / "adapter" / "tokenizer_config.json"
    config.write_text(json.dumps(read_json(config) | {"tokenizer_class": cls}))
    assert len(load_tokenizer(name)) == len(QWEN)
    (here / "adapter" / "chat_template.jinja").write_text(CHATML)
    assert choose([name], "models/base", conversations=True).tokenizer.chat_template == CHATML, "the model's own"
    assert f"chat template: that of {name}, with the tokenizer of models/base" in said(capsys)
    full = save(language_model(len(QWEN)), here / "full", None)
    shutil.copy(config, here / "full")
    with pytest.raises(UserError, match="full: no tokenizer in this folder"):
        load_tokenizer(full)


def test_a_checkpoint_has_its_runs_and_a_model_the_references(here, capsys):
    save(language_model(len(QWEN)), here / "out" / "checkpoint-100", None)
    reference = "models/base"
    assert choose(["out/checkpoint-100"], reference).place == reference
    assert "out/checkpoint-100: no tokenizer there; that of models/base (the reference) is used" in said(capsys)
    QWEN.save_pretrained(here / "out")
    assert choose(["out/checkpoint-100"], reference).place == "out"
    assert "out/checkpoint-100: no tokenizer there; that of out is used" in said(capsys)
    assert len(load_tokenizer("out/checkpoint-100")) == len(QWEN)
    with pytest.raises(UserError, match=r"nor in models/bare; name one with --tokenizer PATH"):
        choose([save(language_model(9), here / "some", None)], save(language_model(9), here / "models/bare", None)[-11:])


def test_a_template_comes_from_the_base_or_the_reference_of_the_same_vocabulary(here, capsys):
    name = adapter(here / "adapter", "models/base", "models/base", without(QWEN))
    assert choose([name], "models/base").tokenizer.chat_template is None, "plain prompts need none"
    chosen = choose([name], "models/base", conversations=True)
    assert chosen.tokenizer.chat_template == QWEN.chat_template
    line = f"{name}: its tokenizer has no chat template; that of models/base, of the same vocabulary, is used"
    assert line in said(capsys)
    other = save(language_model(len(build("gpt2"))), here / "gpt2", build("gpt2"))
    with_template = copy.deepcopy(build("gpt2"))
    with_template.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    with_template.chat_template = CHATML
    theirs = save(language_model(len(with_template)), here / "theirs", with_template)
    assert choose([other], theirs, conversations=True).tokenizer.chat_template is None, "of tokens that the model has not"


def test_the_option_wins_and_reaches_every_way_in(here, capsys):
    full = save(language_model(len(QWEN)), here / "full", None)
    reference = save(language_model(len(QWEN), seed=1), here / "bare", None)
    QWEN.save_pretrained(here / "words")
    rows = [{"prompt": row["prompt"]} for row in prompts()]
    (here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"reference": reference, "data": "prompts.jsonl", "scorer": "none"}
    assert requests([full], given | {"tokenizer": "words"}).tokenizer == "words"
    options = ["--reference", reference, "--data", "prompts.jsonl", "--scorer", "none", "--evaluation.max_new_tokens", "3"]
    command = ["evaluate", "--model_path", full, *options, "--output", "records"]
    refused(capsys, command, "no tokenizer", "name one with --tokenizer PATH")
    from isdaa.cli import main

    assert main([*command, "--tokenizer", "words"]) == 0
    assert "tokenizer: that of words, for every model" in said(capsys)
    assert read_json(here / "records" / "metrics.json")["tokenizer_path"] == "words"
    refused(
        capsys,
        ["benchmark", "mt_bench", "--model_path", full, "--tokenizer", "words"],
        "--tokenizer: has no effect",
    )


# --- base models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("out", "../base"),
        ("out", "base"),
        ("out/checkpoint-5", "../base"),
        ("run/checkpoints/checkpoint-5", "base"),
        ("out", "./base"),
    ],
)
def test_a_relative_base_is_looked_for_beside_the_adapter(here, tmp_path_factory, monkeypatch, place, named):
    home = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(home)
    name = adapter(here / place, str(here / "models/base"), named)
    beside = {"out": here / "base", "out/checkpoint-5": here / "base", "run/checkpoints/checkpoint-5": here / "run" / "base"}[
        place
    ]
    if named == "./base":
        beside = here / "out" / "base"
    shutil.copytree(here / "models/base", beside)
    assert Path(base_of(Path(name, "adapter_config.json"), name)).resolve() == beside.resolve()
    load_model(name)
    assert len(load_tokenizer(name)) == len(QWEN)


def test_the_working_directory_wins_and_it_is_said(here, caplog):
    name = adapter(here / "out", "models/base", "base")
    for place in ("base", "out/base"):
        shutil.copytree("models/base", place)
    with caplog.at_level(logging.WARNING):
        assert base_of(Path(name, "adapter_config.json"), name) == "base"
        base_of(Path(name, "adapter_config.json"), name)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"{name}/adapter_config.json: base_model_name_or_path base: that of the working directory is taken, not "
                     f"{here / 'out' / 'base'}"]  # fmt: skip


@pytest.mark.parametrize("named", ["/home/somebody/models/base", "org/name", "base", "../gone", "no such name"])
@pytest.mark.parametrize("tokenizer", [None, QWEN])
def test_a_base_that_is_not_here_is_one_line(here, capsys, named, tokenizer):
    name = adapter(here / "out" / "a", "models/base", named, tokenizer)
    (here / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    options = ["--reference", "models/base", "--data", "prompts.jsonl", "--scorer", "none", "--output", "records"]
    words = (f"{name}: its base model ", named, "mend base_model_name_or_path in ", f"{name}/adapter_config.json", '("../base")')
    refused(capsys, ["evaluate", "--model_path", name, *options], *words)
    assert not (here / "records").exists()
    for load in (load_model, load_tokenizer) if tokenizer is None else (load_model,):
        with pytest.raises(UserError, match="mend base_model_name_or_path in"):
            load(name)


def test_a_reference_that_is_not_the_adapters_base_gets_a_remark(here, capsys):
    names = [adapter(here / "out" / f"checkpoint-{n}", "models/base", "../../models/base") for n in (1, 2)]
    shutil.copytree("models/base", "copied")
    other = save(language_model(len(QWEN), seed=1), here / "other")
    (here / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    from isdaa.cli import main

    for reference in ("copied", "models/base", other):
        options = ["--reference", reference, "--data", "prompts.jsonl", "--scorer", "none", "--evaluation.max_new_tokens", "2"]
        assert main(["evaluate", "--model_path", *names, *options, "--output", f"records-{Path(reference).name}"]) == 0
        line = (
            f"{names[0]} and 1 more: trained from {here / 'models/base'} (base_model_name_or_path in adapter_config.json), "
            f"not from the reference {reference}; KL is from the reference"
        )
        assert (line in said(capsys)) == (reference == other)
