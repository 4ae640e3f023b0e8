"""Byte-level BPE tokenizers, trained here in a moment, with habits of real ones: BOS or not, chat template or not."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The kettle is on the stove and the water will boil soon.",
    "What is the capital of France? The capital of France is Paris.",
    "Please write a short note to my neighbour about the noise at night.",
    "You are a helpful assistant. Answer in one sentence.",
    "Good morning! How are you? I am fine, thank you, and you?",
    "user assistant system question answer answers answering",
]
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# No token of its own ends a turn.
PLAIN_WORDS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# The turn's end is followed by EOS, as in Phi-3.
TURN_THEN_EOS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The opened turn starts to think, a finished one does not: no prefix.
NO_PREFIX = CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif")
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "words": PLAIN_WORDS,
    "turn_then_eos": TURN_THEN_EOS,
    "no_prefix": NO_PREFIX,
}


@cache
def trained() -> str:
    """The tokenizer without habits, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL + CHAT_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def byte_level(
    template: str | None = None,
    *,
    bos: bool = False,
    padding_side: str = "right",
    pad: str | None = "<|pad|>",
    eos: bool = True,
) -> PreTrainedTokenizerFast:
    """A fresh tokenizer. bos: it puts BOS before every text; template: a name of `TEMPLATES`; pad None: none set."""
    backend = Tokenizer.from_str(trained())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            special_tokens=[("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>" if eos else None,
        pad_token=pad,
        padding_side=padding_side,
        clean_up_tokenization_spaces=False,
    )
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids of a text as it stands."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
