"""Fused norms and gated units give the values and gradients of the modules they replace, or leave them alone."""

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
from torch import nn

from isdaa.models.packed import fused_layers
from isdaa.models.packed.forward import prepare

# Two norms a layer and the last one, and a gated unit a layer; Qwen 3 has norms in its attention, too.
MODULES = {"llama": 7, "llama_tied": 7, "mistral_short_window": 7, "qwen2": 7, "qwen3": 11, "granite": 7}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_logps_and_gradients(name):
    model = tiny(name)
    truth_model = copy.deepcopy(model)
    installed = fused_layers.install(model)
    assert installed == MODULES.get(name, installed)
    assert name not in ("gpt2", "opt", "bloom", "gpt_neox") or installed == 0
    forward = prepare(model, probe=False)
    if name == "bloom":
        return
    ids, layout = packed(lengths_of(5))
    truth = plain_logps(truth_model, ids, layout)
    out = forward(model, ids, None, layout)
    assert_close(out.chosen_logps, truth[0])
    ours = gradients(model, loss_of(out.chosen_logps, out.rejected_logps))
    assert_same_gradients(ours, gradients(truth_model, loss_of(*truth)))
    assert fused_layers.install(model) == installed  # a second time changes nothing


@pytest.mark.parametrize("operation", [fused_layers._RMSNorm, fused_layers._Gated])
def test_gradients_by_finite_differences(operation):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    if operation is fused_layers._Gated:
        other, settings = torch.randn_like(x).requires_grad_(), ()
    else:
        other, settings = torch.randn(5, dtype=torch.float64, requires_grad=True), (1e-6,)
    assert torch.autograd.gradcheck(lambda a, b: operation.apply(a, b, *settings), (x, other))
    for frozen in (x, other):
        frozen.requires_grad_(False)
        assert torch.autograd.gradcheck(lambda a, b: operation.apply(a, b, *settings), (x, other))
        frozen.requires_grad_(True)


class Gated(nn.Module):
    """The parts of a gated unit."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.act_fn = nn.SiLU()


def test_what_computes_something_else_keeps_its_forward():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.randn(8)), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon) * (1 + self.weight)

    class OddMLP(Gated):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + x

    model = nn.Sequential(OddRMSNorm(), OddMLP())
    assert fused_layers.install(model) == 0
    assert "forward" not in model[0].__dict__ and "forward" not in model[1].__dict__
    low = tiny("llama").bfloat16()
    assert fused_layers.install(low) == 2  # norms in bf16 keep theirs, and gated units hand their bf16 on
    assert torch.equal(low(torch.arange(5)[None]).logits, copy.deepcopy(low)(torch.arange(5)[None]).logits)


def test_gates_that_are_cut_off_somewhere_keep_their_forward():
    """As DeepSeek V4 does at 10: numbers as small as a norm gives do not show it. The limit may be that of one layer alone."""

    class CutMLP(Gated):
        def __init__(self, limit):
            super().__init__()
            self.limit = limit

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=self.limit)) * self.up_proj(x))

    torch.manual_seed(0)
    model = nn.ModuleList([CutMLP(float("inf")), CutMLP(10.0), CutMLP(5000.0)])
    assert fused_layers.install(model) == 1
    assert ["forward" in module.__dict__ for module in model] == [True, False, False]


def test_autocast_is_left_to_the_module():
    class CarefulMLP(Gated):
        def forward(self, x):
            return self.down_proj((self.act_fn(self.gate_proj(x).float()) * self.up_proj(x).float()).to(x.dtype))

    torch.manual_seed(0)
    module, x = CarefulMLP(), torch.randn(3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = module(x)
        assert fused_layers.install(module) == 1
        assert torch.equal(module(x), expected)


def test_copies_pickles_lora_and_checkpointing():
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    truth_model = copy.deepcopy(model)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["gate_proj", "q_proj"], init_lora_weights=False))
    truth_model.load_state_dict(copy.deepcopy(model).merge_and_unload().state_dict())
    fused_layers.install(model)
    forward = prepare(model, probe=False)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids, layout = packed(lengths_of(3))
    out = forward(model, ids, None, layout)
    assert_close(out.rejected_logps, plain_logps(truth_model, ids, layout)[1])
    assert all(g.abs().max() > 0 for n, g in gradients(model, out.token_logps.sum()).items() if "lora_B" in n)
    fused_model = tiny("llama")
    assert fused_layers.install(fused_model) == 7
    clone = copy.deepcopy(fused_model)
    assert clone.model.norm.forward.__self__ is clone.model.norm
    revived = pickle.loads(pickle.dumps(fused_model))
    row = torch.arange(6)[None]
    assert_close(revived(row).logits, fused_model(row).logits)
    assert fused_layers.install(revived) == 7
    assert torch.equal(revived(row).logits, fused_model(row).logits)
