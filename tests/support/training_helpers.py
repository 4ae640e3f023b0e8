"""A Llama of a few thousand parameters, synthetic token pairs, and the shortest way to a trainer."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from isdaa import Objective
from isdaa.config import AlignConfig
from isdaa.models.packed.forward import prepare
from isdaa.training.trainer.batches import TokenisedPairs
from isdaa.training.trainer.callbacks import MetricsFile
from isdaa.training.trainer.preference_trainer import PreferenceTrainer
from isdaa.training.trainer.reference_logps import reference_logps
from isdaa.training.trainer.training_arguments import training_arguments

VOCABULARY = 40
EOS = 2

# The Trainer collects garbage at each start; without the imported libraries' objects this takes no time.
gc.freeze()


def tiny_model(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    # Its norms compute in fp32 whatever the weights are, so that gradients are exact to about 1e-6.
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def moved(model: LlamaForCausalLM, size: float = 0.05, seed: int = 5) -> LlamaForCausalLM:
    """A copy whose weights differ a little: a policy that has left its reference."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def token_rows(count: int, seed: int = 0, **columns: Any) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int, end: list[int]) -> list[int]:
        return rng.integers(3, VOCABULARY, int(rng.integers(low, high))).tolist() + end

    rows = []
    for index in range(count):
        row = {"prompt_ids": ids(2, 9, []), "chosen_ids": ids(1, 8, [EOS]), "rejected_ids": ids(1, 8, [EOS])}
        rows.append(row | {name: values[index] for name, values in columns.items()})
    return rows


def with_reference(rows: Any, reference: LlamaForCausalLM) -> TokenisedPairs:
    pairs = TokenisedPairs(rows)
    return pairs.with_reference(*reference_logps(prepare(reference), pairs, key={}, cache_dir=None))


def arguments(folder: Path, pairs: int, eval_pairs: int = 0, **changes: Any) -> TrainingArguments:
    settings = {
        "batch_size": 4,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "lr_scheduler": "constant",
        "max_grad_norm": 0.0,
    }
    config = AlignConfig(**(settings | changes))
    args = training_arguments(config, folder, seed=3, pairs=pairs, eval_pairs=eval_pairs, use_cpu=True)
    if "save_steps" not in changes:
        args.save_strategy = SaveStrategy.NO
    return args


def trainer_of(
    model: Any, folder: Path, train: TokenisedPairs, held_out: Any = None, objective: Any = None, **changes: Any
) -> PreferenceTrainer:
    """A trainer; keyword arguments are those of `AlignConfig`, and `own` those of the trainer itself."""
    own = changes.pop("own", {})
    args = arguments(folder, len(train), 0 if held_out is None else len(held_out), **changes)
    forward = own.pop("forward", None) or prepare(model, probe=False)
    return PreferenceTrainer(
        model,
        objective or Objective(weight="importance", beta=0.5),
        args=args,
        forward=forward,
        train_dataset=train,
        eval_dataset=held_out,
        **own,
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """max|a − b| / max|b| over tensors, the worst of them."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max().clamp(min=1e-12)) for n in one)


def logged(trainer: PreferenceTrainer, key: str = "loss") -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def shuffled_run(folder: Path, **settings: Any) -> None:
    """22 and 7 pairs: neither divides among two ranks, so that fill-ins are needed. Weights span the global batch."""
    model = moved(tiny_model()).double()
    held_out = TokenisedPairs(token_rows(7, seed=9))
    train = TokenisedPairs(token_rows(22, weight=[1.0 + i % 3 for i in range(22)]))
    objective = Objective(weight="shuffled", normalize="batch", beta=0.3)
    settings |= {"optimizer": "sgd", "logging_steps": 1, "save_steps": 3, "learning_rate": 0.02}
    own: dict[str, Any] = {"starts_at_reference": False, "callbacks": [MetricsFile(folder / "metrics.jsonl")]}
    reference = prepare(tiny_model())
    data = [
        pairs.with_reference(*reference_logps(reference, pairs, key={}, cache_dir=folder / "cache"))
        for pairs in (train, held_out)
    ]
    trainer = trainer_of(model, folder / "checkpoints", *data, objective, own=own, **settings)
    trainer.train()
