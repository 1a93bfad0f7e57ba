"""How the repository is laid out, and what its source files must be: symlinks, syntax, imports, size."""

from __future__ import annotations

import ast
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("bench", "calibration", "exporters", "targets")
LONGEST = 400
CLONE = "clone with: git -c core.symlinks=true clone ..."


def _modules(*folders: str) -> list[Path]:
    """Return the Python files of *folders*, each once (the links in ``portcall/`` are not followed)."""
    found = []
    for folder in folders:
        for parent, names, files in os.walk(ROOT / folder):
            names[:] = [n for n in names if n != "__pycache__"]
            found += [Path(parent) / f for f in files if f.endswith(".py")]
    return sorted(found)


SOURCES = _modules("portcall", *FOLDERS)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("folder", FOLDERS)
def test_symlink_resolves_to_its_folder(folder: str) -> None:
    link = ROOT / "portcall" / folder
    assert link.is_symlink(), f"portcall/{folder} is no symlink here; {CLONE}"
    assert str(link.readlink()) == f"../{folder}", "it must be relative"
    assert link.resolve() == (ROOT / folder).resolve(), f"portcall/{folder} leads elsewhere; {CLONE}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_git_keeps_it_as_a_symlink(folder: str) -> None:
    done = subprocess.run(
        ["git", "ls-files", "--stage", f"portcall/{folder}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("this is no git checkout")
    assert done.stdout.startswith("120000 "), f"portcall/{folder} is not committed as a symlink"


TRAVELS = [
    ROOT / "portcall" / "__init__.py",  # the packages that hold what travels are imported with it
    ROOT / "targets" / "__init__.py",
    *_modules("targets/agent", "exporters"),
]


@pytest.mark.parametrize("path", TRAVELS, ids=_name)
def test_what_travels_has_the_syntax_of_python_3_8(path: Path) -> None:
    ast.parse(path.read_text(), filename=str(path), feature_version=(3, 8))


@pytest.mark.parametrize("path", TRAVELS, ids=_name)
def test_what_travels_uses_nothing_that_python_3_8_lacks(path: Path) -> None:
    """What parses may still fail there: the newer keywords and methods that our code is prone to."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            newer = {k.arg for k in node.keywords} & {"slots", "kw_only", "strict"}
            assert not newer, f"{_name(path)}:{node.lineno}: {newer}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"removeprefix", "removesuffix", "is_relative_to", "file_digest"}, (
                f"{_name(path)}:{node.lineno}: {node.attr}"
            )


@pytest.mark.parametrize("path", _modules("exporters"), ids=_name)
def test_the_top_of_an_exporter_imports_the_agent_alone(path: Path) -> None:
    """So that the file can travel to a device: everything heavy is imported where it is needed."""
    if path.name.startswith("_"):
        return  # shared parts of the exporting side, and the scan itself
    allowed = {
        "__future__", "contextlib", "dataclasses", "hashlib", "json", "os", "pathlib", "sys", "typing",
    }  # fmt: skip
    for node in ast.parse(path.read_text()).body:
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [str(node.module)]
        for module in modules:
            assert module.startswith("portcall.targets.agent.") or module in allowed, (
                f"{_name(path)}: {module}"
            )


@pytest.mark.parametrize("path", [*SOURCES, *_modules("tests")], ids=_name)
def test_imports_are_absolute(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(path)}:{node.lineno}: a relative import"
            assert str(node.module).split(".")[0] not in FOLDERS, (
                f"{_name(path)}:{node.lineno}: say portcall."
            )


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_long_module_says_why(path: Path) -> None:
    lines = path.read_text().splitlines()
    if len(lines) <= LONGEST:
        return
    near = "\n".join(lines[:20]).lower()
    said = re.search(r"\b(long|lines|one file|in one place)\b", near)
    assert said, f"{_name(path)} has {len(lines)} lines: split it, or say at its top why not"


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_every_module_begins_with_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{_name(path)} has no docstring"


def test_no_module_is_called_after_nothing() -> None:
    assert not {p.stem for p in SOURCES} & {"utils", "helpers", "misc", "common"}


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "portcall/py.typed"]
)
def test_file_exists(name: str) -> None:
    assert (ROOT / name).is_file()
