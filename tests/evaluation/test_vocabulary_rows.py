"""Models whose embeddings have not equally many rows: what not all have is left out everywhere, or is refused in one line."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chains import refused
from evaluation_helpers import moved, settings
from peft import LoraConfig, PeftModel, get_peft_model
from published_models import QWEN, language_model, prompts, save
from real_tokenizers import CHATML, build
from transformers import AutoModelForCausalLM

from isdaa.data.encoder import TokenizationSettings
from isdaa.errors import UserError
from isdaa.evaluation.evaluate import evaluate
from isdaa.evaluation.records import Blocks
from isdaa.evaluation.vocabulary import REFERENCE, Vocabulary
from isdaa.foreign import read_json
from isdaa.models.loading import load_model
from isdaa.models.vocabulary_rows import cut_vocabulary, vocabulary_rows

TOKENS = len(QWEN)
TOKENIZATION = TokenizationSettings(128, 96)
LEFT_OUT = f"ids from {TOKENS} on, which not all models have, are left out of samples, KL and logps of every model"


def resized(model: Any, rows: int, size: float = 30.0) -> Any:
    """A copy with more rows, whose logits are far above all others."""
    other = copy.deepcopy(model)
    before = other.get_input_embeddings().weight.shape[0]
    other.resize_token_embeddings(rows, mean_resizing=False)
    torch.manual_seed(9)
    with torch.no_grad():
        for end in (other.get_input_embeddings(), other.get_output_embeddings()):
            end.weight[before:] = size * torch.randn_like(end.weight[before:])
    return other


def pairs() -> list[dict[str, Any]]:
    empty = dict.fromkeys(
        ("behaviour_chosen_logps", "behaviour_rejected_logps", "weight", "prompt_ids", "chosen_ids", "rejected_ids")
    )
    return [
        {
            **row,
            **empty,
            "rejected": [{"role": "assistant", "content": "No."}],
            "chosen_finished": True,
            "rejected_finished": True,
        }
        for row in prompts()
    ]


class Length:
    name, digest = "length", "length-1"

    def score(self, rows, progress=None):
        return [float(len(row["response"])) for row in rows]


def run(folder: Path, models: list[str], reference: str, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"prompts": prompts(), "held_out": pairs(), "scorer": Length(), "tokenization": TOKENIZATION,
                               "settings": settings(prompts=4)} | changes  # fmt: skip
    return evaluate(models, reference=reference, output_dir=folder, **options)


def parts(folder: Path) -> tuple[dict[str, Any], Blocks, Blocks]:
    return read_json(folder / "plan.json"), Blocks(folder / "samples.jsonl"), Blocks(folder / "pairs.jsonl")


def plain_logps(model: Any, prompt: list[int], response: list[int], rows: int) -> torch.Tensor:
    """(T, rows) log-probabilities over the first `rows` ids, by transformers alone."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :rows]
    return torch.log_softmax(logits.double(), -1)


def check(folder: Path, policies: dict[str, Any], reference: Any, rows: int) -> None:
    """Every id, KL and logp on disk, by the models as they are."""
    plan, samples, held = parts(folder)
    asked = {record["prompt_id"]: record["prompt_ids"] for record in samples[plan["prompts"]]}
    for key in samples.headers.keys() - {plan["prompts"]}:
        assert max(token for record in samples[key] for token in record["ids"]) < rows
    for model in plan["models"]:
        policy = policies[model["path"]]
        for record in samples[model["kl"]]:
            one, other = (plain_logps(m, asked[record["prompt_id"]], record["ids"], rows) for m in (policy, reference))
            assert record["kl"] == pytest.approx(float((one.exp() * (one - other)).sum()), abs=1e-5, rel=1e-5)
            chosen = torch.tensor(record["ids"])[:, None]
            assert record["policy_logps"] == pytest.approx(float(one.gather(1, chosen).sum()), abs=1e-4)
            assert record["reference_logps"] == pytest.approx(float(other.gather(1, chosen).sum()), abs=1e-4)
        for record, prompt in zip(held[model["pairs"]], asked.values(), strict=True):
            answer = QWEN("It is.<|im_end|>")["input_ids"]
            found = plain_logps(policy, prompt, answer, rows).gather(1, torch.tensor(answer)[:, None]).sum()
            assert record["chosen_logps"] == pytest.approx(float(found), abs=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("larger", ["policy", "reference", "both"])
def test_rows_that_one_side_lacks_have_no_part_in_samples_kl_and_logps(tmp_path, capsys, tied, kind, larger):
    small = language_model(TOKENS, tied=tied, kind=kind)
    policy = moved(small, 0.05)
    models = {"policy": policy, "reference": small}
    if larger == "both":
        models = {name: resized(model, TOKENS + 25, size=0.3) for name, model in models.items()}
    more = "reference" if larger == "both" else larger
    models[more] = resized(models[more], TOKENS + 50)
    paths = {name: save(model, tmp_path / name) for name, model in models.items()}
    common = min(model.config.vocab_size for model in models.values())
    with torch.no_grad():
        assert int(models[more](torch.tensor([QWEN("Hello")["input_ids"]])).logits[0, -1].argmax()) >= common, (
            "or nothing is tried"
        )
    run(tmp_path / "out", [paths["policy"]], paths["reference"])
    assert f"ids from {common} on, which not all models have, are left out of samples, KL" in " ".join(
        capsys.readouterr().err.split()
    )
    check(tmp_path / "out", {paths["policy"]: models["policy"]}, models["reference"], common)


def test_only_what_is_cut_gets_other_keys_and_the_rest_is_bit_equal(tmp_path, capsys):
    base = language_model(TOKENS)
    reference, plain, larger = save(base, tmp_path / "base"), moved(base, 0.05), moved(base, 0.1)
    grown = resized(larger, 1152)
    paths = [save(plain, tmp_path / "plain"), save(grown, tmp_path / "grown")]
    run(tmp_path / "alone", paths[:1], reference)
    assert "rows of the embeddings" not in capsys.readouterr().err
    metrics = run(tmp_path / "both", paths, reference)
    assert [LEFT_OUT in line for line in metrics["doubts"]] == [True], "the report's page says it, too"
    assert LEFT_OUT in " ".join(capsys.readouterr().err.split())
    check(tmp_path / "both", dict(zip(paths, (plain, grown), strict=True)), base, TOKENS)
    alone, both = parts(tmp_path / "alone"), parts(tmp_path / "both")
    assert alone[0]["reference"]["opponents"] == both[0]["reference"]["opponents"]
    assert alone[0]["models"][0] == both[0]["models"][0]
    for place in (1, 2):
        assert all(both[place][key] == records for key, records in alone[place].records.items())
    # The same weights in a company where nothing is cut: other keys.
    run(tmp_path / "same", paths[1:], save(resized(base, 1152), tmp_path / "grown_base"))
    ours, theirs = parts(tmp_path / "same")[0]["models"][0], both[0]["models"][1]
    assert ours["digest"] == theirs["digest"]
    assert all(ours[name] != theirs[name] for name in ("samples", "kl", "pairs"))
    assert not any("rows" in header for header in parts(tmp_path / "same")[1].headers.values())
    assert parts(tmp_path / "both")[1].headers[theirs["kl"]]["rows"] == TOKENS


@pytest.mark.parametrize("kind", ["modules_to_save", "save_embedding_layers", "tied"])
def test_an_adapter_with_rows_of_its_own(tmp_path, kind):
    base = language_model(TOKENS, tied=kind == "tied")
    reference = save(base, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(reference)
    model.resize_token_embeddings(TOKENS + 9, mean_resizing=False)
    ends = ["embed_tokens", "lm_head"] if kind == "modules_to_save" else None
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=ends))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    adapter = save(adapted, tmp_path / "adapter")
    assert (vocabulary_rows(reference), vocabulary_rows(adapter)) == (TOKENS, TOKENS + 9)
    run(tmp_path / "out", [adapter], reference)
    again = AutoModelForCausalLM.from_pretrained(reference)
    again.resize_token_embeddings(TOKENS + 9, mean_resizing=False)
    check(tmp_path / "out", {adapter: PeftModel.from_pretrained(again, adapter).eval()}, base, TOKENS)


def test_an_adapter_without_rows_of_its_own_has_its_bases(tmp_path):
    reference = save(language_model(TOKENS + 3), tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(reference), LoraConfig(task_type="CAUSAL_LM", r=2))
    assert vocabulary_rows(save(model, tmp_path / "adapter")) == TOKENS + 3


def test_an_adapter_without_its_weights_is_said_to_lack_them(tmp_path):
    reference = save(language_model(TOKENS), tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(reference), LoraConfig(task_type="CAUSAL_LM", r=2))
    adapter = save(model, tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    for use in (vocabulary_rows, load_model, lambda path: run(tmp_path / "out", [path], reference)):
        with pytest.raises(UserError) as caught:
            use(adapter)
        assert str(caught.value) == (
            f"{adapter}: an adapter (adapter_config.json) whose weights are missing: there is neither adapter_model.safetensors "
            "nor adapter_model.bin; copy it there from where the adapter was saved"
        )
    assert not (tmp_path / "out").exists()


def test_rows_name_the_reference_among_others():
    rows = {"a": 9, "b": 9, "c": 9, "d": 7, "base": 9}
    names = {path: path for path in rows} | {"base": REFERENCE}
    (line,) = Vocabulary(rows).told(names)
    assert line.startswith("rows of the embeddings: a, 2 more and the reference 9, d 7; ids from 7 on")
    (line,) = Vocabulary({"a": 9, "d": 7, "base": 9}).told(names)
    assert line.startswith("rows of the embeddings: a and the reference 9, d 7;")
    (line,) = Vocabulary({"a": 9, "b": 9, "base": 7}).told(names)
    assert line.startswith("rows of the embeddings: a and 1 more 9, the reference 7;")


def chatml_on(family: str, *, tokens: dict[str, Any]) -> Any:
    tokenizer = copy.deepcopy(build(family))
    tokenizer.add_special_tokens(tokens)
    tokenizer.chat_template = CHATML
    return tokenizer


CHAT_TOKENS = {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}


@pytest.fixture
def gpt2(tmp_path) -> dict[str, str]:
    """A base without chat, a policy that has tokens for it, one that has a padding token alone, and prompts."""
    base, plain = build("gpt2"), language_model(len(build("gpt2")), kind="llama")
    chat, padded = chatml_on("gpt2", tokens=CHAT_TOKENS), copy.deepcopy(base)
    padded.add_special_tokens({"pad_token": "[PAD]"})
    rows = [{"prompt": row["prompt"]} for row in prompts(chat=False)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "base": save(plain, tmp_path / "base", base),
        "chat": save(resized(plain, len(chat)), tmp_path / "chat", chat),
        "padded": save(resized(moved(plain, 0.05), len(padded)), tmp_path / "padded", padded),
        "prompts": str(tmp_path / "prompts.jsonl"),
    }


@pytest.mark.parametrize("models", [["chat"], ["padded", "chat"]])
@pytest.mark.parametrize("chat", [True, False])
def test_tokens_that_the_reference_lacks_are_refused_before_any_work(gpt2, tmp_path, monkeypatch, models, chat):
    monkeypatch.setattr("isdaa.models.loading.load_model", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    message = (
        r"chat: its tokenizer has '<\|im_\w+\|>' \(id \d+\), and .*base has \d+ rows of embeddings; name as --reference the "
        r"model as training began, with these rows: model\.resize_token_embeddings\(\d+\), saved with this tokenizer"
    )
    if models == ["padded", "chat"] and chat:
        return  # the first model's tokenizer has no template for them
    with pytest.raises(UserError, match=message):
        run(tmp_path / "out", [gpt2[name] for name in models], gpt2["base"], prompts=prompts(chat), held_out=None)
    assert not (tmp_path / "out").exists()


def test_the_command_line_says_it_in_one_line(gpt2, tmp_path, capsys):
    command = ["--reference", gpt2["base"], "--data", gpt2["prompts"], "--scorer", "none", "--output", str(tmp_path / "out")]
    refused(capsys, ["evaluate", "--model_path", gpt2["chat"], *command], "<|im_", "resize_token_embeddings")
    refused(capsys, ["report", "--checkpoints", gpt2["padded"], gpt2["chat"], *command], "<|im_", "resize_token_embeddings")
    assert not (tmp_path / "out").exists()


def test_a_padding_token_that_the_reference_lacks_is_no_matter(gpt2, tmp_path):
    run(tmp_path / "out", [gpt2["padded"]], gpt2["base"], prompts=prompts(chat=False), held_out=None)
    _, samples, _ = parts(tmp_path / "out")
    assert max(token for records in samples.records.values() for r in records for token in r.get("ids", [0])) < len(build("gpt2"))


def test_a_reference_with_tokens_that_a_policy_lacks_is_refused(gpt2, tmp_path):
    with pytest.raises(UserError, match=r"chat: its tokenizer has .* was trained from, or evaluate .*base apart"):
        run(tmp_path / "out", [gpt2["base"]], gpt2["chat"], prompts=prompts(chat=False), held_out=None)


def test_ids_that_no_model_has_are_refused_where_all_have_equally_many_rows(gpt2, tmp_path):
    other = save(language_model(len(build("gpt2")), kind="llama"), tmp_path / "unresized", chatml_on("gpt2", tokens=CHAT_TOKENS))
    with pytest.raises(UserError, match=r"responses end with '<\|im_end\|>'.*own tokenizer with --tokenizer PATH"):
        run(tmp_path / "out", [other], gpt2["base"], held_out=None)
    apart = chatml_on("gpt2", tokens=CHAT_TOKENS | {"eos_token": build("gpt2").eos_token})
    other = save(language_model(len(build("gpt2")), kind="llama"), tmp_path / "apart", apart)
    with pytest.raises(
        UserError, match=r"p0: the tokens of its prompt or responses have '<\|im_\w+\|>' \(id \d+\), and .* has \d+ rows"
    ):
        run(tmp_path / "out", [other], gpt2["base"], held_out=None)


def test_truly_other_vocabularies_are_refused_with_what_to_do(gpt2, tmp_path):
    qwen = save(language_model(TOKENS), tmp_path / "qwen")
    with pytest.raises(UserError, match="share one vocabulary; name the model that training began with as the reference"):
        run(tmp_path / "out", [qwen], gpt2["base"], held_out=None)


def test_an_id_that_is_another_word_elsewhere_is_refused(tmp_path):
    model = language_model(TOKENS)
    folders = [save(model, tmp_path / name) for name in ("one", "other")]
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    word = next(w for w, index in content["model"]["vocab"].items() if len(w) == 1 and w.isascii() and index > 5)
    content["model"]["vocab"]["Ġxyzzy"] = content["model"]["vocab"].pop(word)
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"id \d+ of its tokenizer is .*, in that of .*share one vocabulary"):
        run(tmp_path / "out", folders[:1], folders[1], held_out=None)


def test_a_head_that_cannot_be_cut_is_one_line(monkeypatch):
    model = language_model(20)
    monkeypatch.setattr(model, "resize_token_embeddings", lambda *args, **kwargs: None)
    with pytest.raises(UserError, match=r"m: its vocabulary cannot be cut to the 15 rows.*its embeddings or its head keep more"):
        cut_vocabulary(model, 15, "m")
