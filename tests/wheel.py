"""Installs a wheel in a fresh virtual environment, where no compiler can be found, and tries what a user does first.

python -m tests.wheel dist/rmtkern-*.whl          # what make wheel runs; takes the dependencies from the package index
python -m tests.wheel --share dist/rmtkern-*.whl  # or from this environment, which is quick and tests less

auditwheel has checked before that the wheel needs no newer glibc than its name says. libgomp.so.1 is left out of the
wheel, as torch brings one of that name and is loaded first: that only one is in the process is checked here.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

__all__ = ["COMPILERS", "SMOKE", "main", "smoke"]

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "c99")

SMOKE = """
import pathlib, shutil, sys, tempfile

compilers, inside = sys.argv[1].split(","), sys.argv[2]
assert [name for name in compilers if shutil.which(name)] == [], "a compiler is in PATH"

import rmtkern
import torch
from rmtkern.nn import PackedLinear

assert pathlib.Path(rmtkern.__file__).is_relative_to(inside), rmtkern.__file__
from rmtkern import _C

assert pathlib.Path(_C.__file__).is_relative_to(inside), _C.__file__


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 128)).eval()


def sparse_wins(calls, budget_ms):
    for call in calls.values():
        call()
    cost = {"original": 3.0, "dense": 2.0, "packed": 1.0}
    return {name: cost.get(name, 1.0 if "bitmask" in name else 2.0) for name in calls}


x, model = torch.randn(64, 256), net()
plan = rmtkern.prune_(model, 0.7, targets=("*",))
with torch.no_grad():
    want = model(x)
report = rmtkern.pack_(model, x, timer=sparse_wins)
assert report.packed_layers == 2, report
folder = pathlib.Path(tempfile.mkdtemp())
rmtkern.save(model, folder / "net.safetensors", plan)
again = rmtkern.load(folder / "net.safetensors", net())
with torch.no_grad():
    got, loaded = model(x), again(x)
assert torch.equal(got, loaded) and rmtkern.load_plan(folder / "net.safetensors") == plan
assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
rmtkern.unpack_(again)
assert not any(isinstance(module, PackedLinear) for module in again.modules())

maps = pathlib.Path("/proc/self/maps").read_text().split()
openmp = sorted({path for path in maps if "/libgomp" in path})
assert len(openmp) == 1, f"expected one OpenMP runtime, found {openmp}"
print("rmtkern", rmtkern.__version__, "torch", torch.__version__, "instruction sets", ", ".join(_C.isas()))
print("OpenMP:", pathlib.Path(openmp[0]).relative_to(sys.prefix) if openmp[0].startswith(sys.prefix) else openmp[0])
"""


def smoke(python: Path, inside: Path, paths: str, checkout: Path | None = None) -> str:
    """What the smoke test prints in an environment of its own.

    Args:
        python: to run it with.
        inside: folder that rmtkern must come from.
        paths: PATH of the process.
        checkout: folder to import from before what is installed; None: only what is installed.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    with tempfile.TemporaryDirectory() as folder:  # nothing of a checkout in the current folder
        isolated = ["-I"] if checkout is None else []
        command = [str(python), *isolated, "-c", SMOKE, ",".join(COMPILERS), str(inside)]
        environment = {"PATH": paths, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}
        if checkout is not None:
            environment["PYTHONPATH"] = str(checkout)
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the smoke test failed:\n{done.stderr[-3000:]}")
    return done.stdout


def check_contents(wheel: Path) -> None:
    """Refuse a wheel whose name names no manylinux platform, or without the extension, its licence or its data.

    Raises:
        ValueError: what is wrong.
    """
    if "manylinux" not in wheel.name:
        raise ValueError(f"{wheel.name}: expected a manylinux platform in the name; auditwheel repair gives one")
    names = zipfile.ZipFile(wheel).namelist()
    wanted = {
        "the extension": any(name.startswith("rmtkern/_C.") and name.endswith(".so") for name in names),
        "py.typed": "rmtkern/py.typed" in names,
        "the licence": any(name.endswith("licenses/LICENSE") for name in names),
        "the demo's data": any(name.startswith("rmtkern/demo/assets/") for name in names),
        "the style of reports": "rmtkern/report/page.css" in names,
    }
    if lost := [what for what, there in wanted.items() if not there]:
        raise ValueError(f"{wheel.name} lacks {' and '.join(lost)}")
    if extra := [name for name in names if name.startswith(("tests/", "benchmarks/", "docs/")) or "libgomp" in name]:
        raise ValueError(f"{wheel.name} holds {', '.join(extra[:3])}, which is not part of the package")


def main() -> int:
    """Check the wheel, install it and run the smoke test; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--share", action="store_true", help="take the dependencies of this environment")
    args = parser.parse_args()
    check_contents(args.wheel)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve() / "venv"
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        site = next(home.glob("lib/python*/site-packages"))
        if args.share:
            (site / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        alone = ["--no-deps"] if args.share else []
        subprocess.run([*pip, *alone, "--only-binary", ":all:", str(args.wheel)], check=True, env=environment)
        sys.stdout.write(smoke(python, site, str(home / "bin")))
        command = [str(home / "bin" / "rmtkern"), "info"]
        done = subprocess.run(command, cwd=folder, env={"PATH": str(home / "bin"), "HOME": folder}, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"rmtkern info failed:\n{done.stderr.decode()[-2000:]}")
    sys.stdout.write(f"{args.wheel.name} installs and runs without a compiler\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
