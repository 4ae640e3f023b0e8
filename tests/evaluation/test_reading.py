"""Where reward models are read: others' as plain transformers reads them, isdaa's own as their record says."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from real_tokenizers import FAMILIES, build
from tokenizers_for_tests import byte_level
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from isdaa.data.chat import pad_apart
from isdaa.errors import UserError
from isdaa.evaluation.reward_reading import Reading
from isdaa.evaluation.scorers import RewardModelScorer, about, doubts_of, facts, load_scorer
from isdaa.models.loading import load_sequence_classifier
from isdaa.models.lora import add_lora
from isdaa.record import ModelRecord, record_text

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL | {"num_key_value_heads": 2},
    "gemma2": SMALL | {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": SMALL | {"num_key_value_heads": 2},
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3},
}
ENCODER = {"roberta": SMALL | {"max_position_embeddings": 400}}
CHATS = [
    ([{"role": "user", "content": "What is 3+4?"}], "It is 7."),
    ([{"role": "user", "content": "Name the capital of France, please; and nothing else."}], "\n\nParis – I'd guess"),
    ([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}], "Ok"),
]
TEXTS = [("Question: 3+4?\nAnswer:", " It is 7."), ("TL;DR:", " a longer answer, which ends.")]
CONVERSATIONAL = [name for name in FAMILIES if name not in ("gpt2", "t5")]


def saved(folder: Path, tokenizer: Any, kind: str = "llama", **ids: Any) -> str:
    """A random reward model whose configuration names the tokenizer's padding token, as TRL's trainer writes it."""
    torch.manual_seed(3)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = {"pad_token_id": pad, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id} | ids
    settings = AutoConfig.for_model(kind, vocab_size=len(tokenizer), num_labels=1, **(SHAPES | ENCODER)[kind], **ids)
    AutoModelForSequenceClassification.from_config(settings).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def own(folder: Path, position: str | None, held_out: dict[str, Any] | None = None) -> None:
    record = ModelRecord(kind="reward", config={}, position=position, held_out=held_out)
    (folder / "isdaa.json").write_text(record_text(record, folder), encoding="utf-8")


def rows(examples: Any = CHATS, finished: bool = True) -> list[dict[str, Any]]:
    return [{"id": str(i), "prompt": p, "response": r, "finished": finished} for i, (p, r) in enumerate(examples)]


def plain(folder: str, examples: Any = CHATS, together: bool = True, **options: Any) -> list[float]:
    """What transformers makes of the chat template's output, or of texts through EOS, without isdaa."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    if isinstance(examples[0][0], list):
        chats = [[*prompt, {"role": "assistant", "content": response}] for prompt, response in examples]
        batches = [chats] if together else [[chat] for chat in chats]
        options |= {"padding": True, "return_tensors": "pt", "return_dict": True}
        encoded = [tokenizer.apply_chat_template(batch, tokenize=True, **options) for batch in batches]
    else:
        end = "" if options.get("unfinished") else tokenizer.eos_token
        texts = [prompt + response + end for prompt, response in examples]
        encoded = [tokenizer(t, padding=True, return_tensors="pt") for t in ([texts] if together else [[t] for t in texts])]
    with torch.no_grad():
        return [
            score
            for batch in encoded
            for score in model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].tolist()
        ]


def close(scores: list[float]) -> Any:
    return pytest.approx(scores, abs=2e-5)


@pytest.mark.parametrize("family", CONVERSATIONAL)
def test_anothers_model_is_read_where_plain_transformers_reads_it(family: str, tmp_path: Path) -> None:
    folder = saved(tmp_path, build(family))
    scores = RewardModelScorer(folder, batch_size=4).score(rows())
    assert scores == close(plain(folder))
    assert scores == close(plain(folder, together=False))
    assert len(set(scores)) == 3


@pytest.mark.parametrize("family", [name for name in CONVERSATIONAL if name != "smollm2"])  # its vocabulary takes seconds
def test_isdaas_own_model_is_so_too_and_sees_whether_a_response_ended(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pad = pad_apart(tokenizer, len(tokenizer))
    assert pad is not None
    tokenizer.pad_token = pad
    folder = saved(tmp_path, tokenizer)
    own(tmp_path, "template_end")
    scorer = RewardModelScorer(folder, batch_size=4)
    scores = scorer.score(rows())
    assert scores == close(plain(folder))
    assert scores == close(plain(folder, together=False))
    cut = scorer.score(rows(CHATS[:1], finished=False))
    assert cut == close(plain(folder, CHATS[:1], continue_final_message=True)) and abs(cut[0] - scores[0]) > 1e-3
    texts = scorer.score(rows(TEXTS))
    assert texts == close(plain(folder, TEXTS))
    assert texts == close(plain(folder, TEXTS, together=False))


def test_the_paddings_token_ends_no_row() -> None:
    found = {family: pad_apart(build(family), len(build(family))) for family in FAMILIES}
    assert found["qwen2"] == "<|endoftext|>" and found["gemma"] == "<pad>"  # their own
    assert found["llama2"] == "<unk>" and found["deepseek"] == "<｜▁pad▁｜>" and found["phi3"] == "<|placeholder1|>"
    assert found["smollm2"] == "<|endoftext|>"  # its own is its EOS
    assert found["gpt2"] is None  # it has one special token, which ends its texts


@pytest.mark.parametrize("kind", [kind for kind in SHAPES if kind != "llama"])
def test_every_class_reads_by_its_own_rule(kind: str, tmp_path: Path) -> None:
    for family in ("qwen2", "llama3")[: 1 if kind == "qwen2" else 2]:  # its tokenizer class makes its own of any other
        folder = saved(tmp_path / family, build(family), kind)
        assert RewardModelScorer(folder, batch_size=4).score(rows()) == close(plain(folder)), family


def test_an_encoder_is_not_said_to_be_read_at_a_token(tmp_path: Path) -> None:
    """Its score comes from its first token, or from all: where a row ends decides nothing but what it sees."""
    folder = saved(tmp_path, byte_level("chatml"), "roberta")
    scorer = RewardModelScorer(folder, batch_size=4)
    assert scorer.score(rows()) == close(plain(folder))
    assert about(scorer)[0].startswith("an encoder, which reads the whole text")


def test_texts_end_with_eos_which_is_passed_over_where_it_pads(tmp_path: Path) -> None:
    for name, tokenizer, sees_end in (("apart", byte_level(), True), ("eos", build("gpt2"), False)):
        folder = saved(tmp_path / name, tokenizer)
        scorer = RewardModelScorer(folder, batch_size=4)
        finished, cut = scorer.score(rows(TEXTS)), scorer.score(rows(TEXTS, finished=False))
        assert finished == close(plain(folder, TEXTS))
        assert finished == close(plain(folder, TEXTS, together=False))
        assert (finished != close(cut)) == sees_end
        assert ("is skipped" in about(scorer)[0]) != sees_end


@pytest.mark.parametrize("pad", [None, -1])
def test_without_a_padding_token_the_last_one_is_read(pad: int | None, tmp_path: Path) -> None:
    folder = saved(tmp_path, build("llama3"), pad_token_id=None)
    scores = RewardModelScorer(folder, batch_size=4).score(rows())
    assert scores == close(plain(folder, together=False))
    if pad is not None:  # no token has it: transformers, too, passes over none, of one row at a time
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"pad_token_id": null', f'"pad_token_id": {pad}'))
        assert f'"pad_token_id": {pad}' in config.read_text()
        assert RewardModelScorer(folder, batch_size=4).score(rows()) == close(scores)


def test_an_adapters_padding_token_is_its_tokenizers(tmp_path: Path) -> None:
    """TRL sets it in the base model's configuration while it trains, and saves the adapter alone."""
    base = saved(tmp_path / "base", build("llama3"), pad_token_id=None)
    model = add_lora(load_sequence_classifier(base, pad_id=0), rank=2)
    model.save_pretrained(tmp_path / "adapter")
    build("llama3").save_pretrained(tmp_path / "adapter")
    scorer = RewardModelScorer(tmp_path / "adapter", batch_size=4)
    merged = load_sequence_classifier(tmp_path / "adapter", by_mask=False, pad_id=build("llama3").eos_token_id)
    (tmp_path / "merged").mkdir()
    merged.save_pretrained(tmp_path / "merged")
    build("llama3").save_pretrained(tmp_path / "merged")
    assert scorer.score(rows()) == close(plain(str(tmp_path / "merged")))


def test_an_older_model_of_isdaas_keeps_its_meaning(tmp_path: Path) -> None:
    folder = saved(tmp_path, build("chatml_on_llama"))
    theirs, asked = RewardModelScorer(folder), RewardModelScorer(folder, position="response_end")
    foreign = theirs.score(rows())
    own(tmp_path, None)
    ours = RewardModelScorer(folder)
    scores = ours.score(rows())
    assert scores == asked.score(rows()) and all(abs(a - b) > 1e-3 for a, b in zip(scores, foreign, strict=True))
    tokenizer = build("chatml_on_llama")
    assert all(ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>") for ids in ours.token_ids(rows()))
    # Its cached scores stay good; those of a model that is read elsewhere now are made anew.
    assert ours.digest == asked.digest != theirs.digest
    assert RewardModelScorer(folder, position="template_end").score(rows()) == close(foreign)
    assert "record" in about(ours)[0] and "record" not in about(asked)[0]


def test_a_record_of_another_kind_makes_no_model_isdaas(tmp_path: Path) -> None:
    """A head that others put on a model of an `sft` stage."""
    folder = saved(tmp_path, build("chatml_on_llama"))
    record = ModelRecord(kind="sft", config={"tokenization": {"max_length": 9}})
    (tmp_path / "isdaa.json").write_text(record_text(record, tmp_path), encoding="utf-8")
    assert RewardModelScorer(folder).score(rows()) == close(plain(folder))


def test_a_model_of_the_hub_is_asked_for_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, None)
    found = {"isdaa.json": tmp_path / "isdaa.json"}
    monkeypatch.setattr("isdaa.models.places.hub_file", lambda name, file, revision=None: found.get(file))
    assert not Reading("someone/reward").template_end
    found.clear()
    assert Reading("someone/reward").template_end


def test_cut_responses_are_closed_for_anothers_model_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path, build("qwen2"))
    scorer = RewardModelScorer(folder)
    with caplog.at_level(logging.WARNING):
        cut = scorer.score(rows(finished=False))
        assert cut == scorer.score(rows())  # the template says the same of both
    assert caplog.text.count("3 of 3 responses did not end") == 1
    caplog.clear()
    own(tmp_path, "template_end")
    assert RewardModelScorer(folder).score(rows(finished=False)) != close(cut)
    assert "did not end" not in caplog.text


def test_what_does_not_fit_is_cut_before_the_templates_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build("qwen2")
    folder = saved(tmp_path, tokenizer, max_position_embeddings=60)
    scorer = RewardModelScorer(folder, max_prompt_length=20)
    with caplog.at_level(logging.WARNING):
        (ids,) = scorer.token_ids(rows([([{"role": "user", "content": "Why? " * 30}], "Because it is. " * 40)]))
    assert len(ids) == 60 and tokenizer.decode(ids[-2:]) == "<|im_end|>\n"
    assert "1 of 1 responses do not fit its 60 positions" in caplog.text
    assert "1 of 1 prompts do not fit its 60 positions beside their responses" in caplog.text
    assert "1 of 1 prompts have more than 20 tokens and were cut" in caplog.text


def test_a_run_says_which_token_is_read(tmp_path: Path) -> None:
    said = {}
    for family in ("qwen2", "llama3", "phi3"):
        said[family] = about(load_scorer(saved(tmp_path / family, build(family))))
    assert said["qwen2"] == ["read at '\\n' after '<|im_end|>', the end of its chat template's output, as in plain transformers"]
    assert (
        "the last word" in said["llama3"][0] and "'<|eot_id|>', which is also the padding token, is skipped" in said["llama3"][0]
    )
    assert "'<|end|>'" in said["phi3"][0] and "'<|endoftext|>', which is also the padding token" in said["phi3"][0]
    own(tmp_path / "qwen2", "template_end", {"accuracy": 0.714, "low": 0.66, "high": 0.76, "pairs": 300, "prompts": 280})
    scorer = load_scorer(str(tmp_path / "qwen2"), position="auto")
    assert about(scorer)[1:] == ["agrees with 0.71 (0.66–0.76) of 300 held-out pairs"]
    assert facts(scorer) == {
        "name": scorer.name,
        "digest": scorer.digest,
        "position": "auto",
        "about": about(scorer),
    }
    assert about(load_scorer("gold")) == [] and set(facts(load_scorer("gold"))) == {"name", "digest"}


def test_of_plain_texts_it_says_where_those_are_read(tmp_path: Path) -> None:
    """A chat template is not applied to them, so its end is not read."""
    texts, chats = ([{"prompt": prompt} for prompt, _ in examples] for examples in (TEXTS, CHATS))
    folder = saved(tmp_path / "qwen2", build("qwen2"))
    for prompts, said in (
        (texts, ["read at the last token of the text, '<|im_end|>' where it ended, as in plain transformers"]),
        (chats, ["read at '\\n' after '<|im_end|>', the end of its chat template's output, as in plain transformers"]),
    ):
        scorer = load_scorer(folder)
        assert about(scorer, prompts) == said == facts(scorer)["about"]
        assert bool(doubts_of(scorer)) == (prompts is texts)
    both = load_scorer(folder)
    assert about(both, [*texts, *chats])[0].endswith(
        "; of plain-text prompts at the last token of the text, '<|im_end|>' where it ended"
    )
    assert "has a chat template, but the prompts are plain text" in doubts_of(both)[0]
    roberta = load_scorer(saved(tmp_path / "roberta", byte_level("chatml"), "roberta"))
    assert "here through the end of the response" in about(roberta, texts)[0] and doubts_of(roberta)
    own(tmp_path / "qwen2", "template_end")  # isdaa's own: nobody knows but its maker
    assert "the last token of the text" in about(ours := load_scorer(folder), texts)[0] and doubts_of(ours) == []
    assert doubts_of(load_scorer("gold")) == []


def test_a_template_that_does_not_work_is_no_matter_for_texts(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    scorer = RewardModelScorer(saved(tmp_path, tokenizer))
    assert "the last token of the text" in about(scorer)[0]
    assert scorer.score(rows(TEXTS)) == close(plain(scorer.name, TEXTS))


def test_records_of_later_versions_are_not_guessed_at(tmp_path: Path) -> None:
    saved(tmp_path, byte_level("chatml"))
    own(tmp_path, "middle")
    with pytest.raises(UserError, match=r"position 'middle'.*scorer.position"):
        about(load_scorer(str(tmp_path)))


def test_records_of_others_that_hold_no_figures(tmp_path: Path) -> None:
    saved(tmp_path, build("chatml_on_llama"))
    record = dataclasses.replace(ModelRecord(kind="reward", config={}), held_out={"accuracy": "high"})
    (tmp_path / "isdaa.json").write_text(record_text(record, tmp_path), encoding="utf-8")
    with pytest.raises(UserError, match=r"isdaa.json: held_out.accuracy"):
        about(load_scorer(str(tmp_path)))
