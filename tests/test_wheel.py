"""The smoke test of make wheel, run where the library is now, and that it sees what it looks for."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.record import ROOT
from tests import wheel

NAMES = ("rmtkern/_C.cpython-311.so", "rmtkern/py.typed", "rmtkern-1.dist-info/licenses/LICENSE",
         "rmtkern/demo/assets/images", "rmtkern/report/page.css")  # fmt: skip


@pytest.fixture(scope="module")
def built():
    if not list((ROOT / "rmtkern").glob("_C.*.so")):
        pytest.skip("the extension is not built")


def test_the_smoke_test_passes_here(built, tmp_path):
    printed = wheel.smoke(Path(sys.executable), ROOT, str(tmp_path), ROOT)
    assert "instruction sets" in printed and "portable" in printed and printed.count("libgomp") == 1


def test_a_compiler_is_seen(tmp_path):
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    with pytest.raises(RuntimeError, match="a compiler is in PATH"):
        wheel.smoke(Path(sys.executable), ROOT, str(tmp_path), ROOT)


def test_a_package_without_its_extension_is_seen(tmp_path):
    shutil.copytree(ROOT / "rmtkern", tmp_path / "rmtkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with pytest.raises(RuntimeError, match=r"rmtkern/_C\.|cannot import name '_C'"):
        wheel.smoke(Path(sys.executable), tmp_path, str(tmp_path), tmp_path)


def make(path, names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, "x")
    return path


def test_what_a_wheel_must_hold(tmp_path):
    good = "rmtkern-1-cp311-cp311-manylinux_2_34_x86_64.whl"
    wheel.check_contents(make(tmp_path / good, NAMES))
    with pytest.raises(ValueError, match=r"lacks the extension and py\.typed"):
        wheel.check_contents(make(tmp_path / good, NAMES[2:]))
    for extra in ("tests/x.py", "rmtkern.libs/libgomp-1.so"):
        with pytest.raises(ValueError, match=f"holds {extra}, which is not part"):
            wheel.check_contents(make(tmp_path / good, [*NAMES, extra]))
    with pytest.raises(ValueError, match="expected a manylinux platform in the name"):
        wheel.check_contents(make(tmp_path / "rmtkern-1-cp311-cp311-linux_x86_64.whl", NAMES))
