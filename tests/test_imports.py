"""Imports only ever point down the five floors of the house, and the quick commands import nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

SOURCE = Path(__file__).parents[1] / "src" / "isdaa"
BASEMENT = {
    "errors",
    "lazy",
    "disk",
    "distributed",
    "files",
    "foreign",
    "manifest",
    "ownership",
    "terminal",
}
# Room -> rooms it may import. `training` and `report` stand beside each other.
GROUND = {"objectives", "models", "data", "world", "config", "record"}
ALLOWED = {
    "errors": set(),
    "lazy": set(),
    "__main__": {"cli"},
    "disk": {"errors"},
    "foreign": {"errors"},
    "files": {"errors", "disk", "foreign"},
    "manifest": {"errors", "files", "foreign", "ownership"},
    "ownership": {"errors"},
    "distributed": {"errors", "disk"},
    "terminal": {"distributed", "errors"},
    "objectives": {"errors", "lazy"},
    "world": BASEMENT,
    "models": BASEMENT,
    "data": BASEMENT | {"world"},
    "config": BASEMENT | {"objectives"},
    "record": BASEMENT,
    "evaluation": BASEMENT | GROUND,
    "training": BASEMENT | GROUND | {"evaluation"},
    "preview": BASEMENT | GROUND | {"evaluation", "training"},
    "report": BASEMENT | GROUND | {"evaluation"},
    "exits": BASEMENT,
    "experiments": BASEMENT | GROUND | {"evaluation", "training", "report"},
    "cli": BASEMENT | GROUND | {"exits", "evaluation", "training", "preview", "report", "experiments"},
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
    file.write_text("def f():\n    from isdaa.training.run_stages import run\n    import isdaa.cli\n")
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


def graph() -> dict[str, set[str]]:
    """Module -> modules that it imports, function-level imports included."""
    modules = {".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path for path in rooms()}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("isdaa"):
                home = (node.module or "").partition(".")[2]
                wanted = [f"{home}.{alias.name}".strip(".") for alias in node.names]
                found[name] |= {one if one in modules else home for one in wanted} & modules.keys()
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name.partition(".")[2] for alias in node.names} & modules.keys()
    return found


def room_of(module: str, folders: set[str]) -> str:
    """The folder that a module lies in; itself, beside folders."""
    home = module.rpartition(".")[0]
    beside = any(folder.rpartition(".")[0] == home for folder in folders)
    return module if beside or not home or module in folders else home


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Names along a circle, or none."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return trail[trail.index(name) :]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            if found := walk(other, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def test_no_files_and_no_rooms_import_each_other_in_a_circle() -> None:
    files = graph()
    assert circle(files) == []
    folders = {".".join(path.parent.relative_to(SOURCE).parts) for path in SOURCE.rglob("__init__.py")}
    between: dict[str, set[str]] = {}
    for name, others in files.items():
        own = room_of(name, folders)
        between.setdefault(own, set()).update(room_of(other, folders) for other in others)
        between[own].discard(own)
    assert circle(between) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c"]  # one would be seen


def test_no_folder_has_more_than_16_modules() -> None:
    for folder in {path.parent for path in rooms()} - {SOURCE}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 16, folder
