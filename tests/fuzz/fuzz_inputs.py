"""Small valid inputs that trials begin with: rows in every format, a configuration, a finished run with what followed it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import yaml

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}
STEPS = {"batch_size": 4, "warmup_steps": 0, "learning_rate": 1e-3}
RUN: dict[str, Any] = {
    "output_dir": "run",
    "stages": ["sft", "label", "reward", "align"],
    "seed": 1,
    "objective": {"method": "is_dpo", "beta": 0.1, "clip_eps": 0.2},
    "model": {"tokenizer": "world:small", "random": TINY},
    "data": {"sft": "world:small", "prompts": "world:small", "evaluation": "world:small", "eval_fraction": 0.2, "limit": 12},
    "tokenization": {"max_length": 128, "max_prompt_length": 96},
    "sft": STEPS | {"max_steps": 1},
    "reward": STEPS | {"max_steps": 1},
    "label": {"scorer": "gold", "samples": 2, "max_new_tokens": 4, "batch_size": 16},
    "align": STEPS | {"max_steps": 2, "save_steps": 1},
    "evaluation": {
        "scorer": "gold",
        "prompts": 4,
        "opponent_samples": 1,
        "max_new_tokens": 4,
        "bootstrap": 100,
        "batch_size": 16,
    },
}
ALIGN: dict[str, Any] = {
    **{key: value for key, value in RUN.items() if key not in ("sft", "reward", "label")},
    "output_dir": "aligned",
    "stages": ["align"],
    "data": {"pairs": "pairs.jsonl", "eval_fraction": 0.2},
    "align": STEPS | {"max_steps": 1, "save_steps": 1},
}

TEXT = [
    {
        "id": str(n),
        "prompt": f"Post {n}: the cat sat.\nTL;DR:",
        "chosen": f" a cat {n} sat",
        "rejected": f" dogs {n}",
        "weight": 1.0,
        "behaviour_chosen_logps": -3.5,
        "behaviour_rejected_logps": -4.0,
        "chosen_finished": True,
        "facts": None,
    }
    for n in range(6)
]
IDS = [{"prompt_ids": [3, 4, 5 + n], "chosen_ids": [6, 7, 2], "rejected_ids": [8, 2]} for n in range(6)]
IMPLIED = [{"chosen": f"Say {n} now: yes, sir", "rejected": f"Say {n} now: no, madam"} for n in range(6)]
HH = [
    {"chosen": f"\n\nHuman: what is {n}?\n\nAssistant: {n} it is", "rejected": f"\n\nHuman: what is {n}?\n\nAssistant: no idea"}
    for n in range(6)
]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"What is {n}?"}],
        "chosen": [{"role": "assistant", "content": f"It is {n}."}],
        "rejected": [
            {"role": "assistant", "content": "No idea.", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    }
    for n in range(6)
]
SHAREGPT = [
    {
        "conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": f"What is {n}?"}],
        "chosen": {"from": "gpt", "value": "A number."},
        "rejected": {"from": "gpt", "value": "Nothing."},
    }
    for n in range(6)
]
ALPACA = [
    {
        "instruction": f"Add {n}",
        "input": "1",
        "chosen": "Two.",
        "rejected": "Three.",
        "system": "Be brief.",
        "history": [["a", "b"]],
    }
    for n in range(6)
]
ROWS = {"text": TEXT, "ids": IDS, "implied": IMPLIED, "hh": HH, "chat": CHAT, "sharegpt": SHAREGPT, "alpaca": ALPACA}

SWEEP = {"base": "config.yaml", "output_dir": "swept", "seeds": [1, 2], "grids": {"betas": {"objective.beta": [0.1, 0.5]}}}
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}"
    "{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
BENCHMARK = "benchmark tldr --model_path run/model --questions pairs.jsonl --max_new_tokens 4 --judge run/reward --output bench"
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def encoded(rows: list[dict[str, Any]], suffix: str) -> bytes:
    """Rows as a file of this kind; cells that a table cannot hold are JSON text."""
    inner = suffix
    for packed, pack in PACKED.items():
        if suffix.endswith(packed):
            return pack(encoded(rows, suffix.removesuffix(packed)))
    if inner == ".json":
        return json.dumps(rows).encode()
    if inner == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if inner in (".csv", ".tsv"):
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.writer(text, "excel" if inner == ".csv" else "excel-tab")
        writer.writerow(names)
        for row in rows:
            cells = [row.get(name) for name in names]
            writer.writerow([cell if isinstance(cell, str | int | float | None) else json.dumps(cell) for cell in cells])
        return text.getvalue().encode("utf-8", "surrogatepass")
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.parquet

    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    if inner == ".parquet":
        pa.parquet.write_table(table, sink)
    elif inner == ".feather":
        pa.feather.write_feather(table, sink)
    else:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
    return sink.getvalue()


def write_files(folder: Path) -> None:
    """Configurations, rows and a chat template."""
    (folder / "config.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    (folder / "align.yaml").write_text(yaml.safe_dump(ALIGN, sort_keys=False))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP, sort_keys=False))
    (folder / "pairs.jsonl").write_bytes(encoded(TEXT, ".jsonl"))
    (folder / "template.jinja").write_text(TEMPLATE)


def make_inputs(folder: Path) -> None:
    """Train, evaluate and report once; two folders of models, one with its weights and one with an adapter. Runs in `folder`."""
    from isdaa.cli import main
    from isdaa.models.loading import add_lora, load_model, load_tokenizer, save_model

    write_files(folder)
    for command in (
        "train --config config.yaml",
        "evaluate --model_path run",
        "report run",
        BENCHMARK,
    ):
        assert main(command.split()) == 0, command
    shutil.copytree(folder / "run" / "model", folder / "model")
    for name in ("isdaa.json", "isdaa_manifest.json"):  # as if something else had trained it
        (folder / "model" / name).unlink(missing_ok=True)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    save_model(add_lora(load_model(folder / "model"), rank=2), load_tokenizer(folder / "model"), folder / "adapter", merge=False)
    (folder / "adapter" / "isdaa_manifest.json").unlink(missing_ok=True)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "../model"}))
