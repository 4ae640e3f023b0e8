"""The forward inside wrappers: accelerate's autocast, DDP, and what unwrapping leaves behind."""

from __future__ import annotations

import pytest
import torch
from forward_helpers import (
    assert_close,
    assert_same_gradients,
    gradients,
    lengths_of,
    loss_of,
    packed,
    plain_logps,
    tiny,
    untouched,
)

from isdaa.models.packed.forward import inner_model, prepare


def test_bf16_model_and_fp16_model():
    for dtype in (torch.bfloat16, torch.float16):
        model = tiny("llama").to(dtype)
        truth_model = untouched(model)
        forward = prepare(model)
        assert forward.mode == "shared_prefix"
        ids, layout = packed(lengths_of(5))
        out = forward(model, ids, None, layout)
        assert out.token_logps.dtype == out.chosen_logps.dtype == torch.float32
        truth = plain_logps(truth_model, ids, layout)[0].detach()
        assert float((out.chosen_logps - truth).detach().abs().max()) < 0.02 * float(truth.abs().max())
        loss_of(out.chosen_logps, out.rejected_logps).backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.dtype == dtype for p in model.parameters())


def test_float64_model_is_exact_to_float64():
    model = tiny("granite").double()
    truth_model = untouched(model)
    forward = prepare(model)
    ids, layout = packed(lengths_of(5))
    truth = plain_logps(truth_model, ids, layout)
    out = forward(model, ids, None, layout)
    assert out.token_logps.dtype == torch.float64
    torch.testing.assert_close(out.rejected_logps, truth[1], rtol=1e-12, atol=1e-12)


def test_accelerate_autocast_and_unwrapping():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    model = tiny("llama")
    truth_model = untouched(model)
    forward = prepare(model)
    ids, layout = packed(lengths_of(3))
    truth = plain_logps(truth_model, ids, layout)[0].detach()
    AcceleratorState._reset_state(True)  # a trainer of another test may have left its own in this process
    PartialState._reset_state()
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        wrapped = accelerator.prepare(model)
        out = forward(wrapped, ids, None, layout)
        assert out.token_logps.dtype == torch.float32
        assert 1e-4 < float((out.chosen_logps - truth).detach().abs().max()) < 0.05 * float(truth.abs().max())
        assert wrapped(input_ids=ids[None]).logits.dtype == torch.float32
        again = prepare(wrapped)  # already installed: nothing is wrapped twice
        assert_close(again(wrapped, ids, None, layout).chosen_logps, out.chosen_logps)
        plain = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        assert_close(forward(plain, ids, None, layout).chosen_logps, truth)
        assert torch.equal(plain(input_ids=ids[None]).logits, truth_model(input_ids=ids[None]).logits)
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()


def test_ddp(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    model = tiny("qwen2")
    truth_model = untouched(model)
    forward = prepare(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        assert inner_model(wrapped) is model
        ids, layout = packed(lengths_of(5))
        truth = plain_logps(truth_model, ids, layout)
        out = forward(wrapped, ids, layout.position_ids, layout, with_wpo=True)
        assert_close(out.chosen_logps, truth[0])
        ours = gradients(model, loss_of(out.chosen_logps, out.rejected_logps))
        assert_same_gradients(ours, gradients(truth_model, loss_of(*truth)))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_wpo_term(name):
    model = tiny(name)
    truth_model = untouched(model)
    ids, layout = packed(lengths_of(4))
    out = prepare(model)(model, ids, None, layout, with_wpo=True)
    assert out.chosen_wpo is not None and not out.chosen_wpo.requires_grad
    for b, (prompt, (chosen, rejected)) in enumerate(layout.groups):
        start = int(layout.prompt_starts[b])
        for found, at, length in ((out.chosen_wpo, prompt, chosen), (out.rejected_wpo, prompt + chosen, rejected)):
            row = torch.cat([ids[start : start + prompt], ids[start + at : start + at + length]])
            every = torch.log_softmax(truth_model(input_ids=row[None]).logits[0, prompt - 1 : -1], -1)
            logps = every.gather(1, row[prompt:, None])[:, 0]
            assert_close(found[b], (logps - every.exp().square().sum(-1).log()).mean(), scale=1.0)
