"""Hidden states of rows from a model's parts, against the packed forward of `prepare`."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from test_lean_decoding import KINDS, tiny

from isdaa.models.attention.layout import Layout
from isdaa.models.loading import add_lora
from isdaa.models.packed import fused_layers
from isdaa.models.packed.forward import prepare
from isdaa.models.packed.plain_rows import kl_pass
from isdaa.models.sampling import lean as lean_module
from isdaa.models.sampling.kl_from_samples import kl_from_states
from isdaa.models.sampling.lean import lean_parts
from isdaa.models.sampling.lean_rows import lean_reader, lean_states

Row = tuple[list[int], list[int]]


def make_rows(lengths: list[tuple[int, int]]) -> list[Row]:
    rng = random.Random(0)
    return [([rng.randrange(40) for _ in range(p)], [rng.randrange(40) for _ in range(r)]) for p, r in lengths]


def packed_states(forward: Any, rows: list[Row]) -> torch.Tensor:
    lengths = [torch.tensor([len(row[part]) for row in rows]) for part in (0, 1)]
    ids = torch.tensor([token for row in rows for part in row for token in part])
    return forward.predicting_states(forward.model, ids, Layout.of_rows(*lengths))[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("short", [128, 2])  # scores by products, or by the fused kernel
@torch.no_grad()
def test_states_are_the_models_own(kind: str, short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean_module, "_SHORT", short)
    forward = prepare(tiny(kind))
    lean = lean_parts(forward.model)
    assert lean is not None
    for lengths in ([(7, 5), (1, 9), (4, 1), (3, 0), (9, 9), (2, 4)], [(1, 1)], [(5, 8)]):
        rows = make_rows(lengths)
        torch.testing.assert_close(lean_states(lean, rows), packed_states(forward, rows), rtol=1e-4, atol=1e-4)
    assert lean_states(lean, make_rows([(3, 0)])).shape == (0, 16)


def test_isdaas_own_forwards_are_no_strangers() -> None:
    model = tiny()
    prepare(model)
    assert fused_layers.install(model) > 0 and lean_parts(model) is not None


@torch.no_grad()
def test_rows_are_independent_of_their_batch() -> None:
    lean = lean_parts(tiny())
    assert lean is not None
    rows = make_rows([(7, 5), (1, 9), (4, 1), (20, 20)])
    alone = torch.cat([lean_states(lean, [row]) for row in rows])
    torch.testing.assert_close(lean_states(lean, rows), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_kl_is_that_of_the_packed_forward(adapted: bool) -> None:
    rows = make_rows([(3 + i % 5, 1 + i % 7) for i in range(20)] + [(2, 0)])
    policy, model = prepare(tiny("qwen3")), tiny()
    if adapted:
        model = add_lora(model, rank=2)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    reference = prepare(model.train())
    with torch.no_grad():
        states = [packed_states(policy, [row]) for row in rows]
    expected = kl_pass(policy, reference, rows)
    found = kl_from_states(policy, reference, rows, states, batch_tokens=40)
    for name in ("policy_logps", "reference_logps", "kl"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)
    assert found.kl[-1] == 0 and model.training


def test_the_model_is_not_run_where_its_parts_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = prepare(tiny("qwen3")), prepare(tiny())
    rows = make_rows([(3, 4), (2, 2)])
    with torch.no_grad():
        states = [packed_states(policy, [row]) for row in rows]
    expected = kl_from_states(policy, reference, rows, states)
    reference.predicting_states = None  # type: ignore[assignment,method-assign]
    torch.testing.assert_close(kl_from_states(policy, reference, rows, states).kl, expected.kl)


def test_other_states_are_noticed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = prepare(tiny())
    kind = type(forward.model.model.layers[1].mlp)  # type: ignore[union-attr,index]
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x) * 1.1)
    assert lean_reader(forward, make_rows([(3, 4), (2, 2)])) is None
    assert "not those of its architecture" in caplog.text
    assert lean_reader(prepare(tiny("mistral", sliding_window=4)), make_rows([(3, 4)])) is None
    assert caplog.text.count("architecture") == 1
