"""Build and linking: a wheel built with one torch loads with any other supported version; CMake's choice of CUDA."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import struct
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

SYSTEM_LIBRARIES = ("libc.so.*", "libm.so.*", "libstdc++.so.*", "libgcc_s.so.*", "ld-linux*.so.*")
OLDER_GLIBC = ("libdl.so.*", "libpthread.so.*", "librt.so.*")  # part of libc since 2.34
SHT_DYNAMIC, SHT_DYNSYM, SHT_GNU_VERSYM = 6, 11, 0x6FFFFFFF


class Symbol(NamedTuple):
    name: str
    weak: bool
    versioned: bool  # has a symbol version, as symbols of system libraries do


def read_elf(path: Path) -> tuple[list[str], list[Symbol]]:
    """A 64-bit shared library's NEEDED entries and its undefined dynamic symbols."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "expected a little-endian 64-bit ELF file"
    (table,), (size, count) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQI", data, table + index * size) for index in range(count)]
    sections = {kind: (offset, length, link) for _, kind, _, _, offset, length, link in headers}

    def text(strings: int, at: int) -> str:
        begin = headers[strings][4] + at
        return data[begin : data.index(b"\0", begin)].decode()

    offset, length, link = sections[SHT_DYNAMIC]
    needed = [text(link, value) for tag, value in struct.iter_unpack("<qQ", data[offset : offset + length]) if tag == 1]
    offset, length, link = sections[SHT_DYNSYM]
    versions = struct.unpack_from(f"<{length // 24}H", data, sections[SHT_GNU_VERSYM][0])
    undefined = [
        Symbol(text(link, name), info >> 4 == 2, version > 1)
        for (name, info, _, section, _, _), version in zip(
            struct.iter_unpack("<IBBHQQ", data[offset : offset + length]), versions, strict=True
        )
        if section == 0 and name
    ]
    return needed, undefined


@pytest.fixture(scope="module")
def extension() -> tuple[list[str], list[Symbol]]:
    if not sys.platform.startswith("linux"):
        pytest.skip("ELF is Linux's")
    spec = importlib.util.find_spec("slm_fast._C")
    if spec is None or spec.origin is None:
        pytest.skip("slm_fast._C was not built")
    return read_elf(Path(spec.origin))


def test_the_extension_needs_libtorch_cpu_and_no_other_library_that_some_systems_lack(extension):
    needed, _ = extension
    assert "libtorch_cpu.so" in needed
    allowed = ("libtorch_cpu.so", *SYSTEM_LIBRARIES, *OLDER_GLIBC)
    assert [library for library in needed if not any(fnmatch(library, pattern) for pattern in allowed)] == []


def test_the_extension_asks_torch_for_nothing_that_2_10_lacks(extension):
    _, undefined = extension
    lines = (ROOT / "tests/data/torch_2_10_symbols.txt").read_text().splitlines()
    torch_2_10 = {line for line in lines if not line.startswith("#")}
    of_others = [s.name for s in undefined if not (s.weak or s.versioned or re.match(r"_?Py|_ZN?K?St", s.name))]
    assert "torch_library_impl" in of_others
    assert sorted(set(of_others) - torch_2_10) == []


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site-packages folder that setup.py searches, still empty; no pip constraints are set."""
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path / "site")])
    monkeypatch.setattr("site.getusersitepackages", lambda: str(tmp_path / "user"))
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    monkeypatch.delenv("PIP_BUILD_CONSTRAINT", raising=False)
    return tmp_path / "site"


def put_torch(folder: Path, version: str, *, cuda: bool = False) -> None:
    torch = folder / "torch"
    (torch / "include").mkdir(parents=True)
    (torch / "lib").mkdir()
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text(f"__all__ = ['__version__']\n__version__ = '{version}'\n")
    for name in ("cpu", "cuda") if cuda else ("cpu",):
        (torch / f"lib/libtorch_{name}.so").touch()


def build_requirements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    asked = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: asked.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return asked["setup_requires"]


@pytest.mark.parametrize("version", ["2.10.0+cu128", "2.13.0+cpu", "3.0.0"])
def test_an_installed_torch_is_enough_for_the_build(environment, monkeypatch, version):
    put_torch(environment, version)
    assert build_requirements(monkeypatch) == []


@pytest.mark.parametrize("version", [None, "2.9.1", "1.13.0"])
def test_without_one_that_is_new_enough_the_build_asks_for_the_version_that_is_tested(
    environment, monkeypatch, version
):
    if version is not None:
        put_torch(environment, version)
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert build_requirements(monkeypatch) == [pinned]


@pytest.mark.parametrize("variable", ["PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"])
@pytest.mark.parametrize(("line", "asked"), [("torch==2.11.0+cpu", "torch==2.11.0+cpu"), ("torch<=2.14", None)])
def test_a_torch_that_the_users_constraints_pin_goes_before_that_version(
    environment, monkeypatch, tmp_path, variable, line, asked
):
    usual = build_requirements(monkeypatch)
    (tmp_path / "constraints.txt").write_text(f"numpy==2.0\n{line}\ntorchvision==0.29.0\n")
    monkeypatch.setenv(variable, f"{tmp_path / 'missing.txt'} {tmp_path / 'constraints.txt'}")
    assert build_requirements(monkeypatch) == ([asked] if asked else usual)


def configure(tmp_path: Path, mode: str, *, on_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run CMake for the environment in tmp_path/env, with an nvcc that always fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if any(shutil.which(tool, path=path) is None for tool in ("cmake", "ninja", "c++")):
        pytest.skip("no cmake, ninja or C++ compiler")
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: -std=c++20 is unknown' >&2\necho 'second line' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    command = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja", f"-DSLM_FAST_CUDA={mode}"]
    command += [f"-DPython_EXECUTABLE={tmp_path / 'env/bin/python'}", f"-DSLM_FAST_NVCC={nvcc}"]
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(on_path or "")}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """The site-packages of a new virtual environment in tmp_path/env with this one's pybind11, but no torch."""
    pybind11 = pytest.importorskip("pybind11")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    folder = next((tmp_path / "env/lib").glob("python*")) / "site-packages"
    (folder / "pybind11").symlink_to(Path(pybind11.__file__).parent)
    return folder


@pytest.mark.parametrize(
    ("installed", "on_path", "why"),
    [
        ("cuda", None, "does not compile for them: nvcc fatal: -std=c++20 is unknown)"),
        ("cpu", None, "no torch with CUDA is installed)"),
        (None, "cuda", "no torch with CUDA is installed)"),  # an isolated build by pip for an empty environment
    ],
)
def test_auto_goes_without_cuda_operators_and_says_why_in_one_line(tmp_path, site_packages, installed, on_path, why):
    if installed is not None:
        put_torch(site_packages, "2.13.0", cuda=installed == "cuda")
    if on_path is not None:
        put_torch(tmp_path / "isolated", "2.13.0", cuda=True)
    done = configure(tmp_path, "auto", on_path=tmp_path / "isolated")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "CUDA operators" in line]
    assert len(lines) == 1
    assert lines[0].startswith("-- slm_fast: CUDA operators: off (")
    assert lines[0].endswith(why)


def test_on_fails_with_the_whole_message_of_an_nvcc_that_fails(tmp_path, site_packages):
    put_torch(site_packages, "2.13.0")
    done = configure(tmp_path, "on")
    assert done.returncode != 0
    assert "SLM_FAST_CUDA=on" in done.stderr
    assert "nvcc fatal: -std=c++20 is unknown" in done.stderr
    assert "second line" in done.stderr


def test_off_asks_no_nvcc(tmp_path, site_packages):
    put_torch(site_packages, "2.13.0", cuda=True)
    done = configure(tmp_path, "off")
    assert done.returncode == 0, done.stderr
    assert "-- slm_fast: CUDA operators: off\n" in done.stdout
    assert "nvcc fatal" not in done.stdout + done.stderr


def test_without_any_torch_the_build_stops_and_says_so(tmp_path, site_packages):
    put_torch(site_packages, "2.9.1")
    done = configure(tmp_path, "auto")
    assert done.returncode != 0
    assert "no torch >= 2.10 found" in done.stderr
