"""What reward models of other programs are fed: pairs of texts, whole conversations, two labels; against plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_helpers import TOKENIZATION, save, settings, tiny, world_rows
from real_tokenizers import build, corpus
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from isdaa.cli import main
from isdaa.errors import UserError
from isdaa.evaluation.checkpoints import sample_and_kl
from isdaa.evaluation.evaluate import evaluate
from isdaa.evaluation.scorers import PLACEHOLDER, RewardModelScorer, about, facts, load_scorer
from isdaa.files import write_jsonl

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.3}
TEXTS = [("What is 3+4?", "It is 7."), ("Name the capital of France, please", "Paris – I'd guess"), ("Why", "Because it is so.")]
ASKED = [[{"role": "user", "content": prompt}] for prompt, _ in TEXTS]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "Bye"},
]


def words(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer that frames two texts as this kind's does."""
    special = {"roberta": ["<s>", "<pad>", "</s>", "<unk>"]}.get(kind, ["[PAD]", "[CLS]", "[SEP]", "[UNK]"])
    start, sep = (special[0], special[2]) if kind == "roberta" else (special[1], special[2])
    backend = Tokenizer(models.WordPiece(unk_token=special[3]))
    backend.normalizer = normalizers.BertNormalizer(lowercase=kind == "bert")
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(corpus(3), trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    middle = f"{sep} {sep}" if kind == "roberta" else sep
    two = "" if kind == "roberta" else ":1"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {sep}", pair=f"{start} $A {middle} $B{two} {sep}{two}",
        special_tokens=[(name, special.index(name)) for name in (start, sep)],
    )  # fmt: skip
    names = {
        "pad_token": special[1] if kind == "roberta" else special[0],
        "cls_token": start,
        "sep_token": sep,
        "unk_token": special[3],
    }
    if kind != "bert":
        names |= {"bos_token": start, "eos_token": sep}
    read = ["input_ids", "attention_mask"] if kind == "roberta" else ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=read, **names)


def saved(folder: Path, kind: str, tokenizer: Any, **more: Any) -> str:
    torch.manual_seed(3)
    more = {"num_labels": 1, "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id} | more
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **SMALL, **more)
    AutoModelForSequenceClassification.from_config(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def rows(examples: Any, finished: bool = True) -> list[dict[str, Any]]:
    return [{"id": str(i), "prompt": p, "response": r, "finished": finished} for i, (p, r) in enumerate(examples)]


def plain(folder: str, examples: Any = TEXTS) -> list[list[float]]:
    """All outputs of plain transformers for tokenizer(prompt, answer)."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return [model(**tokenizer(p, r, return_tensors="pt")).logits[0].tolist() for p, r in examples]


def close(values: Any) -> Any:
    return pytest.approx(list(values), abs=2e-5)


KINDS = {"bert": {}, "roberta": {}, "deberta-v2": {"type_vocab_size": 0}, "electra": {"embedding_size": 16}, "distilbert": {}}


def encoder(folder: Path, kind: str, **more: Any) -> str:
    tokenizer = words({"roberta": "roberta", "bert": "bert", "electra": "bert"}.get(kind, "deberta"))
    if kind == "distilbert":  # whose class knows no token types, nor do its tokenizer's files
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}
        torch.manual_seed(3)
        config = AutoConfig.for_model(
            kind,
            vocab_size=len(tokenizer),
            num_labels=1,
            pad_token_id=0,
            max_position_embeddings=128,
            initializer_range=0.3,
            **sizes,
        )
        AutoModelForSequenceClassification.from_config(config).eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)
    return saved(folder, kind, tokenizer, **(KINDS[kind] | more))


@pytest.mark.parametrize("kind", list(KINDS))
def test_an_encoder_reads_prompt_and_answer_as_two_texts(kind: str, tmp_path: Path) -> None:
    folder = encoder(tmp_path, kind)
    scorer = RewardModelScorer(folder, batch_size=2)
    expected = close(score for (score,) in plain(folder))
    assert scorer.score(rows(TEXTS)) == expected
    assert scorer.score(rows(zip(ASKED, (r for _, r in TEXTS), strict=True))) == expected
    messages = [[{"role": "assistant", "content": r}] for _, r in TEXTS]
    assert scorer.score(rows(zip(ASKED, messages, strict=True))) == expected
    typed = kind in ("bert", "deberta-v2", "electra")
    assert all((row.types is not None and 1 in row.types) == typed for row in scorer.inputs(rows(TEXTS)))
    assert "two texts with a separator between them" in about(scorer)[0]


def test_turns_of_a_conversation_are_joined_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = encoder(tmp_path, "bert")
    with caplog.at_level("WARNING"):
        scores = RewardModelScorer(folder).score(rows([(TALK, "Ok"), (ASKED[0], "Ok")]))
    joined = "Be brief.\n\nHello\n\nHi\n\nBye"
    assert scores == close(s for (s,) in plain(folder, [(joined, "Ok"), (TEXTS[0][0], "Ok")]))
    assert "1 of 2 prompts have several turns" in caplog.text


def test_an_encoders_own_chat_template_wins(tmp_path: Path) -> None:
    tokenizer = words("bert")
    tokenizer.chat_template = "[CLS] {% for m in messages %}{{ m['role'] }}: {{ m['content'] }} [SEP] {% endfor %}"
    folder = saved(tmp_path, "bert", tokenizer)
    scorer = RewardModelScorer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    chat = [*TALK, {"role": "assistant", "content": "Ok"}]
    encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        assert scorer.score(rows([(TALK, "Ok")])) == close(model(**encoded).logits[0].tolist())
    assert "chat template" in about(scorer)[0]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_what_does_not_fit_an_encoder_is_cut_and_said(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = encoder(tmp_path, kind, max_position_embeddings=40)
    scorer = RewardModelScorer(folder, max_prompt_length=10)
    with caplog.at_level("WARNING"):
        ids = scorer.token_ids(rows([("why is it so " * 30, "because " * 80)]))
        scorer.score(rows([("why is it so " * 30, "because " * 80)]))
    assert len(ids[0]) == (38 if kind == "roberta" else 40) and ids[0][-1] == scorer.tokenizer.sep_token_id
    assert "responses do not fit" in caplog.text and "prompts have more than 10 tokens" in caplog.text


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_long_prompt_leaves_an_encoder_the_whole_answer(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scorer = RewardModelScorer(encoder(tmp_path, kind, max_position_embeddings=64))
    prompt, answer = "why is it so " * 40, "because it is so."
    with caplog.at_level("WARNING"):
        scorer.score(rows([(prompt, answer), ("why", answer)]))
    (fed, short) = scorer.inputs(rows([(prompt, answer), ("why", answer)]))
    asked, answered = (scorer.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    frame = len(scorer.tokenizer("a", "b")["input_ids"]) - 2
    kept = len(fed.ids) - frame - len(answered)
    assert len(fed.ids) == (62 if kind == "roberta" else 64) and kept > 20
    assert fed.ids[1 : 1 + kept] == asked[-kept:] and fed.ids[-1 - len(answered) : -1] == answered
    assert fed.lacking == ("prompt",) and short.lacking == () and scorer.lacking == [("prompt",), ()]
    assert "1 of 2 prompts do not fit its" in caplog.text and "responses" not in caplog.text.replace("their responses", "")


@pytest.mark.parametrize("position", ["template_end", "response_end"])
@pytest.mark.parametrize("chat", [True, False])
def test_so_does_a_decoder(position: Any, chat: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, "llama", build("qwen2"), max_position_embeddings=64)
    roomy = RewardModelScorer(saved(tmp_path / "roomy", "llama", build("qwen2"), max_position_embeddings=4096), position=position)
    words = "Why is it so? " * 40
    row = rows([([{"role": "user", "content": words}] if chat else words, " Because it is so.")])
    for limit, whole in ((512, False), (20, True)):
        scorer = RewardModelScorer(folder, position=position, max_prompt_length=limit)
        roomy.max_prompt_length = limit
        (fed,), (all_of_it,) = scorer.inputs(row), roomy.inputs(row)
        assert fed.ids[1:] == all_of_it.ids[-len(fed.ids) + 1 :] and (len(fed.ids) == 64) != whole
        assert fed.lacking == (() if whole else ("prompt",)) and all_of_it.lacking == ()
    assert " ".join(scorer.tokenizer.decode(fed.ids).split()).count("Because it is so.") == 1


def test_only_models_with_few_positions_have_a_new_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for fits in (2, 3):
        monkeypatch.setattr("isdaa.evaluation.scorers.FITS", fits)
        for positions in (128, 8192):
            folder = saved(tmp_path / str(positions), "llama", build("qwen2"), max_position_embeddings=positions)
            found[fits, positions] = RewardModelScorer(folder).digest
    assert found[2, 8192] == found[3, 8192] and found[2, 128] != found[3, 128]


def test_the_shares_that_were_cut_stand_in_the_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scorer = encoder(tmp_path / "bert", "bert", max_position_embeddings=24)
    policy = save(tiny(), tmp_path / "policy")
    given = {"reference": policy, "prompts": world_rows(), "settings": settings(), "tokenization": TOKENIZATION}
    for _ in range(2):  # the second time from the records
        metrics = evaluate([policy], scorer=scorer, output_dir=tmp_path / "out", **given)
        (line,) = metrics["doubts"]
        assert line.startswith(f"scorer {scorer}: ") and "% of the prompts lost their beginning" in line


def test_texts_of_a_decoder_are_tokenised_as_one(tmp_path: Path) -> None:
    """A prompt that ends inside a word: apart, its tokens would be others."""
    folder = saved(tmp_path, "llama", build("llama3"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [("The answ", "er is 7."), ("The answer is", " 7.")]
    scorer = RewardModelScorer(folder)
    assert scorer.token_ids(rows(texts)) == [tokenizer(p + r + tokenizer.eos_token).input_ids for p, r in texts]


# --- two labels


@pytest.mark.parametrize(
    ("names", "good"),
    [
        (("rejected", "chosen"), 1), (("CHOSEN", "REJECTED"), 0), (("bad", "good"), 1), (("NEGATIVE", "POSITIVE"), 1),
        (("helpful", "unhelpful"), 0), (("not_helpful", "helpful"), 1), (("accept", "reject"), 0), (("toxic", "non-toxic"), 1),
        (("incorrect", "correct"), 1), (("unacceptable", "acceptable"), 1),
    ],
)  # fmt: skip
def test_two_labels_are_read_by_their_names(names: tuple[str, str], good: int, tmp_path: Path) -> None:
    folder = encoder(tmp_path, "bert", num_labels=2, id2label=dict(enumerate(names)))
    scorer = load_scorer(folder)
    assert scorer.score(rows(TEXTS)) == close(both[good] - both[1 - good] for both in plain(folder))
    assert f"the logit of {names[good]!r} less that of {names[1 - good]!r}" in about(scorer)[0]


def test_two_labels_of_a_decoder(tmp_path: Path) -> None:
    tokenizer = build("qwen2")
    folder = saved(
        tmp_path, "llama", tokenizer, num_labels=2, id2label={0: "good", 1: "bad"}, eos_token_id=tokenizer.eos_token_id
    )
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    chat = [*TALK, {"role": "assistant", "content": "Ok"}]
    with torch.no_grad():
        encoded = AutoTokenizer.from_pretrained(folder).apply_chat_template(
            chat, tokenize=True, return_tensors="pt", return_dict=True
        )
        good, bad = model(input_ids=encoded["input_ids"]).logits[0].tolist()
    assert RewardModelScorer(folder).score(rows([(TALK, "Ok")])) == close([good - bad])


def test_labels_that_say_nothing_are_refused_unless_one_is_named(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "two", "bert", num_labels=2)
    with pytest.raises(UserError, match=r"'LABEL_0', 'LABEL_1'.*--scorer.label LABEL_1"):
        about(load_scorer(folder))
    for label in ("LABEL_0", "label_0", "0"):
        assert load_scorer(folder, label=label).score(rows(TEXTS)) == close(a - b for a, b in plain(folder))
    first, second = (load_scorer(folder, label=label) for label in ("0", "1"))
    assert first.digest != second.digest and facts(first)["label"] == "0"
    with pytest.raises(UserError, match=r"scorer.label 'best' is none of its labels"):
        load_scorer(folder, label="best").score(rows(TEXTS))
    with pytest.raises(UserError, match=r"two labels \('yes', 'no'\)"):
        about(load_scorer(encoder(tmp_path / "yes", "bert", num_labels=2, id2label={0: "yes", 1: "no"})))
    with pytest.raises(UserError, match=r"a classifier of 5 labels"):
        about(load_scorer(encoder(tmp_path / "stars", "bert", num_labels=5)))


# --- before the first sample


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a sample was drawn")

    monkeypatch.setattr(sample_and_kl.Collection, "sample_model", never)
    tokenizer = build("qwen2")
    return save(tiny_of(tokenizer), tmp_path / "policy", tokenizer)


def tiny_of(tokenizer: Any) -> Any:
    model = tiny()
    model.resize_token_embeddings(len(tokenizer))
    return model


def asked(policy: str, scorer: str, **changes: Any) -> Any:
    prompts = [{"id": str(i), "prompt": p, "prompt_ids": None, "chosen": None, "facts": None} for i, p in enumerate(ASKED)]
    options = {"reference": policy, "prompts": prompts, "scorer": scorer, "settings": settings(), "tokenization": TOKENIZATION}
    return evaluate([policy], **(options | {"output_dir": Path(policy).parent / "out"} | changes))


def test_what_is_no_scorer_is_refused_before_the_first_sample(policy: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"scorer .*policy: no trained reward head: it is a language model \(LlamaForCausalLM\)"):
        asked(policy, policy)
    with pytest.raises(UserError, match=r"nobody/nothing.*no such folder here"):
        asked(policy, "nobody/nothing")
    bare = build("gpt2")
    scorer = saved(tmp_path / "bare", "llama", bare, pad_token_id=bare.eos_token_id)
    with pytest.raises(
        UserError, match=r"scorer .*bare: the prompts are conversations, but the scorer's own tokenizer has no chat"
    ):
        asked(policy, scorer)
    large = saved(tmp_path / "large", "llama", build("qwen2"))
    config = AutoConfig.from_pretrained(large)
    config.vocab_size, config.pad_token_id = 40, 0
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(large)
    with pytest.raises(UserError, match=r"scorer .*large: its tokenizer gives id \d+, but the model knows 40 tokens"):
        asked(policy, large)
    file = Path(saved(tmp_path / "cut", "llama", build("qwen2"))) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"cut/model.safetensors: a damaged file of weights"):
        asked(policy, str(file.parent))
    with pytest.raises(UserError, match="classifier of two labels"):
        asked(policy, encoder(tmp_path / "two", "bert", num_labels=2))
    assert not (tmp_path / "out").exists()


def test_what_a_scorer_is_fed_is_shown(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError, match="a sample was drawn"):
        asked(policy, encoder(tmp_path / "bert", "bert"), show_scorer_input=True)
    lines = capsys.readouterr().err.splitlines()
    start = next(i for i, line in enumerate(lines) if "its input for prompt 0" in line)
    assert f"the placeholder {PLACEHOLDER!r}" in lines[start]
    assert lines[start + 1].split() == ["0", "id", "1", "'[CLS]'", "type", "0"] and "type 1" in "".join(lines)
    with pytest.raises(AssertionError, match="a sample was drawn"):
        asked(policy, saved(tmp_path / "llama", "llama", build("qwen2")), show_scorer_input=True)
    shown = capsys.readouterr().err
    assert shown.count("<- read here") == 1 and "type" not in shown.split("its input")[1].split("tokens:")[1].split("\n")[1]


def test_a_scorer_of_the_hub_has_a_digest_of_its_classifiers_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder(tmp_path / "someone/reward", "deberta-v2", num_labels=2, id2label={0: "bad", 1: "good"})
    monkeypatch.chdir(tmp_path)
    here = RewardModelScorer("someone/reward")
    there = RewardModelScorer("someone/reward")
    expected, digest = here.score(rows(TEXTS)), here.digest
    monkeypatch.setattr("isdaa.models.places.local_folder", lambda name: None)
    assert there.digest != digest  # no check of the language model that it is not
    there.check([{"id": "0", "prompt": "Why"}])
    assert there.score(rows(TEXTS)) == close(expected)


def test_the_flag_of_the_command(policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": str(i), "prompt": p, "chosen": [{"role": "assistant", "content": "Ok"}]} for i, p in enumerate(ASKED)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    scorer = saved(tmp_path / "llama", "llama", build("qwen2"))
    options = ["--reference", policy, "--data", str(tmp_path / "prompts.jsonl"), "--scorer", scorer, "--show_scorer_input"]
    main(["evaluate", "--model_path", policy, *options, "--output", str(tmp_path / "out")])
    assert "its input for prompt 0 and the data's chosen response" in capsys.readouterr().err
