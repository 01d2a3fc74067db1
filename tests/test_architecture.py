"""Keep the layout: imports run down only, rooms keep their names, functions stay short, docstrings are sentences."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.data import ROOT

FLOORS = (
    ("errors", "precision", "version"),
    ("noise", "program"),
    ("storage",),
    ("images", "metrics", "prior"),
    ("model",),
    ("inference",),
    ("latents", "bitstream"),
    ("folders",),
    ("diffusion", "interop", "evaluation"),
    ("export", "info"),
    ("commands",),
    ("cli",),
)
"""The rooms of `latent_codec` from the ground up: a room imports from floors below its own, never from its own."""

TRAIN_FLOORS = (
    ("config",),
    ("data",),
    ("context_prior",),
    ("objectives", "init"),
    ("loop", "validation", "collapse"),
    ("vae", "prior", "diffusion"),
    ("recipe",),
)

LONGEST, MOST_PARAMETERS = 50, 6
FRAGMENTS = frozenset(
    re.findall(
        r"\w+",
        "After Also And Any As At Because Before Both But By During Either For From How If In Into It Its Like Not Of "
        "On Only Or Out Over Same Since So Such That Their These They Those Though Till To Under Until Up What When "
        "Where Whether Which While Who Whose Why With Without",
    )
)
"""Words that no docstring begins with: its first sentence has a verb that says what is done or what a thing is."""

ARTICLES = frozenset({"A", "An", "The", "Each", "Every", "All", "One", "Two", "This", "No"})
VERBS = re.compile(r"\b(is|are|has|have|holds?|takes?|gives?|does|do|can|may|must|means?|makes?|says?|needs?|runs?)\b")


class Module(NamedTuple):
    name: str
    path: Path
    tree: ast.Module
    lines: list[str]


@cache
def modules(package: str) -> dict[str, Module]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found[name] = Module(name, path, ast.parse(text), text.splitlines())
    return found


@cache
def everything() -> dict[str, Module]:
    return modules("latent_codec") | modules("train") | modules("tools")


def imports(module: Module) -> Iterator[str]:
    """Yield the names of our modules that a module imports, anywhere in it."""
    for node in ast.walk(module.tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module.name} has a relative import"
            names = [
                f"{node.module}.{name}" if f"{node.module}.{name}" in everything() else node.module for name in names
            ]
        yield from (name for name in names if name in everything() and name != module.name)


def is_lazy_package(module: Module) -> bool:
    """Tell whether it is the package itself, whose `__getattr__` imports on first use."""
    return module.name == "latent_codec"


def functions(module: Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(module.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


@pytest.mark.slow
def test_no_imports_run_in_a_circle() -> None:
    graph = {m.name: set(imports(m)) for m in everything().values() if not is_lazy_package(m)}
    while leaves := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in leaves}
    # What is left is a circle, or imports one.
    imported = set().union(*graph.values()) if graph else set()
    assert not sorted(graph.keys() & imported)


@pytest.mark.parametrize(("package", "floors"), [("latent_codec", FLOORS), ("train", TRAIN_FLOORS)])
def test_imports_run_down_only(package: str, floors: tuple[tuple[str, ...], ...]) -> None:
    floor = {room: height for height, rooms in enumerate(floors) for room in rooms}
    up = []
    for module in modules(package).values():
        if module.name == package:
            continue
        room = module.name.split(".")[1]
        for target in imports(module):
            there = target.split(".")
            if there[0] == package and len(there) > 1 and there[1] != room and floor[there[1]] >= floor[room]:
                up.append(f"{module.name} imports {target}")
    assert not up


def test_the_library_imports_neither_programs_nor_tools() -> None:
    for package, below in (("latent_codec", {"latent_codec"}), ("train", {"latent_codec", "train"})):
        for module in modules(package).values():
            found = {target.split(".")[0] for target in imports(module)}
            assert found <= below, f"{module.name} imports from {found - below}"
    commands = ("latent_codec.commands", "latent_codec.cli")
    for module in modules("train").values():
        assert not [t for t in imports(module) if t.startswith(commands)], f"{module.name} imports the command line"


def test_the_packages_have_the_rooms_that_the_floors_name() -> None:
    for package, floors in (("latent_codec", FLOORS), ("train", TRAIN_FLOORS)):
        there = {name.split(".")[1] for name in modules(package) if "." in name}
        assert there == {room for rooms in floors for room in rooms}


def test_private_names_stay_in_their_modules() -> None:
    crossing = []
    for module in everything().values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in (
                "latent_codec",
                "train",
                "tools",
            ):
                private = [a.name for a in node.names if a.name.startswith("_") and not a.name.startswith("__")]
                crossing += [f"{module.name} imports {name} of {node.module}" for name in private]
    assert not crossing


@pytest.mark.parametrize("package", ["latent_codec", "train"])
def test_functions_fit_one_screen(package: str) -> None:
    """A longer function says why in a comment `# Long: ...` on its first lines or above it."""
    long = []
    for module in modules(package).values():
        for function in functions(module):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            around = module.lines[max(0, function.lineno - 2) : function.body[0].lineno + 2]
            if length > LONGEST and not any("# Long: " in line for line in around):
                long.append(f"{module.name}.{function.name}: {length} lines")
    assert not long


@pytest.mark.parametrize("package", ["latent_codec", "train", "tools"])
def test_functions_take_few_parameters(package: str) -> None:
    """One with more says why in a comment `# Parameters: ...` above it or on its first lines."""
    many = []
    for module in modules(package).values():
        for function in functions(module):
            a = function.args
            names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            count = len(names) - (names[:1] in (["self"], ["cls"]))
            above = min([function.lineno, *(d.lineno for d in function.decorator_list)])
            around = module.lines[max(0, above - 2) : function.body[0].lineno + 1]
            if count > MOST_PARAMETERS and not any("# Parameters: " in line for line in around):
                many.append(f"{module.name}.{function.name}: {count} parameters")
    assert not many


def test_everything_is_printed_by_one_function() -> None:
    """`program.say` makes names and metadata from files harmless for a terminal."""
    printing = [
        f"{module.name}:{node.lineno}"
        for module in everything().values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "tqdm.write", "sys.stdout.write")
    ]
    assert {place.split(":")[0] for place in printing} == {"latent_codec.program"}


def test_everything_is_removed_and_replaced_in_one_place() -> None:
    """`storage.removal` decides by name and record; `.replace(x)` with one argument is a rename."""
    removing = [
        f"{module.name}:{node.lineno}"
        for module in (modules("latent_codec") | modules("train")).values()
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and (
            node.func.attr in ("unlink", "rmtree", "rmdir", "removedirs", "rename", "renames")
            or (node.func.attr == "replace" and len(node.args) == 1 and not node.keywords)
            or ast.unparse(node.func) in ("os.remove", "os.replace", "shutil.move")
        )
    ]
    assert {place.split(":")[0] for place in removing} == {"latent_codec.storage.removal"}, removing


@pytest.mark.parametrize("package", ["latent_codec", "train", "tools"])
def test_docstrings_begin_with_a_sentence(package: str) -> None:
    """Modules, public classes and public functions of modules have one; every one that is there begins with a verb."""
    wrong = []
    for module in modules(package).values():
        if module.path.name == "__init__.py" and not module.tree.body:
            continue
        public = [
            node
            for node in module.tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        wrong += [f"{module.name}: no docstring"] if ast.get_docstring(module.tree) is None else []
        if package == "latent_codec":
            wrong += [f"{module.name}.{n.name}: no docstring" for n in public if ast.get_docstring(n) is None]
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                first, sentence = text.split()[0].strip("`,.:;"), re.split(r"[.:;]\s|\n\n", text + " ")[0]
                if first in FRAGMENTS or (first in ARTICLES and not VERBS.search(sentence)):
                    name = module.name if isinstance(node, ast.Module) else f"{module.name}.{node.name}"
                    wrong.append(f"{name}: begins with {first!r}")
    assert not wrong


@pytest.mark.parametrize("package", ["latent_codec", "train", "tools"])
def test_descriptions_of_fields_are_no_fragments(package: str) -> None:
    wrong = []
    for module in modules(package).values():
        for node in ast.walk(module.tree):
            body = getattr(node, "body", [])
            for named, text in pairwise(body if isinstance(body, list) else []):
                if isinstance(named, ast.Assign | ast.AnnAssign) and isinstance(text, ast.Expr):
                    value = text.value.value if isinstance(text.value, ast.Constant) else None
                    if isinstance(value, str) and value.split()[0].strip("`,.:;") in FRAGMENTS:
                        wrong.append(f"{module.name}: {value[:60]}")
    assert not wrong
