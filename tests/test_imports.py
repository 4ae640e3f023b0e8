"""Imports only ever point down the five floors of the house, and the quick commands import nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "isdaa"
BASEMENT = {"errors", "disk", "distributed", "files", "foreign", "manifest", "ownership", "settings_text", "synonyms", "terminal"}
# Room -> rooms it may import. `training` and `report` stand beside each other.
GROUND = {"objectives", "models", "data", "world", "config", "record"}
ALLOWED = {
    "errors": set(),
    "disk": {"errors"},
    "foreign": {"errors"},
    "files": {"errors", "disk", "foreign"},
    "manifest": {"errors", "files", "foreign", "ownership"},
    "ownership": {"errors"},
    "settings_text": {"errors", "foreign"},
    "synonyms": {"errors"},
    "distributed": {"errors", "disk"},
    "terminal": {"distributed", "errors"},
    "objectives": set(),
    "world": BASEMENT,
    "models": BASEMENT,
    "data": BASEMENT | {"world"},
    "config": BASEMENT | {"objectives"},
    "options": BASEMENT | {"config"},
    "configuration_page": BASEMENT | {"config"},
    "record": BASEMENT,
    "benchmark_options": BASEMENT | {"evaluation"},
    "evaluation": BASEMENT | GROUND,
    "training": BASEMENT | GROUND | {"evaluation"},
    "report": BASEMENT | GROUND | {"evaluation"},
    "exits": BASEMENT,
    "experiments": BASEMENT | GROUND | {"evaluation", "training", "report"},
    "cli": BASEMENT | GROUND | {"exits", "options", "benchmark_options", "evaluation", "training", "report", "experiments"},
}


def arrows(path: Path) -> set[str]:
    """First-level rooms of isdaa that a file imports, function-level imports included; `` is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "isdaa" else [node.module or ""]
        else:
            continue
        for name in names:
            if name == "isdaa" or name.startswith("isdaa."):
                found.add(name.partition(".")[2].split(".")[0])
    return found - {"__version__"}


def rooms() -> list[Path]:
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", rooms(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_arrow_runs_up_or_around(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    assert room in ALLOWED, f"{path}: a room that the plan of the house does not know"
    upwards = arrows(path) - ALLOWED[room] - {room}
    assert not upwards, f"{path} imports {sorted(upwards)}"


def test_the_check_sees_a_forbidden_arrow(tmp_path: Path) -> None:
    file = tmp_path / "losses.py"
    file.write_text("def f():\n    from isdaa.training.stages import run\n    import isdaa.cli\n")
    assert arrows(file) == {"training", "cli"}


def test_objectives_import_torch_alone() -> None:
    for path in (SOURCE / "objectives").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "isdaa", *sys.stdlib_module_names}, f"{path} imports {name}"
                assert not (path.name == "presets.py" and top == "torch"), "presets.py must stay free of torch"


@pytest.mark.parametrize("command", [["--help"], ["methods"], ["train", "--help"]])
def test_quick_commands_load_no_heavy_library(command: list[str]) -> None:
    program = (
        "import sys\nfrom isdaa.cli import main\n"
        f"try:\n    main({command!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'peft', 'altair', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
