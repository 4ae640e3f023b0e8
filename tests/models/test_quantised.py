"""Weights that lie quantised: what can be trained on them, what is refused, and that gradients on a CPU are right."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from words_model import CONFIG, words

from isdaa.errors import UserError
from isdaa.models.attention.layout import Layout
from isdaa.models.loading import load_model, random_model, save_model
from isdaa.models.lora import add_lora
from isdaa.models.packed.forward import prepare
from isdaa.models.quantised import check_trainable, keep_gradients, quantisation

FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
WIDE = CONFIG | {"hidden_size": 64, "intermediate_size": 64, "initializer_range": 0.2}


def lying(settings: dict[str, Any] | None) -> LlamaConfig:
    config = LlamaConfig()
    if settings is not None:
        config.quantization_config = settings
    return config


def test_how_weights_lie_is_said() -> None:
    assert quantisation(lying(None)) is None
    assert quantisation(lying(FOUR)) == "bitsandbytes 4 bits"
    assert quantisation(lying({"quant_method": "bitsandbytes", "load_in_8bit": True})) == "bitsandbytes 8 bits"
    assert quantisation(lying({"quant_method": "gptq", "bits": 4})) == "gptq"


def test_without_an_adapter_nothing_quantised_is_trained() -> None:
    check_trainable("plain", lying(None), adapter=False)
    for settings in (FOUR, {"quant_method": "gptq", "bits": 4}, {"quant_method": "awq"}):
        with pytest.raises(UserError, match=r"^m: its weights are quantised \(.*\) and cannot be trained; give --lora.rank"):
            check_trainable("m", lying(settings), adapter=False)


@pytest.mark.parametrize("method", ["higgs", "spqr", "vptq", "fbgemm_fp8", "mxfp4", "nonesuch", "gptq", "awq"])
def test_what_transformers_cannot_train_or_read_here_is_one_line(method: str) -> None:
    with pytest.raises(UserError, match=rf"^m: its weights are quantised \({method}.*(cannot be read here|cannot train even)"):
        check_trainable("m", lying({"quant_method": method}), adapter=True)


def test_bitsandbytes_takes_an_adapter_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    monkeypatch.setattr(Bnb4BitHfQuantizer, "validate_environment", lambda self, **kwargs: None)
    check_trainable("m", lying(FOUR), adapter=True)

    def missing(self: Any, **kwargs: Any) -> None:
        raise ImportError("bitsandbytes is not there: pip install bitsandbytes")

    monkeypatch.setattr(Bnb4BitHfQuantizer, "validate_environment", missing)
    with pytest.raises(UserError, match=r"cannot be read here .*pip install bitsandbytes"):
        check_trainable("m", lying(FOUR), adapter=True)


def test_a_model_object_keeps_its_gradients_wherever_it_enters() -> None:
    model: Any = random_model(CONFIG, 0)
    layer = model.model.layers[0].self_attn.q_proj
    layer.support_avx512bf16_for_cpu = True  # as bitsandbytes' own layers have it
    prepare(model, probe=False)
    assert layer.support_avx512bf16_for_cpu is False
    other = SimpleNamespace(modules=lambda: iter([nn.Linear(2, 2)]))
    keep_gradients(other)  # type: ignore[arg-type]  # nothing to do, nothing fails


# ---------------------------------------------------------------------------------------------------------------------
# With bitsandbytes itself


@pytest.fixture(scope="module", params=[4, 8])
def lies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights of 4 or 8 bits, made as transformers' documentation makes it."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    home = tmp_path_factory.mktemp("quantised")
    save_model(random_model(WIDE, 0), words(), home / "plain")
    settings: Any = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if request.param == 4 else {"load_in_8bit": True}
    options: Any = {"quantization_config": BitsAndBytesConfig(**settings), "device_map": "cpu", "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(home / "plain", **options).save_pretrained(home / "lies")
    words().save_pretrained(home / "lies")
    return home / "lies"


def test_an_adapter_beside_weights_that_lie_quantised_loads_again_and_merges_on_request(lies: Path, tmp_path: Path) -> None:
    model = add_lora(load_model(lies), rank=2, seed=1).eval()
    row = torch.tensor([[1, 5, 9, 13, 17]])
    torch.manual_seed(0)
    with torch.no_grad():
        before = model(input_ids=row).logits
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape) if parameter.requires_grad else 0
        wanted = model(input_ids=row).logits
    save_model(model, words(), tmp_path / "adapter", merge=False)
    again = load_model(tmp_path / "adapter")
    assert isinstance(again, PeftModel) and torch.allclose(again(input_ids=row).logits, wanted, atol=1e-5)
    plain = load_model(tmp_path / "adapter", dequantize=True)
    assert not isinstance(plain, PeftModel) and not hasattr(plain.config, "quantization_config")
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    rounding = 1e-3 if model.config.quantization_config.load_in_4bit else 0.3  # 8 bits round activations, too
    assert torch.allclose(plain(input_ids=row).logits, wanted, atol=rounding)
    assert float((wanted - before).abs().max()) > 4 * 0.3, "the adapter changes far more"
    save_model(plain, words(), tmp_path / "plain")
    assert torch.equal(load_model(tmp_path / "plain")(input_ids=row).logits, plain(input_ids=row).logits)
    with pytest.raises(UserError, match="its weights are quantised already"):
        load_model(lies, quantization="nf4")


def test_gradients_of_a_model_object_are_those_of_its_plain_weights(lies: Path) -> None:
    """bitsandbytes packs weights of 4 bits in a pass in evaluation mode on some CPUs, and then has no backward pass."""
    theirs: Any = AutoModelForCausalLM.from_pretrained(lies, device_map="cpu", dtype=torch.float32).eval()
    with torch.no_grad():
        theirs(input_ids=torch.tensor([[1, 5, 9]]))  # packed, where this CPU does it
    gradients = []
    for model in (add_lora(theirs, rank=2, seed=1), add_lora(load_model(lies, dequantize=True), rank=2, seed=1)):
        forward = prepare(model, probe=False)
        layout = Layout.of_pairs(*(torch.tensor([n]) for n in (3, 4, 4)))
        ids = torch.arange(4, 15)
        forward(model, ids, None, layout).logps.sum().backward()
        found = [p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None and "lora_B" in name]
        gradients.append(torch.cat(found))
    ours, plain = gradients
    assert float(torch.nn.functional.cosine_similarity(ours, plain, dim=0)) > 0.99
    assert float(ours.norm() / plain.norm()) == pytest.approx(1, abs=0.05)
