"""What vLLM needs to find on disk, as a list of what is wrong with a folder. vLLM itself is not installed here.

Read from vLLM's sources (github.com/vllm-project/vllm; the commit is that of the file as it was read):

- `vllm/model_executor/model_loader/default_loader.py` (00b5ad07): weights are `*.safetensors` first, `*.bin` and `*.pt` only
  where there are none; of several files those named in `model.safetensors.index.json` count.
- `vllm/model_executor/models/llama.py` (0035bdf2): tensors are looked up by the architecture's own names, so that a
  `base_model.`, `module.` or `_orig_mod.` in front, or a tensor too many, is a KeyError.
- `vllm/config/model.py`, `vllm/transformers_utils/config.py`: config.json with `architectures`; `generation_config.json` gives
  the default sampling parameters and, with the tokenizer, the tokens that end a response.
- `vllm/lora/peft_helper.py` (02143692, and docs.vllm.ai/en/latest/api/vllm/lora/peft_helper/): of adapter_config.json `r`,
  `lora_alpha`, `target_modules` are required; `bias` must be none, `modules_to_save` empty, `use_dora` false; `use_rslora` is
  read; all other keys are ignored, so that those which change the result must be at rest.
- `vllm/lora/lora_model.py` (0306474e), `vllm/lora/utils.py` (001e63a8): `adapter_model.safetensors` with names
  `base_model.model.<module>.lora_A.weight` and `lora_B`, of linear layers.
- `vllm/config/lora.py` (01230b40): the rank is at most `max_lora_rank`, one of `RANKS`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Keys of peft that vLLM does not read and that change what an adapter computes, with their values at rest.
AT_REST = {
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "use_qalora": (False, None),
    "megatron_config": (None,),
}
LINEAR = re.compile(
    r"base_model\.model\.(?P<module>.+\.(?:[qkvo]_proj|gate_proj|up_proj|down_proj))\.lora_(?P<side>[AB])\.weight"
)


def model_defects(folder: Path, turn_end: str | None = None) -> list[str]:
    """What vLLM would stumble over in a model's folder. turn_end: the token that ends an assistant's turn in its template."""
    missing = [name for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
               if not (folder / name).is_file()]  # fmt: skip
    if missing:
        return [f"{name} is missing" for name in missing]
    found = []
    config = json.loads((folder / "config.json").read_text())
    if not config.get("architectures"):
        found.append("config.json names no architecture")
    if "auto_map" in config:
        found.append("config.json asks for remote code")
    if "quantization_config" in config:
        found.append("the weights are quantised")
    found += _weights(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > config["vocab_size"]:
        found.append("the tokenizer has more tokens than the model")
    generation = GenerationConfig.from_pretrained(folder)
    ends = {generation.eos_token_id} if isinstance(generation.eos_token_id, int) else set(generation.eos_token_id or ())
    wanted = {tokenizer.eos_token_id} | ({tokenizer.convert_tokens_to_ids(turn_end)} if turn_end else set())
    if not wanted <= ends:
        found.append(f"generation stops at {sorted(ends)}, not at all of {sorted(wanted)}")
    if turn_end and not tokenizer.chat_template:
        found.append("there is no chat template")
    return found


def _weights(folder: Path) -> list[str]:
    files = {path.name for path in folder.glob("*.safetensors")}
    index = folder / "model.safetensors.index.json"
    found = []
    if index.is_file():
        named: dict[str, str] = json.loads(index.read_text())["weight_map"]
        if set(named.values()) != files:
            found.append("the index names other files than there are")
    elif files != {"model.safetensors"}:
        found.append(f"expected model.safetensors or an index, found {sorted(files)}")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        found.append("pickles lie beside the weights")
    stored: dict[str, tuple[int, ...]] = {}
    for name in sorted(files):
        with safe_open(folder / name, framework="pt") as file:
            stored |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            if index.is_file() and any(named.get(key) != name for key in file.keys()):  # noqa: SIM118
                found.append(f"the index says nothing, or something else, of a tensor in {name}")
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = set(getattr(plain, "all_tied_weights_keys", None) or ())
    expected = {key: tuple(value.shape) for key, value in plain.state_dict().items()}
    if stored.keys() - expected.keys():
        found.append(f"tensors that the architecture does not have: {sorted(stored.keys() - expected.keys())[:3]}")
    if expected.keys() - stored.keys() - tied:
        found.append(f"tensors are missing: {sorted(expected.keys() - stored.keys() - tied)[:3]}")
    if any(stored[key] != expected[key] for key in stored.keys() & expected.keys()):
        found.append("tensors of another shape")
    return found


def adapter_defects(folder: Path, base: Path) -> list[str]:
    """What vLLM would stumble over in an adapter's folder, for the base model in `base`."""
    missing = [name for name in ("adapter_config.json", "adapter_model.safetensors") if not (folder / name).is_file()]
    if missing:
        return [f"{name} is missing" for name in missing]
    config = json.loads((folder / "adapter_config.json").read_text())
    found = [f"adapter_config.json has no {name}" for name in ("r", "lora_alpha", "target_modules") if not config.get(name)]
    if config.get("peft_type") != "LORA":
        found.append(f"an adapter of type {config.get('peft_type')}")
    if config.get("r", 0) > max(RANKS):
        found.append(f"rank {config['r']} is above vLLM's highest")
    if config.get("bias") != "none" or config.get("modules_to_save") or config.get("use_dora"):
        found.append("bias, modules_to_save or use_dora is set")
    found += [f"{key} is set, and vLLM ignores it" for key, rest in AT_REST.items() if config.get(key) not in rest]
    shapes = {
        k: tuple(v.shape) for k, v in AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).state_dict().items()
    }
    sides: dict[str, set[str]] = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            match = LINEAR.fullmatch(key)
            if match is None or f"{match['module']}.weight" not in shapes:
                found.append(f"{key} belongs to no linear layer of the base model")
                continue
            outputs, inputs = shapes[f"{match['module']}.weight"]
            wanted = (config["r"], inputs) if match["side"] == "A" else (outputs, config["r"])
            if tuple(file.get_slice(key).get_shape()) != wanted:
                found.append(f"{key} has another shape than {wanted}")
            sides.setdefault(match["module"], set()).add(match["side"])
    found += [f"{module} has one side of its adapter alone" for module, has in sides.items() if has != {"A", "B"}]
    return found if sides else [*found, "the adapter holds no tensor"]
