"""The attentions for a GPU compute what the others do, gradients included, and give way where they do not.

There is no GPU here. FlexAttention runs as PyTorch's own reference of it; a loop over rows stands in for the kernels for
variable lengths. What is compared is everything around them: masks, intervals, copies of keys, their gradients, choices.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType

import pytest
import torch
from forward_helpers import (
    LAYOUTS,
    SHARED,
    assert_close,
    assert_same_gradients,
    compare,
    compare_shared,
    gradients,
    lengths_of,
    loss_of,
    packed,
    plain_logps,
    tiny,
    untouched,
    used,
)
from torch.nn import functional as F
from torch.nn.attention import flex_attention as flex_module

from isdaa.errors import UserError
from isdaa.models.attention import attention_choice, gpu_attention, shared_prefix
from isdaa.models.attention.layout import Layout
from isdaa.models.packed.forward import prepare

WAYS = ["flex", "varlen"]


def loop_kernel(q, k, v, cu_q, cu_k, most_q, most_k, scale, window, softcap):
    """A kernel for variable lengths as one would write it down: row by row, aligned at the end."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and len(cu_q) == len(cu_k)
    assert (cu_q[-1], cu_k[-1]) == (len(q), len(k))
    assert (most_q, most_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    out = []
    for row in range(len(cu_q) - 1):
        queries = q[cu_q[row] : cu_q[row + 1]].transpose(0, 1)
        keys, values = (x[cu_k[row] : cu_k[row + 1]].transpose(0, 1) for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        place = torch.arange(keys.shape[1])
        distance = place[keys.shape[1] - queries.shape[1] :, None] - place
        visible = (distance >= 0) & (distance < (window or len(k)))
        if softcap is None:
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scale)
        else:
            scores = queries @ keys.transpose(1, 2) * (queries.shape[-1] ** -0.5 if scale is None else scale)
            scores = (torch.tanh(scores / softcap) * softcap).masked_fill(~visible, float("-inf"))
            attended = torch.softmax(scores, -1) @ values
        out.append(attended.transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets the GPU's ways run here."""
    monkeypatch.setattr(flex_module, "_validate_device", lambda *unused: None)  # refuses gradients on a CPU
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)  # traces for seconds
    monkeypatch.setattr(gpu_attention, "lacks", lambda *unused: None)
    monkeypatch.setattr(gpu_attention, "varlen_kernel", lambda softcap: loop_kernel)
    monkeypatch.setattr(attention_choice, "proofs", {})
    monkeypatch.setattr(attention_choice, "said_once", set())


def attend(way, inputs, layout, scaling, window, softcap):
    how = shared_prefix.Kernel(scaling, 0.0, window, softcap)
    settings = (layout, scaling, window, softcap)
    return {
        "flex": lambda: gpu_attention.attend_flex(*inputs, *settings),
        "varlen": lambda: gpu_attention.attend_varlen(*inputs, *settings, kernel=loop_kernel),
        "one by one": lambda: shared_prefix.attend_one_by_one(*inputs, layout, how),
        "block": lambda: shared_prefix.attend_in_block(*inputs, layout, how),
        "dense": lambda: attention_choice.dense_attention(*inputs, *settings),
    }[way]()


def with_gradients(way, layout, dtype, *settings, seed=0):
    """Output and gradients of query, key and value, for a loss that weighs every number differently."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(1, h, layout.tokens, 8, generator=generator).to(dtype).requires_grad_() for h in (6, 2, 2)]
    out = attend(way, inputs, layout, *settings)
    assert out.shape == (1, layout.tokens, 6, 8) and out.dtype == dtype
    weights = torch.randn(out.shape, generator=generator)
    return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), inputs)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("settings", [(None, None, None), (0.3, 7, None), (0.3, None, 1.5), (None, 40, 1.5)], ids=str)
def test_equals_the_other_ways(on_cpu, way, name, settings):
    layout = LAYOUTS[name]
    ours = with_gradients(way, layout, torch.float64, *settings)
    tolerance = 1e-12 if settings[2] is None else 1e-5  # the plain ways' softmax after a soft cap is fp32
    for other in ("one by one", "block", "dense"):
        for found, truth in zip(ours, with_gradients(other, layout, torch.float64, *settings), strict=True):
            torch.testing.assert_close(found, truth, rtol=0, atol=tolerance * max(1.0, float(truth.detach().abs().max())))


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_as_near_to_fp32_as_plain_attention_in_bf16(on_cpu, way):
    layout = LAYOUTS["shared"]
    exact = with_gradients("dense", layout, torch.float32, None, None, None)
    ours, plain = (with_gradients(w, layout, torch.bfloat16, None, None, None) for w in (way, "one by one"))
    for found, usual, truth in zip(ours, plain, exact, strict=True):
        bound = 2 * (usual.float() - truth).abs().max() + 1e-3 * truth.abs().max()
        assert (found.float() - truth).abs().max() <= bound


@pytest.mark.parametrize("window", [None, 1, 7, 130])
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_hold_what_is_visible(name, window):
    """Blocks that are left out have nothing visible in them, and in those called full everything is."""
    layout = LAYOUTS[name]
    mask = gpu_attention.block_mask(layout, window, torch.device("cpu"))
    blocks = mask.shape[-1] // gpu_attention.BLOCK
    place = torch.arange(mask.shape[-1])
    visible = mask.mask_mod(None, None, place[:, None], place)
    for i in range(layout.tokens):
        same = layout.owner == layout.owner[i]
        group = torch.repeat_interleave(torch.arange(len(layout.prompt_lengths)), layout.group_lengths)
        distance = layout.position_ids[i] - layout.position_ids
        truth = (group == group[i]) & ((layout.owner == -1) | same) & (distance >= 0)
        truth &= distance < (window or layout.tokens)
        assert torch.equal(visible[i, : layout.tokens], truth)
    assert torch.equal(visible[layout.tokens :], torch.eye(len(place), dtype=torch.bool)[layout.tokens :])
    seen = visible.view(blocks, gpu_attention.BLOCK, blocks, gpu_attention.BLOCK).sum((1, 3))
    part, full = torch.zeros_like(seen, dtype=torch.bool), torch.zeros_like(seen, dtype=torch.bool)
    for row in range(blocks):
        part[row, mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()] = True
        full[row, mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()] = True
    assert torch.equal(full, seen == gpu_attention.BLOCK**2)
    assert torch.equal(part | full, seen > 0)


def test_a_long_row_needs_no_square_mask(monkeypatch):
    largest = []
    original = torch.Tensor.view
    monkeypatch.setattr(torch.Tensor, "view", lambda x, *shape: (largest.append(x.numel()), original(x, *shape))[1])
    layout = Layout.of_pairs(*(torch.full((20,), n) for n in (700, 100, 100)))  # T = 18 000
    gpu_attention.block_mask(layout, None, torch.device("cpu"))
    assert 0 < max(largest) <= layout.tokens * (layout.tokens // gpu_attention.BLOCK + 2)


# Families that differ in what an attention is told: windows, soft caps, scales, groups of heads. SDPA's are in
# tests/models/test_forward_families.py.
TOLD = ("llama", "gpt2", "granite", "mistral_short_window", "gemma2", "gemma3", "cohere2")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name if name in TOLD else pytest.param(name, marks=pytest.mark.slow) for name in SHARED])
def test_models_equal_plain_rows(on_cpu, way, name, caplog):
    """The equality tests of the shared prefix, through whole models of all families, with gradients."""
    model = tiny(name)
    truth_model = untouched(model)
    with caplog.at_level(logging.WARNING):
        forward = prepare(model, attention=way)
    assert forward.mode == "shared_prefix" and "attention by" not in caplog.text
    for pairs in (1, 5):
        compare(model, truth_model, forward, pairs)
    compare_shared(model, truth_model, forward)
    ids, layout = packed(lengths_of(2))
    forward(model, ids, None, layout)
    assert layout.cached("attention", lambda: "nothing") == way


def test_gradient_checkpointing(on_cpu):
    model = tiny("llama")
    truth_model = untouched(model)
    forward = prepare(model, probe=False, attention="varlen")  # the kernel's proof falls into a checkpointed layer
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    compare(model, truth_model, forward, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing, and giving way


def test_auto_on_a_cpu_and_unknown_names():
    model = tiny("llama")
    assert used(model, prepare(model)) == "sdpa"
    with pytest.raises(UserError, match=r"did you mean .?flex"):
        prepare(model, attention="flexx")


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_there_is_said(way, caplog, monkeypatch):
    monkeypatch.setattr(attention_choice, "proofs", {})
    monkeypatch.setattr(attention_choice, "said_once", set())
    model = tiny("llama")
    with caplog.at_level(logging.WARNING):
        forward = prepare(model, attention=way)
    assert used(model, forward) == "sdpa"
    assert forward.mode == "shared_prefix" and f"attention by {way} is not used" in caplog.text


def broken(q, k, v, *rest):
    raise RuntimeError("no kernel image is available")


def not_aligned_at_the_end(q, k, v, cu_q, cu_k, *rest):
    """What a kernel does that aligns rows at their beginning."""
    out = torch.zeros_like(q)
    for row in range(len(cu_q) - 1):
        n = int(cu_q[row + 1] - cu_q[row])
        queries, keys, values = q[cu_q[row] : cu_q[row + 1]], k[cu_k[row] :][:n], v[cu_k[row] :][:n]
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (keys, values))
        attended = F.scaled_dot_product_attention(queries.transpose(0, 1), keys, values, is_causal=True, scale=rest[2])
        out[cu_q[row] : cu_q[row + 1]] = attended.transpose(0, 1)
    return out


def no_gradient(*arguments):
    return loop_kernel(*arguments).detach() + 0 * arguments[0]


@pytest.mark.parametrize("kernel", [broken, not_aligned_at_the_end, no_gradient])
def test_a_kernel_that_is_wrong_is_not_used(on_cpu, monkeypatch, caplog, kernel):
    monkeypatch.setattr(gpu_attention, "varlen_kernel", lambda softcap: kernel)
    model = tiny("llama")
    truth_model = untouched(model)
    with caplog.at_level(logging.WARNING):
        forward = prepare(model, attention="varlen")
    assert forward.mode == "shared_prefix" and used(model, forward) == "sdpa"
    assert caplog.text.count("attention by varlen is not used on cpu") == 1
    compare(model, truth_model, forward, 3)


def test_a_kernel_that_is_wrong_in_this_model_alone(on_cpu, monkeypatch, caplog):
    """Right on the small layout of its own proof, wrong on the probe: the model falls back to SDPA, not to two rows."""
    wrong = lambda q, *rest: loop_kernel(q, *rest) * (1.0 if len(q) > 200 else 1.01)  # noqa: E731
    monkeypatch.setattr(gpu_attention, "varlen_kernel", lambda softcap: wrong)
    model, other = tiny("llama"), tiny("llama")
    truth_model = untouched(model)
    with caplog.at_level(logging.WARNING):
        forward = prepare(model, attention="varlen")
    assert forward.mode == "shared_prefix" and used(model, forward) == "sdpa"
    assert "attention by varlen does not reproduce the model's own logps" in caplog.text and "two separate" not in caplog.text
    compare(model, truth_model, forward, 3)
    assert used(other, prepare(other, probe=False, attention="varlen")) == "varlen"  # each model for itself


def test_dropout_is_left_to_sdpa(on_cpu, caplog):
    module = torch.nn.Module()
    attention_choice.choose_attention(module, "flex")
    x = torch.zeros(1, 2, 3, 8)
    settings = {"scaling": None, "window": None, "softcap": None}
    with caplog.at_level(logging.WARNING):
        assert attention_choice.fast_attention(module, x, x, dropout=0.1, **settings) is None
    assert "dropout" in caplog.text
    assert attention_choice.fast_attention(module, x, x, dropout=0.0, **settings)[0] == "flex"


def test_what_kernels_need():
    half, single = torch.zeros(1, 2, 3, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 3, 8)
    assert "half precision" in gpu_attention.lacks("varlen", single, single, None)
    assert "GPU" in gpu_attention.lacks("varlen", half, half, None)
    assert "size 12" in gpu_attention.lacks("varlen", *[torch.zeros(1, 2, 3, 12, dtype=torch.float16)] * 2, None)
    assert "size 512" in gpu_attention.lacks("varlen", *[torch.zeros(1, 2, 3, 512, dtype=torch.float16)] * 2, None)
    assert gpu_attention.lacks("flex", single, single, 2.0) is None


@pytest.fixture
def stand_ins(monkeypatch):
    """Both libraries' functions, as they are called; each notes its call and computes by the loop."""
    calls = []

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
        calls.append("torch")
        window = None if window_size[0] < 0 else window_size[0] + 1
        return loop_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window, None)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        assert causal and dropout_p == 0.0
        calls.append("flash_attn")
        window = None if window_size[0] < 0 else window_size[0] + 1
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return loop_kernel(q, k, v, *lengths, softmax_scale, window, softcap or None)

    for name, function in (("torch.nn.attention.varlen", varlen_attn), ("flash_attn", flash_attn_varlen_func)):
        module = ModuleType(name)
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, name, module)
    gpu_attention.varlen_parameters.cache_clear()
    yield calls
    gpu_attention.varlen_parameters.cache_clear()


@pytest.mark.parametrize(("softcap", "library"), [(None, "torch"), (1.5, "flash_attn")])
@pytest.mark.parametrize("window", [None, 7])
def test_libraries_are_called_as_they_want(stand_ins, softcap, library, window):
    layout = LAYOUTS["pairs"]
    inputs = [torch.randn(1, h, layout.tokens, 8) for h in (6, 2, 2)]
    ours = gpu_attention.attend_varlen(*inputs, layout, 0.3, window, softcap, kernel=gpu_attention.varlen_kernel(softcap))
    torch.testing.assert_close(ours, attention_choice.dense_attention(*inputs, layout, 0.3, window, softcap))
    assert stand_ins == [library]


def test_flash_attn_without_pytorchs_own(stand_ins, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert gpu_attention.varlen_kernel(None) is gpu_attention.flash_attn_kernel
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert gpu_attention.varlen_kernel(None) is None


def test_pytorchs_own_without_grouped_heads(stand_ins, monkeypatch):
    def older(q, k, v, cu_q, cu_k, most_q, most_k, *, scale=None, window_size=(-1, -1)):
        assert q.shape[1] == k.shape[1] == v.shape[1] and window_size == (-1, 0)
        return loop_kernel(q, k, v, cu_q, cu_k, most_q, most_k, scale, None, None)

    monkeypatch.setattr(sys.modules["torch.nn.attention.varlen"], "varlen_attn", older)
    layout = LAYOUTS["pairs"]
    inputs = [torch.randn(1, h, layout.tokens, 8) for h in (6, 2, 2)]
    ours = gpu_attention.attend_varlen(*inputs, layout, None, None, None, kernel=gpu_attention.torch_varlen_kernel)
    torch.testing.assert_close(ours, attention_choice.dense_attention(*inputs, layout, None, None, None))


def test_pytorchs_own_kernel_has_the_arguments_that_are_used():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    assert varlen.varlen_attn and gpu_attention.varlen_kernel(None) is gpu_attention.torch_varlen_kernel


def test_one_compiled_kernel_for_all_lengths(monkeypatch):
    """FlexAttention's compiled form is compiled a few times, and not again for every batch."""
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(flex_module, "_validate_device", lambda *unused: None)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(flex_module.flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(flex_module, "flex_attention", compiled)
    counts = []
    for seed, (prompts, window) in enumerate([([40], None), ([300, 90], None), ([500], 50), ([260, 9, 33], None), ([700], 9)]):
        lengths = torch.tensor(prompts), *(torch.full((len(prompts),), n) for n in (11, 20))
        layout = Layout.of_pairs(*lengths)
        ours = with_gradients("flex", layout, torch.float32, None, window, None, seed=seed)
        for found, truth in zip(ours, with_gradients("dense", layout, torch.float32, None, window, None, seed=seed), strict=True):
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_are_compiled_once(checkpointing):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = tiny("llama")
    truth_model = untouched(model)
    forward = prepare(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert gpu_attention.compile_layers(model, backend=counter) == 2
    counts = []
    for pairs in (2, 1, 5, 3):
        compare(model, truth_model, forward, pairs)
        counts.append(counter.frame_count)
    # Once for all layers, and once more for the last one, whose forward is another (`last_layer`).
    assert 0 < counts[1] == counts[-1] <= 12


@pytest.mark.slow
def test_a_compiled_model_gives_the_same():
    """What the Trainer's `torch_compile` does."""
    torch._dynamo.reset()
    model = tiny("llama")
    truth_model = untouched(model)
    forward = prepare(model)
    compiled = torch.compile(model, backend="eager")
    for pairs in (2, 3):
        ids, layout = packed(lengths_of(pairs))
        out, truth = forward(compiled, ids, None, layout), plain_logps(truth_model, ids, layout)
        assert_close(out.chosen_logps, truth[0])
        loss, true_loss = loss_of(out.chosen_logps, out.rejected_logps), loss_of(*truth)
        assert_same_gradients(gradients(model, loss), gradients(truth_model, true_loss))
