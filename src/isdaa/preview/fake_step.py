"""A training step without numbers: the code that trains, run on tensors that have a shape and no content.

What a step needs is not written down here a second time, it is counted while the step's own code runs under PyTorch's fake
tensors: operations by `FlopCounterMode`, memory by following every tensor from its making to its end. So the plan knows
whatever the code does (one gradient for tied embeddings, kept directions of the head, recomputation, adapters) for any
architecture, without its weights and without its memory. Where the code takes another way on a GPU, that one is rehearsed.
The same code with real tensors and random weights is a measurement of speed.

Layers that are alike need not all be rehearsed: of three, the one in the middle stands for all but the first and the last.

Legend: P prompts, R responses, B rows, L tokens of a padded row, V vocabulary.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from isdaa.config import LoraConfig
from isdaa.models.attention.attention_choice import AUTO
from isdaa.models.attention.layout import Layout
from isdaa.models.attention.shared_prefix import block_index
from isdaa.models.device_kind import standing_for
from isdaa.models.hub_access import quiet
from isdaa.models.lora import add_lora
from isdaa.models.packed import half_linear
from isdaa.models.packed.forward import PairForward, disable_dropout, prepare

Kind = Literal["pairs", "sft", "reward"]
# What follows from a layout's lengths. It holds numbers that are needed, so it is made before the rehearsal.
FEW = (2, 3)  # layers, from which the needs of more follow
LET_GO = "let go"  # the moment at which autocast does
_DERIVED = tuple(name for name, value in vars(Layout).items() if isinstance(value, cached_property))


@dataclass(frozen=True)
class Rows:
    """Padded rows, as TRL's trainers make them. rows: B; length: L; scored: positions of a row that are learnt: TRL's head sees
    them alone on a GPU, and all on a CPU."""

    rows: int
    length: int
    scored: int

    @property
    def tokens(self) -> int:
        """B · L."""
        return self.rows * self.length


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when most memory is in use, beside weights and optimiser: gradients, copies of the weights in another
    dtype (autocast's), logits (every matrix with V columns), activations (all else)."""

    gradients: int
    casts: int
    logits: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.gradients + self.casts + self.logits + self.activations


@dataclass(frozen=True)
class Setting:
    """How a model is trained. architecture: a transformers configuration. on_cpu: as on a CPU; otherwise as on a GPU. attention:
    over packed rows (`models.attention.attention_choice`)."""

    kind: Kind
    architecture: Any
    dtype: torch.dtype = torch.float32
    precision: str = "float32"
    lora: LoraConfig | None = None
    checkpointing: bool = False
    on_cpu: bool = True
    attention: str = AUTO


class Stage:
    """A model with the setting of a training stage, on which steps are rehearsed (or, with `real`, done).

    parameters: weights of the model itself; trainable_parameters: those that are trained, an adapter's perhaps; linear: those
    of its linear layers but the head and an adapter, largest_linear: of the largest of these; the `*_bytes` in the model's dtype,
    largest_layer those of the largest module that is gathered at a time where weights are sharded, rest_bytes those of all that
    lies outside of such modules.
    """

    def __init__(self, setting: Setting, real: bool = False) -> None:
        self.setting, self.real = setting, real
        self._mark: Callable[[str], None] = _nowhere
        self._fake = None if real else FakeTensorMode(allow_non_fake_inputs=True)
        with nullcontext() if real else torch.device("meta"), quiet():
            model = base = self._base()
            linear = _linear(base)  # an adapter's are not among them
            if setting.lora is not None and setting.lora.rank:
                model = add_lora(base, **setting.lora.model_dump(exclude={"merge"}), seed=0)
        with self._mode():
            if not real:
                _give_shapes(model)
            self.model: nn.Module = model
            self.forward: PairForward | None = None
            if setting.kind == "pairs":
                self.forward = prepare(model, probe=False, attention=setting.attention)
                disable_dropout(model)
            half_linear.install(model)
            if setting.checkpointing:
                _checkpoint(model)
        adapter = [p for name, p in model.named_parameters() if "lora_" in name]
        self.adapter_bytes = sum(_size(p) for p in adapter)
        self.weight_bytes = _bytes(model) - self.adapter_bytes
        self.parameters = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in adapter)
        self.linear = sum(m.weight.numel() for m in linear)
        self.largest_linear = max((m.weight.numel() for m in linear), default=0)
        self.largest_layer = max((_bytes(child) for child in _repeated(model)), default=self.weight_bytes)
        inside = {id(p) for child in _repeated(model) for p in child.parameters()}
        self.rest_bytes = sum(_size(p) for p in model.parameters() if id(p) not in inside) if inside else 0
        self.vocabulary = int(getattr(base.config.get_text_config(), "vocab_size", 0))
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.trainable_parameters = sum(p.numel() for p in self.trainable)
        self.layers = list(_repeated(model))

    def _base(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        setting = self.setting
        if setting.kind == "reward":
            setting.architecture.num_labels = 1
            setting.architecture.get_text_config().pad_token_id = setting.architecture.pad_token_id = 0
            return AutoModelForSequenceClassification.from_config(setting.architecture, dtype=setting.dtype)
        model = AutoModelForCausalLM.from_config(setting.architecture, dtype=setting.dtype)
        if setting.kind == "sft":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
            self._body = model.base_model
        return model

    @contextmanager
    def _mode(self) -> Iterator[None]:
        with self._fake or nullcontext(), standing_for(None if self.setting.on_cpu else "cuda"):
            yield

    @cached_property
    def few_layers(self) -> tuple[Stage, ...]:
        """The same with few layers; none where layers differ, or are few."""
        sort = [(type(layer), [(name, p.shape) for name, p in layer.named_parameters()]) for layer in self.layers]
        text, count = self.setting.architecture.get_text_config(), len(self.layers)
        lists = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == count}
        alike = all(one == sort[0] for one in sort) and all(v == value[0] for value in lists.values() for v in value)
        if self.real or count <= sum(FEW) or not alike or getattr(text, "num_hidden_layers", None) != count:
            return ()
        stages = []
        for layers in FEW:
            architecture = copy.deepcopy(self.setting.architecture)
            few = architecture.get_text_config()
            few.num_hidden_layers = layers
            for name, value in lists.items():
                setattr(few, name, value[:layers])
            stages.append(Stage(replace(self.setting, architecture=architecture)))
        return tuple(stages) if all(len(one.layers) == n for one, n in zip(stages, FEW, strict=True)) else ()

    def operations(self, batch: Layout | Rows, train: bool = True) -> float:
        """Additions and multiplications of one micro-batch, those that are done again for want of memory included."""
        if self.few_layers:
            few, more = (stage.operations(batch, train) for stage in self.few_layers)
            return few + (more - few) * (len(self.layers) - FEW[0]) / (FEW[1] - FEW[0])
        batch = _fresh(batch)
        with self._mode(), FlopCounterMode(display=False) as flops:
            self.compute(batch, train)
            self._clear(False)
        return float(flops.get_total_flops())

    def memory(self, batch: Layout | Rows, train: bool = True, accumulating: bool = False) -> Memory:
        """What one micro-batch needs. accumulating: gradients of an earlier one are there already."""
        assert not self.real
        few = [stage._spans(batch, train, accumulating) for stage in self.few_layers]
        spans = self._all_layers(*few) if _alike(few, train) else self._spans(batch, train, accumulating)
        before = sum(_size(p) for p in self.trainable) if accumulating else 0
        now, worst = [before, 0, 0, 0], [before, 0, 0, 0]
        for span in spans:
            worst = max(worst, [n + p for n, p in zip(now, span.peak, strict=True)], key=sum)
            now = [n + e for n, e in zip(now, span.end, strict=True)]
        return Memory(*worst)

    def _all_layers(self, fewer: list[_Span], few: list[_Span]) -> list[_Span]:
        """The spans of all layers, from those of few: at its end autocast lets go of its copies of every layer's weights."""
        more = len(self.layers) - FEW[-1]
        found = []
        for span in few:
            if span.name == LET_GO:
                (other,) = (one for one in fewer if one.name == LET_GO)
                span = replace(span, end=[n + more * (n - o) for n, o in zip(span.end, other.end, strict=True)])
            found += [span] * (1 + more * (span.name in ("forward 1", "backward 1")))
        return found

    def _spans(self, batch: Layout | Rows, train: bool, accumulating: bool) -> list[_Span]:
        """The memory of a micro-batch, layer by layer."""
        batch = _fresh(batch)
        with self._mode():
            self._clear(accumulating)
            with _Ledger(self.vocabulary, self.trainable) as ledger, self._marking(ledger):
                self.compute(batch, train)
            ledger.close()
            self._clear(False)
        return ledger.spans

    @contextmanager
    def _marking(self, ledger: _Ledger) -> Iterator[None]:
        """Tell the ledger where a layer's forward and backward pass begin."""

        def watch(name: str, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if state.requires_grad:
                state.register_hook(lambda gradient: ledger.mark(f"backward {name}"))
            if name == str(len(self.layers) - 1):
                ledger.mark("head")

        handles: list[Any] = []
        self._mark = ledger.mark
        for number, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(lambda m, i, name=str(number): ledger.mark(f"forward {name}")))
            handles.append(layer.register_forward_hook(lambda m, i, o, name=str(number): watch(name, o)))
        try:
            yield
        finally:
            self._mark = _nowhere
            for handle in handles:
                handle.remove()

    def _clear(self, accumulating: bool) -> None:
        for parameter in self.trainable:
            parameter.grad = torch.zeros_like(parameter) if accumulating else None

    def compute(self, batch: Layout | Rows, train: bool = True) -> None:
        """One forward pass, and the backward pass of a loss where `train`."""
        self.model.train(train)
        with torch.set_grad_enabled(train):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.setting.precision == "bfloat16"):
                loss = self._pairs(batch, train) if isinstance(batch, Layout) else self._rows(batch)
                self._mark(LET_GO)
            self._mark("loss")
            if train:
                loss.backward()

    def _pairs(self, layout: Layout, train: bool) -> Tensor:
        assert self.forward is not None
        ids = torch.zeros(layout.tokens, dtype=torch.long)
        out = self.forward(self.model, ids, None, layout)
        if len(out.chosen_logps) == 0:
            return out.token_logps.sum()
        return torch.nn.functional.softplus(out.rejected_logps - out.chosen_logps).mean()

    def _rows(self, batch: Rows) -> Tensor:
        ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0  # rows differ in length, and attention with a mask is slower
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.setting.kind == "reward":
            chosen, rejected = self.model(**inputs).logits.squeeze(-1).chunk(2)
            return torch.nn.functional.softplus(rejected - chosen).mean()
        with self._learnt_alone(batch) if not self.setting.on_cpu else nullcontext(ids) as labels:
            return -self.model(**inputs, labels=labels, fused_lm_head=True).log_probs.mean()

    @contextmanager
    def _learnt_alone(self, batch: Rows) -> Iterator[Tensor]:
        """Labels (B, n) for as many positions as are learnt, the only ones that the model's body then hands on to TRL's head.
        On a GPU it picks them itself; how many they are, fake tensors could not know."""
        count = min(batch.length, batch.scored + 1)  # the head leaves out the last one

        def narrow(module: nn.Module, inputs: Any, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state[:, -count:]
            return output

        handle = self._body.register_forward_hook(narrow)
        try:
            yield torch.zeros(batch.rows, count, dtype=torch.long)
        finally:
            handle.remove()


@dataclass
class _Span:
    """Bytes, as `Memory` has them, that a part of a step has at its worst moment, and at its end, beyond those at its start."""

    name: str
    peak: list[int]
    end: list[int]


def _nowhere(name: str) -> None:
    """Where nothing is followed."""


def _alike(few: list[list[_Span]], train: bool) -> bool:
    """Whether steps of few layers fall into the spans that are expected of them."""
    return bool(few) and all(
        [span.name for span in spans]
        == [
            "start",
            *(f"forward {n}" for n in range(layers)),
            "head",
            LET_GO,
            "loss",
            *[f"backward {n}" for n in reversed(range(layers))] * train,
        ]
        for spans, layers in zip(few, FEW, strict=True)
    )


class _Ledger(TorchDispatchMode):
    """Follows the memory of every tensor that is made while it is on. spans: between two of its marks."""

    def __init__(self, vocabulary: int, trainable: list[nn.Parameter]) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.shapes = {p.shape: p.dtype for p in trainable if p.ndim > 1}
        self.live = {"gradients": 0, "casts": 0, "logits": 0, "other": 0}
        self.spans: list[_Span] = []
        self.mark("start")
        self.seen: set[int] = set()
        self.ends: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self._made(tensor)
        return out

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        kind, size = self._kind(tensor), storage.nbytes()
        self.live[kind] += size
        self.ends.append(weakref.finalize(storage, self._gone, key, kind, size))
        beyond = self._beyond()
        if sum(beyond) > sum(self.spans[-1].peak):
            self.spans[-1].peak = beyond

    def _beyond(self) -> list[int]:
        return [now - before for now, before in zip(self.live.values(), self.start, strict=True)]

    def mark(self, name: str) -> None:
        """A new span begins; a recomputed layer begins none."""
        if all(span.name != name for span in self.spans):
            if self.spans:
                self.spans[-1].end = self._beyond()
            self.start = list(self.live.values())
            self.spans.append(_Span(name, [0, 0, 0, 0], [0, 0, 0, 0]))

    def _kind(self, tensor: Tensor) -> str:
        """By its shape: a matrix that is formed like a weight is its gradient, for nothing else is."""
        if tensor.ndim != 2 or not tensor.is_floating_point():
            return "other"
        if tensor.shape in self.shapes:
            return "gradients" if tensor.dtype == self.shapes[tensor.shape] else "casts"
        return "logits" if tensor.shape[-1] == self.vocabulary else "other"

    def _gone(self, key: int, kind: str, size: int) -> None:
        if key in self.seen:
            self.seen.discard(key)
            self.live[kind] -= size

    def close(self) -> None:
        """Follow nothing any more."""
        self.spans[-1].end = self._beyond()
        for end in self.ends:
            end.detach()


def _fresh(batch: Layout | Rows) -> Layout | Rows:
    """The batch with all that its numbers are needed for, made beforehand. A layout keeps what is derived from it: fake
    tensors must not come back in earnest, so it is another one."""
    if isinstance(batch, Layout):
        batch = Layout(batch.prompt_lengths, batch.response_lengths, batch.prompt_of, batch.chosen, batch.rejected)
        for name in _DERIVED:
            getattr(batch, name)
        block_index(batch, torch.device("cpu"))
    return batch


def layout_of(groups: list[tuple[int, list[tuple[int, int]]]]) -> Layout:
    """A packed row: (tokens of a prompt, [(tokens of chosen, of rejected) of each of its pairs]) for P prompts."""
    prompts = torch.tensor([prompt for prompt, _ in groups])
    responses = torch.tensor([length for _, pairs in groups for pair in pairs for length in pair])
    prompt_of = torch.tensor([2 * len(pairs) for _, pairs in groups])
    numbers = torch.arange(len(responses))
    return Layout(prompts, responses, torch.arange(len(groups)).repeat_interleave(prompt_of), numbers[0::2], numbers[1::2])


def _give_shapes(model: nn.Module) -> None:
    """Turn a model on `meta` into one of fake tensors on the CPU: its code then goes the ways that a CPU goes."""
    known: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in known:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            known[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return known[id(tensor)]

    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is not None:
                    place[name] = stand_in(tensor)  # type: ignore[assignment]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(module: nn.Module) -> int:
    return sum(_size(t) for t in {id(t): t for t in (*module.parameters(), *module.buffers())}.values())


def _linear(model: nn.Module) -> list[nn.Linear]:
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]


def _repeated(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def _checkpoint(model: Any) -> None:
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
