"""bf16 on a CPU: linear layers that share casts, attention that stays in fp32, and the choice between the precisions."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn
from training_helpers import tiny_model

from isdaa.models import half_precision
from isdaa.models.attention.layout import Layout
from isdaa.models.half_precision import BFLOAT16, FLOAT32, Choice, choose, numerics
from isdaa.models.packed import half_linear
from isdaa.models.packed.forward import PairForward, prepare


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 384), nn.Linear(384, 512))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_layer_gives_what_autocast_gives(bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 7, bias=bias), nn.Linear(7, 5, bias=bias))
    if frozen:
        plain[0].weight.requires_grad_(False)
    ours = copy.deepcopy(plain)
    half_linear.install(ours)
    x = torch.randn(3, 4, 12)
    for layers, into in ((plain, plain_grads := []), (ours, our_grads := [])):
        leaf = x.clone().requires_grad_()
        with numerics(BFLOAT16, "cpu"):
            out = layers(leaf)
        assert out.dtype == torch.bfloat16
        (out.float() ** 2).sum().backward()
        into += [out.detach(), leaf.grad, *(p.grad for p in layers.parameters() if p.requires_grad)]
    for a, b in zip(plain_grads, our_grads, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2 * float(a.abs().max()))
        assert a.dtype == b.dtype
    assert torch.equal(plain_grads[0], our_grads[0])


def test_without_autocast_it_is_the_layers_own_product() -> None:
    layer = nn.Linear(6, 4)
    x = torch.randn(5, 6)
    before = layer(x)
    half_linear.install(layer)
    assert torch.equal(layer(x), before)
    with torch.autocast("cpu", dtype=torch.float16):
        assert layer(x).dtype == torch.float16


def test_layers_that_read_one_tensor_share_its_cast_and_no_other_one() -> None:
    x = torch.randn(4, 3)
    first = half_linear.shared_cast(x)
    assert half_linear.shared_cast(x) is first
    x += 1
    assert torch.equal(half_linear.shared_cast(x), x.bfloat16())
    other = torch.randn(4, 3)
    assert torch.equal(half_linear.shared_cast(other), other.bfloat16())


def test_a_weight_that_was_changed_behind_autograds_back_is_cast_anew() -> None:
    layer = nn.Linear(4, 4, bias=False)
    half_linear.install(layer)
    x = torch.randn(2, 4)
    with torch.no_grad(), numerics(BFLOAT16, "cpu"):
        layer(x)
        layer.weight.data.zero_()
        assert not layer(x).any()


def test_attention_in_blocks_is_in_fp32_under_autocast() -> None:
    from isdaa.models.attention.attention_choice import dense_attention
    from isdaa.models.attention.cpu_attention import attend_blocks

    torch.manual_seed(0)
    layout = Layout.of_pairs(*(torch.tensor([n]) for n in (150, 30, 20)))
    query, key, value = (torch.randn(1, heads, layout.tokens, 16) for heads in (4, 2, 2))
    with numerics(BFLOAT16, "cpu"):
        found = attend_blocks(query, key, value.bfloat16(), layout)
    exact = dense_attention(query, key, value.bfloat16().float(), layout, None, None, None)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max()) < 1e-5


def test_the_forward_is_proved_in_the_precision_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    own = PairForward._request

    def watched(self: PairForward, *args: object, **kwargs: object) -> object:
        seen.append(torch.is_autocast_enabled("cpu"))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(PairForward, "_request", watched)
    prepare(tiny_model(), precision=BFLOAT16)
    assert seen and all(seen)
    seen.clear()
    prepare(tiny_model())
    assert seen and not any(seen)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (wide().bfloat16(), "bfloat16 themselves"),
        (nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512).bfloat16()), "bfloat16 themselves"),
        (nn.Sequential(nn.Linear(96, 4000), nn.Linear(4000, 96)), "narrow"),
        (nn.Sequential(nn.LayerNorm(512)), "narrow"),
    ],
)
def test_what_needs_no_probe(model: nn.Module, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_precision, "products_ratio", lambda *_: pytest.fail("it was timed"))
    found = choose(model, 100, tmp_path)
    assert found.precision == FLOAT32 and words in found.why and found.ratio is None
    assert not list(tmp_path.iterdir())


def test_a_processor_that_emulates_bf16_stays_in_fp32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert "no instructions" in choose(wide(), 100, tmp_path).why


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A processor with bf16, whose products take the ratios of this list, one a probe."""
    ratios: list[float] = []
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(half_precision, "products_ratio", lambda *_: ratios.pop(0))
    return ratios


@pytest.mark.parametrize(("ratio", "precision"), [(0.4, BFLOAT16), (0.69, BFLOAT16), (0.71, FLOAT32), (3.0, FLOAT32)])
def test_the_faster_one_is_taken_where_it_is_worth_it(ratio: float, precision: str, able: list[float], tmp_path: Path) -> None:
    able.append(ratio)
    assert choose(wide(), 1000, tmp_path).precision == precision


def test_it_is_decided_once_a_machine_a_model_and_a_length(
    able: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    able += [0.4, 0.9, 0.9, 0.9]
    assert choose(wide(), 1000, tmp_path).precision == BFLOAT16
    assert choose(wide(), 1024, tmp_path).precision == BFLOAT16  # the same power of two
    assert len(able) == 3
    assert choose(wide(), 10, tmp_path).precision == FLOAT32
    monkeypatch.setattr(half_precision, "processor", lambda: "another")
    assert choose(wide(), 1000, tmp_path).precision == FLOAT32
    choose(nn.Sequential(nn.Linear(512, 512)), 1000, tmp_path)
    assert not able


def test_those_who_share_a_folder_share_the_answer(able: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    able += [0.4, 0.9]
    assert choose(wide(), 1000, tmp_path, shared=True).precision == BFLOAT16
    monkeypatch.setattr(half_precision, "processor", lambda: "another")
    assert choose(wide(), 10, tmp_path, shared=True).precision == BFLOAT16
    assert choose(wide(), 10, tmp_path).precision == FLOAT32  # alone it measures for itself


@pytest.mark.parametrize("damage", ["", "{", "[1]", "3", '"a"', '{"key": 1}', '{"precision": "bfloat16"}'])
def test_a_damaged_answer_is_measured_again(damage: str, able: list[float], tmp_path: Path) -> None:
    able += [0.4, 0.9]
    choose(wide(), 1000, tmp_path)
    (path,) = tmp_path.glob("precision-*.json")
    path.write_text(damage)
    assert choose(wide(), 1000, tmp_path) == Choice(FLOAT32, choose(wide(), 1000, tmp_path).why, 0.9)
    assert json.loads(path.read_text())["precision"] == FLOAT32


def test_the_probe_times_both_on_this_machine() -> None:
    ratio = half_precision.products_ratio(Counter({(64, 64): 2, (64, 128): 1}), 16, seconds=0.01)
    assert 0 < ratio < 1000


def test_a_compiled_layer_is_the_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(6, 4)
    half_linear.install(layer)
    monkeypatch.setattr(half_linear, "shared_cast", lambda _: pytest.fail("it was called"))
    x = torch.randn(5, 6)
    with numerics(BFLOAT16, "cpu"):
        out = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert torch.equal(out, nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("shape", [(0, 12), (2, 0, 12), (1, 12)])
def test_no_rows_and_one(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(12, 7)
    half_linear.install(layer)
    x = torch.randn(shape, requires_grad=True)
    with numerics(BFLOAT16, "cpu"):
        layer(x).float().sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    assert layer.weight.grad is not None and layer.weight.grad.shape == (7, 12)


def test_it_works_in_inference_mode_and_after_pickling() -> None:
    layer = nn.Sequential(nn.Linear(6, 4))
    half_linear.install(layer)
    x = torch.randn(5, 6)
    with torch.inference_mode(), numerics(BFLOAT16, "cpu"):
        inner = x * 2
        assert torch.equal(layer(inner), nn.functional.linear(inner, layer[0].weight, layer[0].bias))
    revived = pickle.loads(pickle.dumps(layer))
    half_linear.install(revived)
    assert revived[0].forward.__func__ is half_linear._forward and revived[0].forward.__self__ is revived[0]
    twin = copy.deepcopy(layer)
    twin[0].weight.data.zero_()
    twin[0].bias.data.zero_()
    with torch.no_grad(), numerics(BFLOAT16, "cpu"):
        assert not twin(x).any() and layer(x).any()


def test_threads_never_get_each_others_cast() -> None:
    """Wrong values would be silent: equal shapes, other numbers. 2 x 2000 casts beside each other."""
    wrong: list[int] = []

    def work(value: float) -> None:
        for _ in range(2000):
            x = torch.full((8, 8), value)
            for _ in range(2):
                wrong.extend([1] * int(not bool((half_linear.shared_cast(x) == value).all())))

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_machine_with_a_gpu_stays_as_it_was(able: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    able.append(0.1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose(wide(), 1000, tmp_path).precision == FLOAT32  # though the weights are still in the host's memory


def test_a_shared_answer_holds_on_a_processor_without_bf16(
    able: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    able.append(0.4)
    assert choose(wide(), 1000, tmp_path, shared=True).precision == BFLOAT16
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert choose(wide(), 1000, tmp_path, shared=True).precision == BFLOAT16
    assert choose(wide(), 1000, tmp_path).precision == FLOAT32


def test_layers_count_by_all_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large layer is timed on fewer rows than it has; its seconds are of all of them."""
    monkeypatch.setattr(half_precision, "ONE_PRODUCT", 2.0 * 64 * 64 * 8)
    few = half_precision._Timed(64, 64, 32)
    few.seconds = [(1.0, 0.5)]
    assert few.x.shape == (8, 64) and few.median(0) == 4.0 and few.median(1) == 2.0
