"""What is built and installed: the wheel and sdist hold what they should, and the installed wheel works."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import portcall

ROOT = Path(__file__).parent.parent
FOLDERS = ("bench", "calibration", "exporters", "targets")
COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]
COMPILES = shutil.which(COMPILER) is not None and not sysconfig.get_config_var("Py_GIL_DISABLED")
KERNEL = "portcall/calibration/_histogram.abi3.so"


def _project_files() -> list[str]:
    """Return what git tracks, and what it does not ignore; in an unpacked sdist, everything."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sorted(f for f in done.stdout.split("\0") if f and os.path.lexists(ROOT / f))


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git would hold."""
    copy = tmp_path_factory.mktemp("copy")
    for name in _project_files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copy


def _build(source: Path, out: Path, *options: str, **environment: str) -> None:
    """Build what *options* say (else wheel and sdist) from *source* into *out*, without network."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(source)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(copied: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel and the sdist; the wheel is built from what the sdist holds."""
    out = tmp_path_factory.mktemp("dist")
    _build(copied, out)
    [wheel], [sdist] = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh environment with the wheel alone; what it depends on is lent by this one."""
    place = tmp_path_factory.mktemp("fresh")
    venv.create(place, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python")]
    command = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(built[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # A .pth adds the folder behind the own one and reads no .pth in it: this checkout's editable install stays out.
    site = next(place.glob("lib/python*/site-packages"))
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_exactly_the_package(built: tuple[Path, Path]) -> None:
    expected = {"portcall/py.typed"}
    for name in _project_files():
        top = name.split("/")[0]
        if name.endswith((".py", ".pyi")) and top in ("portcall", *FOLDERS):
            expected.add(name if top == "portcall" else f"portcall/{name}")
    info = f"portcall-{portcall.__version__}.dist-info"
    files = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    expected |= {f"{info}/{name}" for name in files}
    if COMPILES:
        expected.add(KERNEL)
    with zipfile.ZipFile(built[0]) as archive:
        assert set(archive.namelist()) == expected
        assert archive.read(f"{info}/top_level.txt").decode().split() == ["portcall"]
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = archive.read(f"{info}/METADATA").decode()
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["portcall"]
    assert f"portcall = {script}\n" in entry_points
    assert f"Version: {portcall.__version__}\n" in metadata, "pyproject.toml and portcall.__version__ differ"
    assert "License-Expression: Apache-2.0\n" in metadata


def test_the_sdist_holds_the_tests_too(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    wanted = [f for f in _project_files() if f.startswith("tests/")]
    wanted += ["README.md", "LICENSE", "pyproject.toml", "portcall/py.typed", "portcall/bench/run.py"]
    wanted += ["setup.py", "portcall/calibration/_histogram.c"]
    assert not [f for f in wanted if f not in members]
    assert not [name for name in members if name.endswith((".pyc", ".so")) or name.startswith(".venv")]
    assert all(m.isfile() or m.isdir() for m in members.values()), "a link would not survive on Windows"


def test_one_wheel_serves_every_python(built: tuple[Path, Path]) -> None:
    """The compiled module keeps to the stable ABI of the oldest Python that the project supports."""
    if not COMPILES:
        pytest.skip(f"no {COMPILER} here, or a free-threaded Python: nothing is compiled")
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    major, minor = oldest.removeprefix(">=").split(".")
    assert built[0].name.startswith(f"portcall-{portcall.__version__}-cp{major}{minor}-abi3-")
    source = (ROOT / "calibration" / "_histogram.c").read_text()
    assert f"#define Py_LIMITED_API 0x{int(major):02x}{int(minor):02x}0000 " in source


def test_without_a_compiler_the_wheel_is_built_all_the_same(copied: Path, tmp_path: Path) -> None:
    _build(copied, tmp_path, "--wheel", CC="no-such-compiler")
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "portcall/calibration/histogram.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_the_license_is_the_full_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n" in text and "Version 2.0, January 2004" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10))
    assert "APPENDIX: How to apply the Apache License to your work." in text


def test_the_installed_wheel_is_typed_and_is_what_is_imported(installed: Path, tmp_path: Path) -> None:
    code = "import portcall, pathlib; print(pathlib.Path(portcall.__file__).parent)"
    package = Path(_run(installed / "python", "-c", code, cwd=tmp_path).stdout.strip())
    assert package.is_relative_to(installed.parent)
    assert (package / "py.typed").is_file()
    assert not (package / "bench").is_symlink()


def test_the_installed_wheel_counts_by_its_own_kernel(installed: Path, tmp_path: Path) -> None:
    code = "import os; os.environ.pop('PORTCALL_NO_EXTENSION', None); "
    code += "from portcall.calibration.histogram import is_compiled; print(is_compiled())"
    done = _run(installed / "python", "-c", code, cwd=tmp_path)
    assert done.stdout == f"{COMPILES}\n", done.stdout + done.stderr


def test_the_installed_commands_work(installed: Path, tmp_path: Path) -> None:
    for command in ([installed / "portcall"], [installed / "python", "-m", "portcall"]):
        done = _run(*command, "--version", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, f"portcall {portcall.__version__}\n"), done.stderr
    done = _run(installed / "portcall", "doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {b["name"]: b["run"]["available"] for b in json.loads(done.stdout)["backends"]}
    assert found["null"] and "onnxruntime" in found


def test_the_installed_wheel_exports_and_measures(
    installed: Path, identity_onnx: Path, tmp_path: Path
) -> None:
    export: list[str | Path] = [
        installed / "portcall",
        "export",
        identity_onnx,
        "--to",
        "null:fp32,onnxruntime:fp32",
    ]
    done = _run(*export, "-o", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    bench: list[str | Path] = [
        installed / "portcall",
        "bench",
        tmp_path / "out",
        "--processes",
        "1",
        "--min-time",
        "0.01",
    ]
    done = _run(*bench, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)["results"]
    assert [(r["backend"], r["outcome"]) for r in results] == [
        ("null", "measurement"),
        ("onnxruntime", "measurement"),
    ]


# ------------------------------------------------------------------------------------------------ requirements


def _requirements(distribution: str, extras: frozenset[str]) -> Iterator[Requirement]:
    for text in importlib.metadata.requires(distribution) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in extras | {""}):
            yield requirement


def test_what_is_installed_satisfies_the_extra_all() -> None:
    """Every requirement of ``portcall[all]``, and theirs in turn, holds among the versions installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [("portcall", frozenset({"all"}))]
    while waiting:
        distribution, extras = waiting.pop()
        if (distribution, extras) in seen:
            continue
        seen.add((distribution, extras))
        for requirement in _requirements(distribution, extras):
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                pytest.fail(f"{distribution} needs {requirement}, which is not installed")
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{distribution} needs {requirement}, installed is {version}"
            )
            waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    assert len(seen) > 10


def test_constraints_are_exact_and_installed() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        name, _, version = line.partition("==")
        assert version, f"constraints.txt: {line!r} is no exact version"
        installed = importlib.metadata.version(name).partition("+")[0]  # torch says 2.13.0+cpu
        assert installed == version, f"constraints.txt says {line}, installed is {installed}"


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["all", "dev"])
def test_an_extra_resolves_in_a_fresh_environment(
    built: tuple[Path, Path], tmp_path: Path, extra: str
) -> None:
    """pip finds versions that fit together under constraints.txt, and that pins all of them; nothing is installed."""
    venv.create(tmp_path / "venv", with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", str(tmp_path / "venv" / "bin" / "python"), "install"]
    pip += ["--dry-run", "--quiet", "--disable-pip-version-check", "--no-input"]
    probe = subprocess.run(
        [*pip, "--no-deps", "--retries", "0", "--timeout", "10", "shtab"], capture_output=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip("no package index is reachable: pip finds not even shtab")
    report = tmp_path / "report.json"
    constraints = ["--constraint", str(ROOT / "constraints.txt"), "--report", str(report)]
    wanted = f"portcall[{extra}] @ {built[0].as_uri()}"
    done = subprocess.run([*pip, *constraints, wanted], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {
        canonicalize_name(i["metadata"]["name"]): i["metadata"]["version"]
        for i in json.loads(report.read_text())["install"]
    }
    assert {"onnxruntime", "openvino", "ai-edge-litert", "torch", "pillow", "numpy"} <= set(found)
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    unpinned = set(found) - {canonicalize_name(name) for name in pinned} - {"portcall", "setuptools"}
    assert not unpinned, "constraints.txt should pin all that the extra brings"
