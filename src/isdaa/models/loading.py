"""Models, tokenizers and reward models from a folder or the Hub; what cannot be loaded is one clear line.

Transformers starts weights that a folder lacks at random and merely logs it; here that is an error, since every number
computed with such a model would be wrong.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from isdaa.errors import UserError, nearest
from isdaa.models.finite_weights import check_finite
from isdaa.models.hub_access import offline, quiet
from isdaa.models.lora import add_lora, fit_vocabulary
from isdaa.models.memory import check_fits
from isdaa.models.merging import merge as merged
from isdaa.models.merging import settle_ties
from isdaa.models.places import (
    WEIGHTS,
    adapter_config,
    adapter_settings,
    base_named,
    base_of,
    check_adapter_weights,
    has,
    local_folder,
    readable,
    refuse_gguf,
    short,
    tokenizer_places,
)
from isdaa.models.quantised import dequantised, four_bits, keep_gradients, quantisation
from isdaa.models.reward_pooling import pool_by_mask
from isdaa.models.saving import save_model, weights_digest
from isdaa.terminal import working

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [  # one door to models: what goes in, what comes out
    "add_lora",
    "load_model",
    "load_sequence_classifier",
    "load_tokenizer",
    "model_config",
    "random_config",
    "random_model",
    "save_model",
    "torch_dtype",
    "weights_digest",
]

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "auto")


# ---------------------------------------------------------------------------------------------------------------------
# Public: language models, reward models, tokenizers


def load_model(
    path_or_name: str | Path,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    revision: str | None = None,
    merge_adapter: bool = True,
    quantization: str | None = None,
    dequantize: bool = False,
) -> PreTrainedModel:
    """A causal language model from a folder or the Hub, in evaluation mode.

    Args:
        path_or_name: a folder or Hub name. One that holds a PEFT adapter alone gives its base model with the adapter.
        dtype: of the weights in memory: float32, bfloat16, float16, or auto (that of the file).
        attn_implementation: as transformers names it; None: its default.
        trust_remote_code: run code that a Hub repository ships.
        device: None: the CPU.
        revision: of the Hub's repository.
        merge_adapter: whether an adapter is merged into the weights, all of which can then be trained; False: a `PeftModel`.
            Beside quantised weights an adapter is never merged.
        quantization: "nf4" puts the weights of linear layers, but for the head, into 4 bits (Dettmers et al. 2023,
            arXiv 2305.14314), computing in `dtype`; needs bitsandbytes.
        dequantize: whether weights that lie quantised become plain ones, into which an adapter is merged.

    Returns:
        The model, all weights finite and none left at random.

    Raises:
        UserError: nothing is there, a folder is incomplete or damaged, no causal language model, unknown dtype, weights that are
            not finite; an adapter's folder to be quantised, or an adapter that cannot be merged, or computes something else then.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    options |= {"trust_remote_code": trust_remote_code, "revision": revision}
    if quantization is not None:
        options |= four_bits(torch_dtype(dtype) or torch.bfloat16, device)
    with working(f"loading {path_or_name}"):
        return _load(AutoModelForCausalLM, path_or_name, dtype, device, merge_adapter, options, dequantize=dequantize)


def check_complete(path_or_name: str | Path, *, classifier: bool = False, trust_remote_code: bool = False, **how: Any) -> None:
    """Raises UserError where a folder's weights are not those of its configuration's model, as loading it would; takes no memory.

    classifier: of a reward model, with its head. how: `revision`. Adapters and quantised weights are loaded to be checked.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    name, folder = str(path_or_name), local_folder(str(path_or_name))
    options = {"trust_remote_code": trust_remote_code, "revision": how.get("revision")}
    if adapter_config(name, folder, how.get("revision")) is not None or _quantised(name, options) is not None:
        return
    auto_class = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    with suppress(NotImplementedError):  # code that asks weights for their values, which a model without memory has none of
        _load(auto_class, name, "auto", None, True, options | {"device_map": "meta"})


def load_sequence_classifier(
    path_or_name: str | Path,
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    revision: str | None = None,
    new_head: bool = False,
    pad_id: int | None = None,
    by_mask: bool = True,
    seed: int = 0,
    labels: int = 1,
) -> PreTrainedModel:
    """A reward model: a sequence classifier with one output (or `labels`), in evaluation mode.

    `new_head=True` starts a reward model from a language model, with a random head of one output drawn by `seed`.
    `pad_id` is set in the model's configuration, without which transformers takes no batch. `by_mask`: rows are read at the last
    token of their attention mask (`pool_by_mask`), whatever pads them; False: where the model's own class reads them, which for
    decoders is the last token that is not `pad_token_id`.

    Raises:
        UserError: as `load_model`; a model without a trained head; a head with more than one output.
    """
    from transformers import AutoModelForSequenceClassification

    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    options |= {"trust_remote_code": trust_remote_code, "revision": revision}
    if new_head:
        options["num_labels"] = 1
    with _seeded(seed), working(f"loading {path_or_name}"):
        model = _load(AutoModelForSequenceClassification, path_or_name, dtype, device, True, options, new_head)
    if model.config.num_labels != labels:
        raise UserError(f"{path_or_name}: a classifier of {model.config.num_labels} labels; a reward model has one output")
    if pad_id is not None:
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad_id
    if by_mask:
        pool_by_mask(model)
    return model


def load_tokenizer(
    path_or_name: str | Path,
    *,
    require_eos: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or Hub name.

    Args:
        path_or_name: a folder without a tokenizer gives that of the run's folder around a checkpoint, or of an adapter's
            base model.
        require_eos: whether a tokenizer without EOS is refused.
        trust_remote_code: run code that a Hub repository ships.
        revision: of the Hub's repository.

    Returns:
        The tokenizer. Where it has no padding token EOS serves: masks decide what is padding.

    Raises:
        UserError: nothing is there, no tokenizer in it, or no EOS token while `require_eos`.
    """
    from transformers import AutoTokenizer

    name = str(path_or_name)
    folder = local_folder(name)
    if folder is not None:
        place, at = next(tokenizer_places(name, revision), (None, None))
        if place is None:
            refuse_gguf(folder)
            raise UserError(f"{name}: no tokenizer in this folder (tokenizer.json, tokenizer_config.json); name one")
        if place != name:
            with base_named(adapter_config(name, folder, revision), name):
                return load_tokenizer(place, require_eos=require_eos, trust_remote_code=trust_remote_code, revision=at)
    try:
        with quiet(downloads=folder is None):
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder or name), trust_remote_code=trust_remote_code, revision=revision, **offline(folder)
            )
            tokenizer("a")  # what is wrong with its files may show no sooner
    except Exception as error:
        raise readable(error, name, folder, "tokenizer") from error
    if tokenizer.eos_token_id is None and require_eos:
        raise UserError(
            f"{name}: the tokenizer has no EOS token, so no response could end; "
            'set "eos_token" in its tokenizer_config.json to the token that ends a text'
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def random_model(config: dict[str, Any], seed: int, *, dtype: str = "float32") -> PreTrainedModel:
    """A new causal language model with random weights: `config` is a `model_type` and arguments of its configuration.

    The same config and seed give the same weights; the global random state is left alone.

    Raises:
        UserError: unknown model_type or key, values that the architecture refuses, a model that does not fit into memory, or that
            computes nothing for a token; weights that are not finite.
    """
    from transformers import AutoModelForCausalLM

    full, wanted = random_config(config), torch_dtype(dtype) or torch.float32
    try:
        check_fits(full, wanted)
        with _seeded(seed), quiet():
            model = AutoModelForCausalLM.from_config(full, dtype=wanted)
        _check_forward(model.eval())
    except UserError:
        raise
    except Exception as error:
        raise _no_model(config, error) from error
    check_finite(f"model_type {config['model_type']}", model, "its config makes them so")
    return model


def _check_forward(model: Any) -> None:
    """Raises what the model raises of two tokens: values that fit no weight's shape, such as heads that do not divide."""
    if not (torch.cuda.is_available() or getattr(model, "is_quantized", False)):  # it will compute where it is
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 0]]), attention_mask=torch.tensor([[1, 1]]))


def random_config(config: dict[str, Any]) -> PretrainedConfig:
    """The configuration of `random_model`. Raises UserError as it does."""
    from transformers import CONFIG_MAPPING, AutoConfig

    values = dict(config)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise UserError('the config of a random model names no model_type, such as "llama"')
    if model_type not in CONFIG_MAPPING:
        raise UserError(f'model_type "{model_type}": transformers knows none{nearest(model_type, CONFIG_MAPPING)}')
    try:
        defaults = AutoConfig.for_model(model_type)
        for key in values:
            if not hasattr(defaults, key):
                known = [name for name in defaults.to_dict() if not name.startswith("_")]
                raise UserError(f'model_type {model_type}: unknown key "{key}"{nearest(key, known)}')
        return AutoConfig.for_model(model_type, **values)
    except UserError:
        raise
    except Exception as error:
        raise _no_model(config, error) from error


def _no_model(config: dict[str, Any], error: BaseException) -> UserError:
    return UserError(f"model_type {config['model_type']}: no model can be made of this config ({short(error)})")


def model_config(path_or_name: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> PretrainedConfig:
    """The configuration of the model of a folder or Hub name, an adapter's being its base model's. No weights are needed.

    Raises:
        UserError: nothing is there, or no configuration in it.
    """
    from transformers import AutoConfig

    name = str(path_or_name)
    folder = local_folder(name)
    adapter = adapter_config(name, folder, revision)
    if adapter is not None:
        inner = adapter_settings(adapter).get("revision")
        with base_named(adapter, name):
            return model_config(base_of(adapter, name), trust_remote_code=trust_remote_code, revision=inner)
    if folder is not None and not (folder / "config.json").is_file():
        _check_folder(name, folder)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code} | ({} if folder else {"revision": revision})
    try:
        with quiet(downloads=folder is None):
            return AutoConfig.from_pretrained(str(folder or name), **options, **offline(folder))
    except Exception as error:
        raise readable(error, name, folder, "configuration") from error


def torch_dtype(name: str) -> torch.dtype | None:
    """The dtype of a name in `DTYPES`; None for "auto"."""
    if name not in DTYPES:
        raise UserError(f'dtype "{name}": one of {", ".join(DTYPES)}{nearest(str(name), DTYPES)}')
    return None if name == "auto" else getattr(torch, name)


# ---------------------------------------------------------------------------------------------------------------------
# One way to load, and what can go wrong


def _load(
    auto_class: Any,
    path_or_name: str | Path,
    dtype: str,
    device: str | torch.device | None,
    merge_adapter: bool,
    options: dict[str, Any],
    new_head: bool = False,
    dequantize: bool = False,
) -> Any:
    wanted = torch_dtype(dtype) or "auto"
    name = str(path_or_name)
    folder = local_folder(name)
    adapter = adapter_config(name, folder, options["revision"])
    if adapter is not None and "quantization_config" in options:
        raise UserError(f"{name}: an adapter cannot be loaded on 4-bit weights; merge it into its base model first")
    if adapter is not None:
        settings = adapter_settings(adapter)
        inner = options | {"revision": settings.get("revision")}
        classifier = auto_class.__name__ == "AutoModelForSequenceClassification"
        if classifier:
            if settings.get("task_type") != "SEQ_CLS" and not new_head:
                raise UserError(f"{name}: no trained reward head; it is a language model's adapter, not a reward model's")
            inner["num_labels"] = 1  # the head comes with the adapter
        base_device = device if _quantised(base_of(adapter, name), inner) and not dequantize else None
        with base_named(adapter, name):
            base = _load(auto_class, base_of(adapter, name), dtype, base_device, True, inner, classifier, dequantize)
        model = _with_adapter(base, name, folder, options["revision"], merge_adapter)
    else:
        if folder is not None:
            _check_folder(name, folder)
        lies = _quantised(name, options)
        if lies is not None and "quantization_config" in options:
            raise UserError(f"{name}: its weights are quantised already ({lies}); leave --model.quantization out")
        if lies is not None:
            options = options | {"device_map": {"": device or "cpu"}}
        options = {key: value for key, value in options.items() if not (key == "revision" and folder)}
        if not options["trust_remote_code"]:
            _check_kernels(name, options.get("revision"))
        try:
            with quiet(downloads=folder is None):
                model, report = auto_class.from_pretrained(
                    str(folder or name),
                    dtype=wanted,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # the report names them, and is checked
                    **options,
                    **offline(folder),
                )
        except Exception as error:
            if isinstance(error, NotImplementedError) and options.get("device_map") == "meta":
                raise
            raise readable(error, name, folder, "model") from error
        _check_report(name, report, type(model).__name__, new_head)
        if lies is not None and dequantize:
            model = dequantised(name, model, wanted)
        if options.get("device_map") == "meta":
            return model
        try:
            _check_forward(model.eval())
        except Exception as error:
            raise UserError(f"{name}: its config.json is wrong: the model cannot compute two tokens ({short(error)})") from error
    model = model.eval()
    settle_ties(model)
    if getattr(model, "is_quantized", False):
        keep_gradients(model)
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line a layer: 8 bits compute in fp16
    elif device is not None:
        model = model.to(device)
    check_finite(name, model)  # where it is fastest: on its device
    return model


def _quantised(name: str, options: dict[str, Any]) -> str | None:
    """How a folder's weights lie there, in words; None: as plain numbers, or it has no configuration, which loading it says."""
    try:
        config = model_config(name, trust_remote_code=options["trust_remote_code"], revision=options.get("revision"))
    except UserError:
        return None
    return quantisation(config)


def _check_kernels(name: str, revision: str | None) -> None:
    """Raises UserError where a configuration names a kernel of the Hub, which is code, by which transformers would compute."""
    try:
        config = model_config(name, revision=revision)
    except UserError:
        return  # the model will not load either, and says why
    for key, value in _nested(config.to_dict() | vars(config)):
        if "implementation" in str(key) and isinstance(value, str) and "/" in value:
            entry = key.removesuffix("_internal").strip("_")
            raise UserError(
                f"{name}: its config.json asks for {value!r}, a kernel of the Hub, which is code; remove {entry} from it, or set "
                "trust_remote_code if you trust its authors"
            )


def _nested(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every key of nested dicts with its value."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key, inner
        yield from _nested(inner)


def _with_adapter(base: Any, name: str, folder: Path | None, revision: str | None, merge: bool) -> Any:
    from peft import PeftConfig, PeftModel
    from peft.utils import load_peft_weights

    check_adapter_weights(name, folder)
    merge = merge and not getattr(base, "is_quantized", False)  # which would be quantised anew, with a loss
    try:
        with quiet(downloads=folder is None):
            weights = load_peft_weights(str(folder or name), device="cpu", revision=revision)
            fit_vocabulary(base, weights, name)
            config: Any = PeftConfig.from_pretrained(str(folder or name), revision=revision)
            if base.get_output_embeddings() is None and config.task_type == "CAUSAL_LM":  # the start of a reward model
                config.task_type = None
                here = {key.rpartition(".")[2] for key, _ in base.named_modules()}
                config.modules_to_save = [key for key in config.modules_to_save or () if key in here] or None
            with warnings.catch_warnings():  # what is not in the file would be as if it had never been trained
                warnings.filterwarnings("error", "Found missing adapter keys")
                model: Any = PeftModel.from_pretrained(base, str(folder or name), revision=revision, config=config)
            check_finite(name, model)  # the base has been asked already: what is found here is the adapter's
            if not merge:
                return model
            if not hasattr(model.base_model, "merge_and_unload"):
                kind = model.peft_config["default"].peft_type
                raise UserError(
                    f"{name}: an adapter of type {getattr(kind, 'value', kind)} cannot be merged into a model's weights"
                )
            model = merged(model, name, "load it unmerged (merge_adapter=False), or merge it where it was made")
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: the adapter does not fit its base model or is damaged ({short(error)})") from error
    model.name_or_path = model.config._name_or_path = str(folder or name)  # it is no longer what lies at its base's path
    return model.requires_grad_(True)  # as any model that is loaded; peft has frozen the base's weights


def _check_folder(name: str, folder: Path) -> None:
    refuse_gguf(folder)
    if not (folder / "config.json").is_file():
        inside = sorted(p.parent for p in folder.glob("*/config.json"))
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise UserError(f"{name}: no config.json in this folder, so it holds no model{hint}")
    if not has(folder, *WEIGHTS):
        raise UserError(f"{name}: config.json, but no weights (*.safetensors) in this folder")


def _check_report(name: str, report: dict[str, Any], kind: str, new_head: bool) -> None:
    """Weights that the file lacks, or has in another shape, would be random."""

    def is_head(key: str) -> bool:
        return key.split(".")[0] in ("score", "classifier")

    mismatched = sorted(entry for entry in report["mismatched_keys"] if not (new_head and is_head(entry[0])))
    if mismatched:
        key, found, expected = mismatched[0]
        raise UserError(
            f"{name}: {len(mismatched)} weights do not have the shape that config.json says "
            f"({key}: {_shape(found)}, not {_shape(expected)})"
        )
    missing = sorted(key for key in report["missing_keys"] if not (new_head and is_head(key)))
    if missing and all(map(is_head, missing)):
        raise UserError(f"{name}: no trained reward head ({missing[0]}); it is a language model, not a reward model")
    if missing:
        raise UserError(f"{name}: {len(missing)} weights of {kind} are not in the folder ({missing[0]}, …): is it complete?")
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        logger.warning("%s: %d weights in the file are not used by %s (%s, …)", name, len(unexpected), kind, unexpected[0])


def _shape(shape: Any) -> str:
    return " × ".join(map(str, shape))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
