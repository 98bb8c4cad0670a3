"""The rules of the house (docs/design.md), checked on the source itself."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {"trainingcompiler": "trainingcompiler"} | {
    room: f"trainingcompiler.{room}" for room in ("frameworks", "launchers")
}
FRAMEWORKS = {"torch", "tensorflow", "keras", "transformers", "accelerate"}
ADAPTERS = "trainingcompiler.frameworks."
MAY_USE = {("huggingface", "pytorch"), ("keras", "tensorflow"), ("keras", "pytorch")}
MAX_LINES = 600
# Which room may import which: those below it, and itself. Type-only imports count.
CORE_ORDER = (
    "__main__ launch plan check rehearsal worker", "launchers", "cli", "planning", "compiling", "cache",
    "targets", "parallel", "adapters", "reporting", "processes",
    "program strategy config files errors exit_codes _version",
)  # fmt: skip
PYTORCH_ORDER = (
    "__init__ check checkpoints compiled_function", "patches", "session", "aot", "runtime", "verify", "state",
    "lowering", "capture", "graph", "operators", "ops", "tape", "interop",
)  # fmt: skip


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported(source: str, package: str) -> Iterator[str]:
    """Every absolute name that `source`, a module of `package`, may import anywhere in it, functions included.

    `from a import b` gives both `a` and `a.b`, since `b` may be a module.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(room: str) -> Iterator[tuple[Path, str]]:
    """Pairs of a file and a name it imports."""
    for path in sources(room):
        folder = path.relative_to(ROOT / room).parent
        package = ".".join([ROOMS[room], *folder.parts])
        for name in imported(path.read_text(encoding="utf-8"), package):
            yield path.relative_to(ROOT), name


def committed() -> list[Path]:
    """What git has, and what it would add."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\ndef f():\n    from c import d\n    from . import e\n    from ..g import h\n"
    found = set(imported(source, "x.y"))
    assert found == {"a.b", "c", "c.d", "x.y", "x.y.e", "x.g", "x.g.h"}


def test_what_is_imported_from_this_repository_is_there():
    # Parallel workers report a test file that cannot be imported only after everything else has run.
    missing, here = [], {"tests", "benchmarks", "examples", *ROOMS}
    for path in (path for path in committed() if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in here:
                module = ROOT / node.module.replace(".", "/")
                if not (module.is_dir() or module.with_suffix(".py").is_file()):
                    missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.module}")
    assert not missing


def test_core_imports_no_framework():
    wrong = [(path, name) for path, name in imports_of("trainingcompiler") if name.split(".")[0] in FRAMEWORKS]
    assert not wrong


def test_an_adapter_uses_no_other_adapter():
    wrong = []
    for path, name in imports_of("frameworks"):
        if name.startswith(ADAPTERS) and len(path.parts) > 2:
            pair = (path.parts[1], name.removeprefix(ADAPTERS).split(".")[0])
            if pair[0] != pair[1] and pair not in MAY_USE:
                wrong.append((path, name))
    assert not wrong


def misplaced(prefix: str, order: tuple[str, ...], room: str) -> list[str]:
    """Imports within a package, from one of its rooms to one that lies above."""
    heights = {name: height for height, names in enumerate(reversed(order)) for name in names.split()}
    depth, wrong = len(prefix.split(".")), []
    for path, name in imports_of(room):
        module = [*ROOMS[room].split("."), *path.with_suffix("").parts[1:]]
        if module[:depth] == prefix.split(".") and name.startswith(f"{prefix}."):
            source, target = module[depth], name.split(".")[depth]
            if heights.get(source, -1) < heights.get(target, -1) and source in heights:
                wrong.append(f"{path} imports {name}")
    return wrong


@pytest.mark.parametrize(
    ("prefix", "order", "room"),
    [
        ("trainingcompiler", CORE_ORDER, "trainingcompiler"),
        ("trainingcompiler", CORE_ORDER, "launchers"),
        ("trainingcompiler.frameworks.pytorch", PYTORCH_ORDER, "frameworks"),
    ],
)
def test_a_room_imports_only_what_lies_below(prefix, order, room):
    assert not misplaced(prefix, order, room)
    assert misplaced(prefix, tuple(reversed(order)), room)


@pytest.mark.parametrize(
    ("folder", "order"),
    [(ROOT / "trainingcompiler", CORE_ORDER), (ROOT / "frameworks" / "pytorch", PYTORCH_ORDER)],
)
def test_every_room_has_a_place_and_says_what_may_be_in_it(folder, order):
    found = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    placed = {name for names in order for name in names.split()}
    assert found - {"__init__", "frameworks"} == placed - {"__init__"}
    for path in folder.glob("*/__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_public_name_is_a_modules():
    import trainingcompiler

    modules = {path.stem for path in (ROOT / "trainingcompiler").iterdir()}
    assert not modules & {name for name in trainingcompiler.__all__ if not name.startswith("__")}


def test_launchers_import_neither_adapters_nor_jax():
    wrong = [
        (path, name)
        for path, name in imports_of("launchers")
        if name.startswith(ADAPTERS.rstrip(".")) or name.split(".")[0] in {"jax", "jaxlib"}
    ]
    assert not wrong


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_imported_by_their_installed_names(room):
    wrong = [(path, name) for path, name in imports_of(room) if name.split(".")[0] in {"frameworks", "launchers"}]
    assert not wrong


@pytest.mark.parametrize("module", ["trainingcompiler", "trainingcompiler.launch"])
def test_import_loads_no_framework_and_no_backend(module):
    heavy = sorted(FRAMEWORKS | {"jax", "jaxlib"})
    script = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_modules_stay_small():
    table = ROOT / "frameworks" / "pytorch" / "operators"  # one operator table, split by family
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for room in (*ROOMS, "examples", "benchmarks", "tests")
        for path in sources(room)
        if table not in path.parents
    }
    assert not {path: length for path, length in lengths.items() if length > MAX_LINES}


def test_links_in_markdown_resolve():
    broken = []
    for page in (path for path in committed() if path.suffix == ".md"):
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if re.match(r"[a-z]+:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / name) if name else page
            if not target.exists() or (anchor and anchor not in _anchors(target)):
                broken.append((page.relative_to(ROOT), link))
    assert not broken


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ +(.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_no_committed_file_names_a_machine():
    path_on_a_machine = re.compile(r"(?<![\w.~/<>{}*-])/(?:work|root|home|Users|tmp|mnt)/\w[\w./-]*")
    found = []
    for path in committed():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        names = {match for match in path_on_a_machine.findall(text)}
        names |= {str(place) for place in (ROOT, Path.home()) if len(place.parts) > 2 and str(place) in text}
        found += [(path.relative_to(ROOT), name) for name in sorted(names)]
    assert not found


def test_notebooks_are_stripped_of_outputs():
    for path in (path for path in committed() if path.suffix == ".ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        kept = [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
        assert not kept, path
