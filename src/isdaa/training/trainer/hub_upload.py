"""What goes to the Hub where the Trainer's own options ask for it (`push_to_hub`, `hub_model_id`, `hub_strategy`, …).

A model with its card: no optimiser states, and no `training_args.bin`, in which transformers pickles the token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from isdaa.files import link_or_copy
from isdaa.manifest import MANIFEST, write_manifest
from isdaa.ownership import SEAL
from isdaa.record import NAME as RECORD
from isdaa.record import without_places

PUSHED = ".pushing-"
# Files of a model, as transformers, peft and this project write them.
MODEL_FILES = (
    *("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json"),
    *("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_templates/*", "README.md", RECORD),
)
NEVER = ("training_args.bin",)
WITH_PATHS = (RECORD, "adapter_config.json")


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that make a model, relative to it, in their order."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(f for f in files if any(fnmatch(f.as_posix(), p) and ("/" in p) == (len(f.parts) > 1) for p in MODEL_FILES))


def all_files(folder: Path) -> list[Path]:
    """All files of a checkpoint that may leave this machine, relative to it, in their order."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.name not in NEVER)


def push_checkpoint(trainer: Any, folder: Path) -> None:
    """Start the upload of a checkpoint as `hub_strategy` says; without `hub_always_push`, not while another is on its way."""
    strategy = trainer.args.hub_strategy
    busy = trainer.push_in_progress is not None and not trainer.push_in_progress.is_done()
    if strategy == HubStrategy.END or (busy and not trainer.args.hub_always_push):
        return
    trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
    message = f"Training in progress, step {trainer.state.global_step}"
    jobs = [upload(trainer, folder, model_files(folder), message)]
    if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        inside = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else folder.name
        jobs.append(upload(trainer, folder, all_files(folder), f"{message}, checkpoint", inside=inside))
    if busy:
        trainer.push_in_progress.jobs.extend(jobs)
    else:
        trainer.push_in_progress = PushInProgress(jobs)  # type: ignore[arg-type]


def upload(
    trainer: Any,
    folder: Path,
    files: Iterable[Path],
    message: str,
    *,
    inside: str | None = None,
    blocking: bool = False,
    token: str | None = None,
    revision: str | None = None,
) -> Any:
    """Upload some files of a folder to the trainer's repository, below `inside`. A Future, or the commit where `blocking`.

    They are first linked aside: a checkpoint that is removed, or a folder that is written again, while they travel changes
    nothing. Of absolute paths in records the last part is kept, as in cards.
    """
    from huggingface_hub import HfApi

    args = trainer.args
    aside = Path(args.output_dir) / f"{PUSHED}{len(list(Path(args.output_dir).glob(PUSHED + '*')))}-{folder.name}"
    for file in files:
        (aside / file).parent.mkdir(parents=True, exist_ok=True)
        if file.name in WITH_PATHS:
            (aside / file).write_text(_without_places((folder / file).read_text(encoding="utf-8")), encoding="utf-8")
        elif file.name != MANIFEST:
            link_or_copy(folder / file, aside / file)
    if (aside / "trainer_state.json").is_file():
        write_manifest(aside, own=False)  # whoever fetches a whole checkpoint can go on from it
    job = HfApi(library_name="isdaa").upload_folder(
        repo_id=trainer.hub_model_id,
        folder_path=aside,
        path_in_repo=inside,
        commit_message=message,
        token=token if token is not None else args.hub_token,
        revision=revision if revision is not None else args.hub_revision,
        run_as_future=True,
    )
    job.add_done_callback(lambda _: shutil.rmtree(aside, ignore_errors=True))
    return job.result() if blocking else job


def _without_places(text: str) -> str:
    """A record without the places and the digest of this user, which mean nothing elsewhere."""
    content = json.loads(text)
    content.pop(SEAL, None)
    return json.dumps(without_places(content), indent=2, ensure_ascii=False) + "\n"
