"""The house rules, held by walking the code: which room may import which, what importing costs, who is under contract."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest

import bnport
from bnport import adapters
from tests.adapters.contract import FRAMEWORKS

HOUSE = os.path.dirname(bnport.__file__)
TESTS = os.path.dirname(__file__)

# Each room and the rooms it may import; a room is a module or package directly under bnport.
# `adapters` itself (finding and reading) may be imported where a path or object must be read.
RECORDS = {"_lazy", "errors", "rounding", "record"}  # `algebra` is used through the methods of BatchNorm
ALLOWED = {
    "__init__": None,  # may offer anything, lazily
    "__main__": {"cli"},
    "_lazy": set(),
    "errors": set(),
    "rounding": {"_lazy", "errors", "record"},  # record: for the type of an array only
    "record": {"_lazy", "errors", "rounding", "algebra"},
    "algebra": RECORDS,
    "layer": RECORDS,
    "containers": {"_lazy", "errors", "record"},  # record: for the type of an array only
    "adapters": {*RECORDS, "layer", "containers"},
    "match": {*RECORDS, "layer"},
    "plan": {*RECORDS, "layer"},
    "verify": {*RECORDS, "layer", "report", "html"},  # a Report prints itself
    "report": {*RECORDS, "layer", "verify", "html"},
    "html": {*RECORDS, "layer", "verify", "report", "containers"},  # containers: a page is written whole or not at all
    "show": {*RECORDS, "layer"},
    "explain": {*RECORDS, "layer", "verify"},
}
CONDUCTORS_NEVER_IMPORT = {"cli"}  # every other room: anything but the command line


def _sources():
    for folder, _, names in os.walk(HOUSE):
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                module = os.path.relpath(path, HOUSE)[:-3].replace(os.sep, ".")
                yield module.removesuffix(".__init__"), path


def _imports(path, module):
    """Every module under bnport that a source file imports, at the top or inside functions; (name, for types only)."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    package = module.split(".") if path.endswith("__init__.py") else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.removeprefix("bnport.") for a in node.names if a.name.startswith("bnport."))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                yield from (f"{base}.{a.name}" if base else a.name for a in node.names)
            elif node.module == "bnport":
                yield from (a.name for a in node.names)
            elif node.module and node.module.startswith("bnport."):
                base = node.module.removeprefix("bnport.")
                yield from (f"{base}.{a.name}" for a in node.names)


def test_no_room_imports_one_that_it_may_not():
    wrong = []
    for module, path in _sources():
        room = module.split(".")[0]
        for imported in _imports(path, module):
            other = imported.split(".")[0]
            if other == room or other.startswith("__"):
                continue
            allowed = ALLOWED.get(room, "anything but the command line")
            if isinstance(allowed, set) and other not in allowed:
                wrong.append(f"{module} imports {imported}")
            if not isinstance(allowed, set) and room not in ("cli", "__init__") and other in CONDUCTORS_NEVER_IMPORT:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_no_adapter_imports_another_adapter():
    wrong = []
    for module, path in _sources():
        parts = module.split(".")
        if parts[0] == "adapters" and len(parts) > 1:
            own = f"adapters.{parts[1]}"
            for imported in _imports(path, module):
                other = imported.split(".")
                if (
                    other[0] == "adapters"
                    and len(other) > 1
                    and ".".join(other[:2]) != own
                    and other[1] in adapters.names()
                ):
                    wrong.append(f"{module} imports {imported}")
    assert not wrong


def _loaded_after(code, extra=()):
    script = f"import sys\n{code}\nprint(*[m for m in {(*FRAMEWORKS, *extra)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[-2].split()


def test_import_bnport_imports_no_framework_and_not_even_numpy():
    assert _loaded_after("import bnport", ("numpy", "h5py", "rich", "dataclasses", "zipfile")) == []


def test_importing_every_adapter_and_container_imports_no_framework_and_not_even_numpy():
    modules = [m for m, _ in _sources() if m.startswith(("adapters.", "containers."))]
    code = "\n".join(f"import bnport.{m}" for m in modules)
    assert _loaded_after(code, ("numpy", "h5py", "rich")) == []


@pytest.mark.skipif(not os.path.exists(os.path.join(HOUSE, "cli")), reason="there is no command line yet")
def test_the_help_imports_no_framework_and_not_even_numpy():
    code = (
        "import bnport.cli\nsys.argv = ['bnport', '--help']\ntry:\n    bnport.cli.entry()\nexcept SystemExit:\n    pass"
    )
    assert _loaded_after(code, ("numpy", "h5py", "rich", "dataclasses", "zipfile")) == []


@pytest.mark.parametrize(
    "name",
    [
        "digits/digits.pth",
        "digits/digits.safetensors",
        "digits/twin.keras",
        "onnx/torch-kept.onnx",
        "caffe/bvlc.caffemodel",
    ],
)
def test_a_listing_imports_neither_numpy_nor_typing_nor_what_argparse_asks_for_the_terminals_width(name):
    path = os.path.join(os.path.dirname(TESTS), "fixtures", name)
    code = f"import bnport.cli\nassert bnport.cli.main(['show', '--no-values', {path!r}]) == 0"
    assert _loaded_after(code, ("numpy", "h5py", "rich", "dataclasses", "zipfile", "typing", "shutil")) == []


def test_help_is_as_wide_as_it_is_told():
    def usage(columns):
        done = subprocess.run(
            [sys.executable, "-m", "bnport", "show", "--help"],
            capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": columns},
        )  # fmt: skip
        return done.stdout.split("\n\n")[0].splitlines()

    assert max(map(len, usage("60"))) < 60
    assert len(usage("400")) == 1


def test_every_adapter_has_a_contract_test():
    under_contract = set()
    folder = os.path.join(TESTS, "adapters")
    for name in sorted(os.listdir(folder)):
        if name.startswith("test_") and name.endswith(".py"):
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                tree = ast.parse(file.read())
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef) and node.bases:
                    for statement in node.body:
                        if (
                            isinstance(statement, ast.Assign)
                            and getattr(statement.targets[0], "id", "") == "adapter"
                            and isinstance(statement.value, ast.Constant)
                        ):
                            under_contract.add(statement.value.value)
    assert set(adapters.names()) <= under_contract


def test_every_adapter_is_what_the_protocol_says_and_opens_with_its_table():
    for name in adapters.names():
        adapter = adapters.load(name)
        assert "theirs" in (adapter.__doc__ or ""), f"{name}: its docstring is its mapping table"
        assert isinstance(adapter.SUFFIXES, tuple)
        assert isinstance(adapter.PACKAGES, tuple)
        assert callable(adapter.recognise)
        assert callable(adapter.read)


def test_the_oldest_versions_that_ci_tries_are_within_what_the_package_asks_for():
    import tomllib
    from packaging.requirements import Requirement

    root = os.path.dirname(TESTS)
    with open(os.path.join(root, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    asked = [
        Requirement(text)
        for group in (project["dependencies"], *project["optional-dependencies"].values())
        for text in group
    ]
    with open(os.path.join(TESTS, "oldest.txt"), encoding="utf-8") as file:
        pinned = [Requirement(line.strip()) for line in file if not line.startswith("#")]
    assert {"numpy", "h5py", "pillow", "numba"} <= {pin.name for pin in pinned}
    for pin in pinned:
        (version,) = (specifier.version for specifier in pin.specifier)
        assert all(version in each.specifier for each in asked if each.name == pin.name), pin
        if pin.name in ("numpy", "pillow", "numba") and "<" in str(pin.marker):
            (bound,) = {
                s.version for each in asked if each.name == pin.name for s in each.specifier if s.operator == ">="
            }
            assert version == bound or version.startswith(f"{bound}."), pin  # the oldest, not just an old one
