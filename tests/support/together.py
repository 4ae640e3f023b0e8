"""What several processes do together. Started by torchrun, in a folder with the configurations that a test wrote:

python -m torch.distributed.run --standalone --nproc_per_node 2 together.py
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import torch  # noqa: E402

from isdaa import distributed  # noqa: E402
from isdaa.errors import UserError  # noqa: E402


def main() -> None:
    distributed.start()
    assert torch.distributed.get_world_size() == 2
    found: dict[str, Any] = {"primitives": primitives()}
    for name in ("two", "lora", "resumed", "supervised", "adapter", "few", "pair"):
        train(f"{name}.yaml")
    for output in ("evaluation-two", "evaluation-resumed"):
        evaluate(str(Path("one").absolute()), output)
    for output in ("benchmark-two", "benchmark-resumed"):
        assert benchmark(Path("one").absolute(), Path(output).absolute()) == 0
    trainer()
    found["fully_shard"] = fully_shard()
    found["not finite"] = [message(lambda name=name: train(name)) for name in ("broken.yaml", "broken-supervised.yaml")]
    found["bad input"] = told("train", "--config", "two.yaml", "--output_dir", "two", "--objective.beta", "3")
    found["fault"] = fault()
    as_on_gpus()
    found["not finite"].append(message(lambda: train("fsdp2-broken.yaml")))
    for name in ("fsdp2", "fsdp2-lora", "fsdp2-supervised"):
        train(f"{name}.yaml")
    stop_and_go_on("fsdp2-stopped.yaml")
    Path(f"rank-{distributed.rank()}.json").write_text(json.dumps(found))
    distributed.finish()


def primitives() -> dict[str, Any]:
    rank = distributed.rank()

    def squares(items: Sequence[int]) -> list[int]:
        return [item * item for item in items]

    def lame(items: Sequence[int]) -> list[int]:
        if 3 in items:
            raise UserError("three is not to be had")
        return squares(items)

    def failing() -> None:
        raise UserError("the main process has failed")

    def refused(items: Sequence[int]) -> list[int]:
        raise PermissionError(13, "Permission denied", "a file")

    return {
        "dealt": distributed.dealt(range(7), squares),
        "few": distributed.dealt([5], squares),
        "once": distributed.once(lambda: f"by {rank}, alone among {distributed.world_size()}"),
        "everyones": distributed.everyones(lambda: rank),
        "errors": [message(lambda: distributed.dealt(range(7), lame)), message(lambda: distributed.once(failing))],
        "refused": [
            message(lambda: distributed.dealt(range(7), refused)),
            message(lambda: distributed.once(lambda: refused([]))),
        ],
        "after": distributed.dealt(range(2), squares),
    }


def message(call: Any) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return "no error"


def train(config: str) -> None:
    from isdaa.config import load_config
    from isdaa.training.run_stages import run

    run(load_config(config, {"output_dir": Path(config).stem}))


def stop_and_go_on(config: str) -> None:
    """Alignment that ends behind its second checkpoint, and is started again."""
    from isdaa.training.trainer.whole_checkpoints import WholeCheckpoints

    save: Any = WholeCheckpoints._save_checkpoint

    def save_and_stop(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        if self.state.global_step == 4:
            raise KeyboardInterrupt

    kind: Any = WholeCheckpoints
    kind._save_checkpoint = save_and_stop
    try:
        train(config)
    except KeyboardInterrupt:
        kind._save_checkpoint = save
        train(config)
    else:
        raise AssertionError("it was not stopped")


def evaluate(model: str, output: str) -> None:
    from isdaa.evaluation.checkpoints.what_to_evaluate import requests
    from isdaa.evaluation.evaluate import evaluate_request

    evaluate_request(requests([model], {"output_dir": output}))


def benchmark(run: Path, output: Path) -> int:
    """Summaries of a run's model beside its reference's, judged by the world. Gives the command's status."""
    from isdaa.cli import main

    settings = ["--evaluation.batch_size", "4", "--evaluation.bootstrap", "100", "--limit", "11", "--max_new_tokens", "12"]
    words = ["--questions", "world:small", "--judge", "gold", *settings]
    with patch("isdaa.distributed.finish"):  # it ends what the program that calls goes on with
        return main(["benchmark", "tldr", "--model_path", str(run), "--output", str(output), *words])


def told(*command: str) -> tuple[int, list[str]]:
    """A command's exit status, and what isdaa says on this process's stderr."""
    from isdaa.cli import main

    start = {"TORCHELASTIC_RESTART_COUNT": command[0]}  # of all processes of a start one says what is wrong, once
    with patch.dict(os.environ, start), patch("isdaa.distributed.finish"), redirect_stderr(StringIO()) as stderr:
        status = main([*command])
    return status, [line for line in stderr.getvalue().splitlines() if line.startswith(("isdaa: ", "Traceback"))]


def fault() -> tuple[int, list[str]]:
    """Of the second process, in work that both do."""
    from isdaa.cli import methods

    def broken() -> None:
        if distributed.rank() == 1:
            raise KeyError("\x1b[31m")

    with patch("tempfile.tempdir", str(Path.cwd())), patch.object(methods, "run", lambda _: distributed.everyones(broken)):
        return told("methods")


def trainer() -> None:
    """The trainer alone, its weights shuffled over the global batch, in float64."""
    from training_helpers import shuffled_run

    shuffled_run(Path("trainer-two"), batch_size=2, gradient_accumulation_steps=2)


def fully_shard() -> dict[str, list[float]]:
    """Largest relative differences between a model in shards and the same one whole: logps of this process's own pairs,
    and gradients of the mean loss over both processes."""
    from forward_helpers import lengths_of, loss_of, packed, tiny
    from torch.distributed.fsdp import fully_shard as shard

    from isdaa.models.packed.forward import prepare

    differences = {}
    for name in ("llama", "llama, head apart", "gemma2", "gemma2, head apart"):  # gemma2's embeddings are tied
        model = tiny(name.split(",")[0])
        whole = copy.deepcopy(model)
        results = []
        for each in (whole, model):
            forward = prepare(each)
            assert forward.mode == "shared_prefix"
            if each is model:
                decoder: Any = each.model
                for layer in decoder.layers:
                    shard(layer)
                if "apart" in name:  # as accelerate does it: a group whose last module's own forward is never called
                    tied = decoder.embed_tokens.weight is each.lm_head.weight
                    tail = [decoder.norm, *([decoder.embed_tokens] if tied else []), each.lm_head]
                    shard(tail, reshard_after_forward=False)
                shard(each)
            ids, layout = packed(lengths_of(3 + distributed.rank()))
            out = forward(each, ids, None, layout)
            loss_of(out.chosen_logps, out.rejected_logps).backward()
            results.append([out.chosen_logps, out.rejected_logps, *(p.grad for p in each.parameters())])
        logps = max(relative(a, b) for a, b in zip(results[1][:2], results[0][:2], strict=True))
        for gradient in results[0][2:]:
            torch.distributed.all_reduce(gradient)
            gradient /= 2
        gradients = max(relative(a.full_tensor(), b) for a, b in zip(results[1][2:], results[0][2:], strict=True))
        differences[name] = [logps, gradients]
    return differences


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.detach() - other.detach()).abs().max() / other.detach().abs().max().clamp(min=1e-12))


def as_on_gpus() -> None:
    """accelerate shards models on GPUs alone. From here on it takes these two CPU processes for two GPUs."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    found = accelerate_environment(HERE.parents[1] / "configs" / "accelerate" / "fsdp2.yaml")
    os.environ |= {name: value for name, value in found.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    kind: Any = PartialState
    kind._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def accelerate_environment(file: Path) -> dict[str, str]:
    """What `accelerate launch --config_file FILE` tells the processes that it starts."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(file), "scripts/train.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if not arguments.use_deepspeed:
        return prepare_multi_gpu_env(arguments)
    arguments.deepspeed_fields_from_accelerate_config = list(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(arguments)[1]


if __name__ == "__main__":
    main()
