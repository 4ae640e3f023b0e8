"""A word-level tokenizer for the embedded world, and the tiny Llama that goes with it.

One token per word or mark, every word of the world known. The prompt's end mark is an added token, so that 'TL;DR:my boss' and
'TL;DR: my boss' give the same ids: prompt and response can be tokenised together or apart. It is not special: a policy that
writes it in a response is seen doing so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isdaa.world.lexicon import PROMPT_END, lexicon

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN)

# hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, initializer_range (about 1/√hidden_size: with the usual
# 0.02, models this narrow learn to write within the SFT stage, but not to copy from the post)
_SHAPES = {"small": (96, 192, 2, 4, 0.1), "medium": (256, 768, 6, 8, 0.06)}


def vocabulary(size: str) -> list[str]:
    """All tokens in the order of their ids: special tokens, the prompt's end, words."""
    return [*SPECIAL_TOKENS, PROMPT_END, *lexicon(size).vocabulary()]


def build_tokenizer(size: str) -> PreTrainedTokenizerFast:
    """The world's tokenizer: a token a word. It lower-cases, adds BOS but no EOS, and decodes to plain English.

    Args:
        size: "small" or "medium".

    Returns:
        A tokenizer for transformers.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {token: index for index, token in enumerate(vocabulary(size))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\w\s]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=False), *(decoders.Replace(f" {mark}", mark) for mark in ".?,")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    tokenizer.add_tokens([AddedToken(PROMPT_END, normalized=False, special=False)])
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def model_config(size: str) -> dict[str, Any]:
    """The configuration of a model to be trained from scratch on this world.

    Args:
        size: "small" or "medium".

    Returns:
        `model_type` and arguments of `transformers.LlamaConfig`.
    """
    tokens = vocabulary(size)
    hidden, intermediate, layers, heads, initial = _SHAPES[size]
    return {
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 256,
        "initializer_range": initial,
        "tie_word_embeddings": True,
        "pad_token_id": tokens.index(PAD),
        "bos_token_id": tokens.index(BOS),
        "eos_token_id": tokens.index(EOS),
    }
