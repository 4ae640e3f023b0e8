"""Folders in, folders out, adapters, digests, and one clear line for everything that cannot be loaded."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline
from transformers.utils import logging as hf_logging
from words_model import CONFIG, WORDS, words

from isdaa.errors import UserError
from isdaa.manifest import MANIFEST
from isdaa.models.loading import (
    add_lora,
    load_model,
    load_sequence_classifier,
    load_tokenizer,
    random_model,
    save_model,
    weights_digest,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    save_model(random_model(CONFIG, 0), words(), folder, {"README.md": "# A card\n", "notes/record.json": "{}"})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model, to be damaged; as any program's, it has no manifest."""
    return Path(shutil.copytree(saved, tmp_path / "model", ignore=shutil.ignore_patterns(MANIFEST)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 9, 7, 30]])).logits


def same_weights(a: Any, b: Any) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def train_adapter(model: PeftModel, seed: int = 0) -> PeftModel:
    """Give a new adapter, which does nothing, an effect."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


# --- random models ---------------------------------------------------------------------------------------------------


def test_random_models_are_made_by_their_seed_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = random_model(CONFIG, 1)
    assert torch.equal(torch.get_rng_state(), before) and not first.training
    torch.manual_seed(6)
    assert same_weights(first, random_model(CONFIG, 1))
    assert not same_weights(first, random_model(CONFIG, 2))
    assert random_model(CONFIG, 1, dtype="bfloat16").dtype == torch.bfloat16
    assert CONFIG["model_type"] == "llama", "the caller's dictionary is not changed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, 'model_type "lama": transformers knows none \\(did you mean "llama"'),
        ({"model_type": None}, "names no model_type"),
        ({"hiden_size": 8}, 'unknown key "hiden_size" \\(did you mean "hidden_size"\\?\\)'),
        ({"hidden_size": "big"}, "no model can be made of this config .*hidden_size"),
        ({"hidden_size": 17}, "no model can be made of this config .*17"),
    ],
)
def test_bad_random_configs(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        random_model(CONFIG | change, 0)


def test_a_random_model_is_a_language_model() -> None:
    with pytest.raises(UserError, match=r"model_type t5: no model can be made of this config .*Unrecognized"):
        random_model({"model_type": "t5", "vocab_size": 20}, 0)


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_equal(saved: Path) -> None:
    model = random_model(CONFIG, 0)
    loaded = load_model(saved)
    assert same_weights(model, loaded) and not loaded.training
    assert torch.equal(logits(model), logits(loaded))
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(saved))
    assert weights_digest(model) == weights_digest(loaded)
    tokenizer = load_tokenizer(saved)
    assert tokenizer("w0 w5 <eos>").input_ids == words()("w0 w5 <eos>").input_ids
    assert (saved / "README.md").read_text() == "# A card\n" and (saved / "notes/record.json").exists()
    assert {p.name for p in saved.iterdir()} >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert [p.name for p in saved.parent.iterdir()] == ["base"], "nothing is left beside it"


def test_pipelines_load_it(saved: Path) -> None:
    writer = pipeline("text-generation", model=str(saved))
    text = writer("w1 w2", max_new_tokens=3, return_full_text=False)[0]["generated_text"]
    assert isinstance(text, str)
    config = json.loads((saved / "generation_config.json").read_text())
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (2, 0, 1)


def test_every_stop_token_is_in_the_generation_config(tmp_path: Path) -> None:
    model = random_model(CONFIG, 0)
    model.generation_config.eos_token_id = [9, 2]
    save_model(model, words(), tmp_path / "m", stop_ids={7})
    assert json.loads((tmp_path / "m/generation_config.json").read_text())["eos_token_id"] == [2, 7, 9]
    assert model.generation_config.eos_token_id == [9, 2]


def test_tied_and_bfloat16_models_round_trip(tmp_path: Path) -> None:
    model = random_model(CONFIG | {"tie_word_embeddings": True}, 0, dtype="bfloat16")
    save_model(model, words(), tmp_path / "m")
    automatic = load_model(tmp_path / "m", dtype="auto")
    assert automatic.dtype == torch.bfloat16 and same_weights(model, automatic)
    assert automatic.lm_head.weight is automatic.model.embed_tokens.weight
    assert load_model(tmp_path / "m").dtype == torch.float32
    assert load_model(tmp_path / "m", attn_implementation="eager").config._attn_implementation == "eager"


def test_a_failing_save_leaves_the_old_folder(folder: Path) -> None:
    class Broken:
        eos_token_id, pad_token_id, bos_token_id = 2, 0, 1

        def save_pretrained(self, path: Path) -> None:
            raise RuntimeError("disk full")

    before = load_model(folder)
    with pytest.raises(RuntimeError, match="disk full"):
        save_model(random_model(CONFIG, 9), Broken(), folder)  # type: ignore[arg-type]
    assert same_weights(load_model(folder), before)
    save_model(random_model(CONFIG, 9), words(), folder)
    assert same_weights(load_model(folder), random_model(CONFIG, 9))
    assert not (folder / "README.md").exists(), "a replaced folder keeps nothing of the old one"


@pytest.mark.parametrize("name", ["../card.md", "/tmp/card.md"])
def test_extra_files_stay_inside(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside its folder"):
        save_model(random_model(CONFIG, 0), words(), tmp_path / "m", {name: ""})
    assert not (tmp_path / "m").exists()


def test_loading_is_silent_and_restores_the_callers_verbosity(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    hf_logging.set_verbosity_warning()
    hf_logging.enable_progress_bar()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    hf_logging.add_handler(handler)
    load_model(saved)
    load_tokenizer(saved)
    load_sequence_classifier(saved, new_head=True)
    hf_logging.remove_handler(handler)
    captured = capfd.readouterr()
    assert captured.out + captured.err + "".join(said) == ""
    assert hf_logging.get_verbosity() == hf_logging.WARNING and hf_logging.is_progress_bar_enabled()


# --- adapters --------------------------------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_trains_alone() -> None:
    base = random_model(CONFIG, 0)
    before = logits(base)
    digest = weights_digest(base)
    model = add_lora(base, rank=4, alpha=8, target_modules=["q_proj", "v_proj"])
    assert torch.equal(logits(model.eval()), before)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)
    assert {name.split(".")[-4] for name in trainable} == {"q_proj", "v_proj"}
    train_adapter(model)
    assert not torch.allclose(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert weights_digest(random_model(CONFIG, 0)) == digest


def test_adapters_are_seeded() -> None:
    state = torch.get_rng_state()
    a, b, c = (add_lora(random_model(CONFIG, 0), rank=2, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same_weights(a, b) and not same_weights(a, c)


def test_an_adapter_folder_loads_with_its_base(saved: Path, tmp_path: Path) -> None:
    model = train_adapter(add_lora(load_model(saved), rank=2))
    expected = logits(model.eval())
    save_model(model, words(), tmp_path / "adapter", merge=False)
    assert (tmp_path / "adapter/adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter/config.json").exists()
    loaded = load_model(tmp_path / "adapter")
    assert not isinstance(loaded, PeftModel) and not loaded.training
    assert torch.allclose(logits(loaded), expected, atol=1e-5)
    kept = load_model(tmp_path / "adapter", merge_adapter=False)
    assert isinstance(kept, PeftModel) and torch.equal(logits(kept), expected)
    assert load_tokenizer(tmp_path / "adapter").eos_token == "<eos>"
    for file in (*tmp_path.glob("adapter/token*"), tmp_path / "adapter" / MANIFEST):
        file.unlink()
    assert load_tokenizer(tmp_path / "adapter").eos_token == "<eos>", "the base model's tokenizer"
    shutil.copy(saved / "config.json", tmp_path / "adapter")
    assert same_weights(load_model(tmp_path / "adapter"), loaded), "a config.json beside an adapter makes no model"


def test_the_reference_of_a_new_adapter_includes_the_old_one(saved: Path) -> None:
    supervised = train_adapter(add_lora(load_model(saved), rank=2))
    expected = logits(supervised.eval())
    policy = train_adapter(add_lora(supervised, rank=2), seed=1)
    with policy.disable_adapter():
        assert torch.allclose(logits(policy), expected, atol=1e-5)
    assert not torch.allclose(logits(policy), expected, atol=1e-2)


@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_save_needs_no_peft_and_leaves_the_model_alone(tied: bool, tmp_path: Path) -> None:
    model = train_adapter(add_lora(random_model(CONFIG | {"tie_word_embeddings": tied}, 0), rank=2)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    save_model(model, words(), tmp_path / "merged")
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert model.training and any(p.requires_grad for p in model.parameters())
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert torch.allclose(logits(load_model(tmp_path / "merged")), logits(model.eval()), atol=1e-5)


def test_gpt2s_layers_are_linear_too() -> None:
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    model = add_lora(random_model(config, 0), rank=2, target_modules=["c_attn"])
    assert any("c_attn.lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["q_prj"]}, 'target module "q_prj" is no linear layer .*did you mean "q_proj".*it has'),
        ({"target_modules": "norm"}, 'target module "norm" is no linear layer'),
        ({"rank": 0}, "rank 0"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"alpha": 0}, "alpha 0"),
    ],
)
def test_bad_adapter_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_lora(random_model(CONFIG, 0), **settings)


def test_broken_adapters(saved: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    save_model(add_lora(load_model(saved), rank=2), words(), adapter, merge=False)
    (adapter / MANIFEST).unlink()
    settings = json.loads((adapter / "adapter_config.json").read_text())

    def with_base(base: str | None) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))

    with_base(str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"its base model .*gone does not exist; mend base_model_name_or_path"):
        load_model(adapter)
    with_base(None)
    with pytest.raises(UserError, match="names no base model"):
        load_model(adapter)
    save_model(random_model(CONFIG | {"hidden_size": 32}, 0), words(), tmp_path / "other")
    with_base("../other")
    with pytest.raises(UserError, match="does not fit its base model or is damaged"):
        load_model(adapter)
    with_base(str(saved))
    load_model(adapter)
    with pytest.raises(UserError, match="no trained reward head; it is a language model's adapter"):
        load_sequence_classifier(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="does not fit its base model or is damaged"):
        load_model(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json: not valid JSON"):
        load_model(adapter)


# --- reward models ---------------------------------------------------------------------------------------------------


def score(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[1, 5, 6, 0], [1, 5, 6, 9]]), attention_mask=None).logits


def test_reward_models(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no trained reward head \(score.weight\)"):
        load_sequence_classifier(saved)
    new = load_sequence_classifier(saved, new_head=True, pad_id=0, seed=1)
    assert new.config.num_labels == 1 and new.config.pad_token_id == 0 and score(new).shape == (2, 1)
    assert same_weights(new, load_sequence_classifier(saved, new_head=True, seed=1))
    assert not same_weights(new, load_sequence_classifier(saved, new_head=True, seed=2))
    assert torch.equal(new.model.embed_tokens.weight, load_model(saved).model.embed_tokens.weight)
    save_model(new, words(), tmp_path / "rm")
    assert torch.equal(score(load_sequence_classifier(tmp_path / "rm")), score(new))
    with pytest.raises(UserError, match="not in the folder"):
        load_model(tmp_path / "rm")  # it has no output head over the vocabulary
    new.config.num_labels = 3
    new.score = torch.nn.Linear(16, 3, bias=False)
    save_model(new, words(), tmp_path / "three")
    with pytest.raises(UserError, match="3 labels; a reward model has one output"):
        load_sequence_classifier(tmp_path / "three")


def test_reward_adapters_bring_their_head(saved: Path, tmp_path: Path) -> None:
    model = add_lora(load_sequence_classifier(saved, new_head=True, pad_id=0), rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert any("score" in name and p.requires_grad for name, p in model.named_parameters())
    save_model(model, words(), tmp_path / "adapter", merge=False)
    loaded = load_sequence_classifier(tmp_path / "adapter", pad_id=0)
    assert torch.allclose(score(loaded), score(model.eval()), atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: add_lora(model, rank=2), copy.deepcopy])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_reward_model_reads_the_last_token_of_the_mask(tmp_path: Path, wrap: Any, family: str) -> None:
    shape = CONFIG if family == "llama" else {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    save_model(random_model({"model_type": family, **shape}, seed=0), words(), tmp_path / "lm")
    model = wrap(load_sequence_classifier(tmp_path / "lm", new_head=True, pad_id=2))  # 2 is EOS
    rows = [[1, 5, 6, 2], [1, 5, 6], [2, 2], [1, 7, 2, 8, 9]]
    ids, mask = torch.full((4, 5), 2), torch.zeros(4, 5, dtype=torch.int64)
    for line, row in enumerate(rows):
        ids[line, : len(row)], mask[line, : len(row)] = torch.tensor(row), 1
    scores = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    model.config.get_text_config().pad_token_id = None  # then transformers takes the last token, of one row at a time
    alone = torch.cat([model(input_ids=torch.tensor([row])).logits for row in rows])
    assert scores.shape == (4, 1) and torch.allclose(scores, alone, atol=1e-5)
    assert not torch.allclose(scores[0], scores[1], atol=1e-4)
    scores.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "score" in name)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_padding_falls_back_to_eos_without_new_tokens(tmp_path: Path) -> None:
    words(pad_token=None).save_pretrained(tmp_path / "nopad")
    tokenizer = load_tokenizer(tmp_path / "nopad")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2 and len(tokenizer) == len(WORDS)
    words(eos_token=None, pad_token=None).save_pretrained(tmp_path / "noeos")
    with pytest.raises(UserError, match=r"noeos: the tokenizer has no EOS token.*tokenizer_config.json"):
        load_tokenizer(tmp_path / "noeos")
    assert load_tokenizer(tmp_path / "noeos", require_eos=False).pad_token is None


def test_tokenizer_errors(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="the tokenizer in this folder cannot be loaded"):
        load_tokenizer(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(folder / "nowhere")


# --- what cannot be loaded -------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json in this folder"),
        (lambda f: (f / "config.json").write_text("{"), "the model in this folder cannot be loaded"),
        (lambda f: (f / "model.safetensors").unlink(), "config.json, but no weights"),
        (lambda f: (f / "model.safetensors").write_bytes(b"1234"), "the model in this folder cannot be loaded"),
        (
            lambda f: edit(f, num_hidden_layers=3),
            "9 weights of LlamaForCausalLM are not in the folder \\(model.layers.2",
        ),
        (lambda f: edit(f, intermediate_size=48), "6 weights do not have the shape .*mlp.down_proj.weight: 16 × 32, not 16 × 48"),
        (lambda f: edit(f, model_type="zork"), "the model in this folder cannot be loaded .*zork"),
        (lambda f: edit(f, model_type="t5"), "not a decoder language model"),
        (
            lambda f: edit(f, auto_map={"AutoConfig": "x.Y"}, model_type="zork"),
            "set trust_remote_code only if",
        ),
    ],
)
def test_broken_folders(damage: Any, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_missing_paths(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "nowhere", "./nowhere", "runs/a/nowhere", "nowhere/", "~/nowhere-at-all"):
        with pytest.raises(UserError, match=r"no such folder$"):
            load_model(str(path))
    with pytest.raises(UserError, match="a file; a model is a folder"):
        load_model(folder / "config.json")
    shutil.copytree(folder, tmp_path / "run/checkpoint-20")
    with pytest.raises(UserError, match=r"no config.json .*did you mean .*run/checkpoint-20\?"):
        load_model(tmp_path / "run")
    for name in ("no-such-model", "nobody/no-such-model"):
        with pytest.raises(UserError, match="no such folder here, and no model of that name could be had from the Hub"):
            load_model(name)
        with pytest.raises(UserError, match=r"no such folder here, and no tokenizer of that name .* cannot be reached"):
            load_tokenizer(name)


def test_wrong_dtype(saved: Path) -> None:
    with pytest.raises(UserError, match=r'dtype "bfloat61": one of .*did you mean "bfloat16"'):
        load_model(saved, dtype="bfloat61")


def test_foreign_weights_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(folder, num_hidden_layers=1)
    load_model(folder)
    assert "9 weights in the file are not used by LlamaForCausalLM" in caplog.text


# --- digests ---------------------------------------------------------------------------------------------------------


def test_the_digest_is_the_same_in_every_process() -> None:
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        model.bias.zero_()
    assert weights_digest(model) == "9e36eb2c6073b0acdefc41d864b8dbef8e7cb10864bfa825c566e07b98e18d93"


def test_the_digest_sees_every_bit_name_shape_and_dtype() -> None:
    model = random_model(CONFIG, 0)
    digests = {weights_digest(model)}
    weight = model.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        kept = weight.clone()
        weight.view(torch.int32)[3, 7] ^= 1
        digests.add(weights_digest(model))
        weight.copy_(kept)
    assert weights_digest(model) in digests and len(digests) == 2
    digests.add(weights_digest(random_model(CONFIG, 0, dtype="bfloat16")))
    digests.add(weights_digest(random_model(CONFIG | {"tie_word_embeddings": True}, 0)))

    def module(**parameters: torch.Tensor) -> torch.nn.Module:
        return torch.nn.ParameterDict(parameters)

    zeros = torch.zeros(2, 3)
    digests |= {weights_digest(module(a=zeros)), weights_digest(module(b=zeros)), weights_digest(module(a=zeros.T))}
    digests |= {weights_digest(module(a=zeros, b=zeros.clone())), weights_digest(module(a=zeros.double()))}
    assert len(digests) == 9
    # Memory layout is no content.
    values = torch.arange(6.0).view(2, 3)
    assert weights_digest(module(a=values)) == weights_digest(module(a=values.T.contiguous().T))
