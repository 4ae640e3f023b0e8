"""The last layer goes on with the positions that are read, and with nothing else; the numbers stay what they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from forward_helpers import (
    CONFIGS,
    assert_close,
    assert_same_gradients,
    gradients,
    lengths_of,
    loss_of,
    packed,
    plain_logps,
    tiny,
)

from isdaa.models.attention.layout import Layout
from isdaa.models.packed import last_layer
from isdaa.models.packed.forward import prepare

pytestmark = pytest.mark.fast

NARROWED = {"llama", "llama_tied", "qwen2", "qwen3", "mistral", "mistral_long_window", "mistral_short_window"}


def rows_through_last_unit(model: torch.nn.Module) -> list[int]:
    seen: list[int] = []
    model.model.layers[-1].mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    return seen


@pytest.mark.parametrize("name", CONFIGS)
def test_which_models_are_narrowed(name):
    model = tiny(name)
    assert last_layer.install(model) == (name in NARROWED)
    assert last_layer.install(model) == (name in NARROWED)  # a second time changes nothing
    own = [m for m in model.modules() if getattr(m.__dict__.get("forward"), "__func__", None) is last_layer._forward]
    assert own == ([model.model.layers[-1]] if name in NARROWED else [])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", sorted(NARROWED))
def test_same_numbers_from_fewer_rows(name, checkpointing):
    model = tiny(name)
    truth_model = copy.deepcopy(model)
    forward = prepare(model)
    assert forward.mode == "shared_prefix"
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    seen = rows_through_last_unit(model)
    ids, layout = packed(lengths_of(5))
    out, truth = forward(model, ids, None, layout), plain_logps(truth_model, ids, layout)
    # The last token of each prompt, and every response token but the last: the pair's first two tokens share a predictor.
    assert seen == [sum(chosen + rejected - 1 for _, chosen, rejected in lengths_of(5))]
    assert_close(out.chosen_logps, truth[0])
    assert_close(out.rejected_logps, truth[1])
    ours = gradients(model, loss_of(out.chosen_logps, out.rejected_logps))
    assert_same_gradients(ours, gradients(truth_model, loss_of(*truth)))


def test_plain_calls_see_every_row():
    model = tiny("llama")
    truth = copy.deepcopy(model)(input_ids=torch.arange(3, 12)[None]).logits
    prepare(model)
    seen = rows_through_last_unit(model)
    assert torch.equal(model(input_ids=torch.arange(3, 12)[None]).logits, truth) and seen == [9]


def test_shared_prompts_and_empty_responses():
    model = tiny("llama")
    truth_model = copy.deepcopy(model)
    forward = prepare(model)
    tensor = torch.tensor
    layout = Layout(tensor([4, 3]), tensor([2, 0, 5, 1]), tensor([0, 0, 0, 1]), tensor([0, 2]), tensor([1, 0]))
    ids = torch.arange(3, 3 + layout.tokens)
    logps = forward(model, ids, None, layout).token_logps
    rows = [([0, 1, 2, 3], [4, 5]), ([0, 1, 2, 3], [6, 7, 8, 9, 10]), ([11, 12, 13], [14])]
    expected = []
    for prompt, response in rows:
        found = truth_model(input_ids=ids[prompt + response][None]).logits[0].log_softmax(-1)
        expected += [found[len(prompt) - 1 + i, ids[place]] for i, place in enumerate(response)]
    assert_close(logps, torch.stack(expected))
    nothing = Layout.of_rows(tensor([3]), tensor([0]))
    assert len(forward(model, ids[:3], None, nothing).token_logps) == 0


def test_foreign_forwards_and_parts_are_left_alone():
    model = tiny("llama")
    layer = model.model.layers[-1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    assert not last_layer.install(model)
    del layer.forward
    layer.extra = torch.nn.Linear(2, 2)
    assert not last_layer.install(model)


def test_copies_and_pickles():
    model = tiny("llama")
    prepare(model)
    twin, revived = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert twin.model.layers[-1].forward.__self__ is twin.model.layers[-1]
    ids, layout = packed(lengths_of(3))
    expected = prepare(model)(model, ids, None, layout).token_logps
    for other in (twin, revived):
        seen = rows_through_last_unit(other)
        assert torch.equal(prepare(other, probe=False)(other, ids, None, layout).token_logps, expected)
        assert seen and seen[0] < layout.tokens
