"""The long checks, part by part, with a row for each in benchmarks/results/test-all.csv: what make test-all runs.

python -m tests.full_run                               # all parts, and the counts into the file
python -m tests.full_run --part soak --part timm       # some of them; the rows of the others stay
python -m tests.full_run --part inductor --share 1/2   # every second test; --share 2/2 beside it

Each test is noted in build/full-run as it ends, and a run of the same code goes on where one was stopped: only what is
left, or failed, is run. A part's row is written when all of its tests have ended, whichever share was the last.

The parts "timm" and "transformers" run tests/test_coverage.py with each of the two newest minor versions that
pyproject.toml allows, put in a folder before the installed one; of a package that has one minor version only, with its
two newest releases. The mutated files of `make fuzz` have a file of their own, fuzz.csv.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from benchmarks.record import RESULTS, ROOT, stamped, write_rows
from tests.notes import Notes, read

__all__ = ["PARTS", "counts", "missing", "newest_two", "notes_file", "run_part"]

NOTES = ROOT / "build" / "full-run"
OUTPUT = RESULTS / "test-all.csv"
COVERAGE = "tests/test_coverage.py"
STOPPED = "pytest stopped before its end"
SLOW = {
    "default": ["-m", "not slow and not compiled"],
    "slow": ["-m", "slow and not soak and not inductor"],
    "inductor": [COVERAGE, "-m", "inductor"],
    "soak": ["tests/test_pytorch.py", "-m", "soak"],
}
"""Part -> what pytest gets."""
INDUCTOR = {
    "TORCHINDUCTOR_CACHE_DIR": str(NOTES / "inductor"),  # compiled C++ is kept, by its text
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",  # and nothing else: every graph is lowered anew
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in the process itself: a pool costs more than two cores give
}
"""Environment of the part that compiles models; the precompiled header is theirs together."""
LIBRARIES = ("timm", "transformers")
PARTS = (*SLOW, *LIBRARIES)


def allowed(package: str) -> Requirement:
    """What pyproject.toml asks of a package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    found = [Requirement(line) for line in (*project["dependencies"], *(line for lines in extras for line in lines))]
    return next(requirement for requirement in found if requirement.name == package)


def available(package: str) -> list[str]:
    """Versions of a package that pip finds."""
    done = pip("index", "versions", package)
    found = re.search(r"^Available versions: (.*)$", done, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"pip found no versions of {package}:\n{done[-500:]}")
    return found[1].split(", ")


def pip(*arguments: str) -> str:
    """What pip of this environment prints."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def newest_two(versions: Iterable[str], requirement: Requirement) -> list[str]:
    """The newest release of each of the two newest minor versions, newest first; or the two newest releases of one.

    Args:
        versions: all there are; prereleases and what is no version are left out.
        requirement: what is allowed.

    Raises:
        ValueError: fewer than two are allowed.
    """
    found = []
    for text in versions:
        try:
            version = Version(text)
        except InvalidVersion:
            continue
        if not version.is_prerelease and version in requirement.specifier:
            found.append(version)
    found.sort(reverse=True)
    minors: dict[tuple[int, int], Version] = {}
    for version in found:
        minors.setdefault((version.major, version.minor), version)
    chosen = list(minors.values())[:2] if len(minors) > 1 else found[:2]
    if len(chosen) < 2:
        raise ValueError(f"{requirement}: expected two versions, found {', '.join(map(str, found)) or 'none'}")
    return [str(version) for version in chosen]


def missing(folder: Path, installed: Callable[[str], str] = metadata.version) -> list[str]:
    """Requirements of the packages in a folder that neither this environment nor the folder meets.

    Args:
        folder: what `pip install --target` filled.
        installed: version of a package here; PackageNotFoundError if there is none.
    """
    packages = {one.name.lower().replace("_", "-"): one for one in metadata.distributions(path=[str(folder)])}
    wanted = []
    for package in packages.values():
        for line in package.requires or ():
            requirement = Requirement(line)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            here = packages.get(requirement.name.lower().replace("_", "-"))
            try:
                version = installed(requirement.name) if here is None else here.version
            except metadata.PackageNotFoundError:
                version = None
            if version is None or not requirement.specifier.contains(version, prereleases=True):
                wanted.append(f"{requirement.name}{requirement.specifier}")
    return sorted(set(wanted))


def install(package: str, version: str, folder: Path) -> None:
    """Put one version of a package into a folder, and of what it needs only what this environment lacks."""
    wanted = [f"{package}=={version}"]
    for _ in range(5):  # what is put there may need something in turn
        pip("install", "--quiet", "--no-deps", "--upgrade", "--target", str(folder), *wanted)
        if not (wanted := missing(folder)):
            return
    raise RuntimeError(f"{package} {version} needs {', '.join(wanted)}, which pip did not install")


def notes_file(part: str, extra: Sequence[str] = ()) -> Path:
    """Where the tests of a part are noted: another file for other code, tests or arguments of pytest."""

    def git(*command: str) -> bytes:
        return subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True).stdout

    state = zlib.crc32(git("rev-parse", "HEAD") + git("diff", "HEAD") + repr(list(extra)).encode())
    return NOTES / f"{part.replace(', ', '-')}.{state:08x}.jsonl"


def counts(notes: Notes) -> dict[str, object]:
    """Tests that passed, failed and were skipped, what they took, and what they noted."""
    outcomes = Counter(record["outcome"] for record in notes.ended.values())
    noted = [note for record in notes.ended.values() for note in record["notes"]]
    found: dict[str, object] = {outcome: outcomes[outcome] for outcome in ("passed", "failed", "skipped")}
    for key in ("seconds", "cpu_seconds"):
        found[key] = round(sum(record[key] for record in notes.ended.values()))
    return {**found, "notes": "; ".join(noted)}


def run_pytest(
    arguments: Sequence[str], environment: Mapping[str, str], notes: Path, share: str = "1/1"
) -> dict[str, object]:
    """One run of pytest in a process of its own, its output on ours.

    Args:
        arguments: of pytest.
        environment: of the process.
        notes: file of tests.notes, which an earlier run may have begun.
        share: which of the tests, "I/N".

    Returns:
        The counts of all runs that share the file, how many tests are left, and the libraries' versions.
    """
    plugin = ["-p", "tests.notes", f"--notes={notes}", f"--share={share}"]
    status = subprocess.run([sys.executable, "-m", "pytest", *plugin, *arguments], cwd=ROOT, env=environment).returncode
    noted = read(notes)
    if not noted.selected:
        raise RuntimeError(f"pytest {' '.join(arguments)} selected no tests; see above")
    found = {**counts(noted), "left": len(noted.selected - noted.ended.keys())}
    if status not in (0, 1, 5):  # nor all passed, nor some failed, nor all had been noted
        found["notes"] = "; ".join(filter(None, [f"{STOPPED} (exit status {status})", str(found["notes"])]))
    code = f"import json\nfrom importlib.metadata import version\nprint(json.dumps([version(p) for p in {LIBRARIES}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    return {**dict(zip(LIBRARIES, json.loads(done.stdout), strict=True)), **found}


def run_part(part: str, extra: Sequence[str] = (), share: str = "1/1") -> list[dict[str, object]]:
    """Rows of a part; `extra` goes to pytest, and a share is as `run_pytest` takes it."""
    if part in SLOW:
        environment = {**os.environ, **(INDUCTOR if part == "inductor" else {})}
        return [{"part": part, **run_pytest([*SLOW[part], *extra], environment, notes_file(part, extra), share)}]
    rows = []
    for age, version in zip(("newest", "before"), newest_two(available(part), allowed(part)), strict=True):
        folder = ROOT / "build" / "versions" / f"{part}-{version}"
        install(part, version, folder)
        paths = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        notes = notes_file(f"{part}, {age}, {version}", extra)
        row = run_pytest([COVERAGE, "-k", f"documented and {part}", *extra], environment, notes, share)
        if row[part] != version:
            raise RuntimeError(f"asked for {part} {version}, ran {row[part]}")
        rows.append({"part": f"{part}, {age}", **row})
    return rows


def main() -> int:
    """Run parts and write their rows; 1 if a test failed, none ran, or not all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="may be given several times; default: all")
    parser.add_argument("-o", "--output", type=Path, default=OUTPUT)
    parser.add_argument("--share", default="1/1", help="I/N: every N-th test of each part, from the I-th on")
    parser.add_argument("extra", nargs="*", help="after --: for pytest")
    args = parser.parse_args()
    good = True
    for part in args.part or PARTS:
        for row in run_part(part, args.extra, args.share):  # each part is written as soon as it is done
            if left := row.pop("left"):
                sys.stdout.write(f"{row['part']}: {left} tests are left; its row is written when all have ended\n")
                good = good and args.share != "1/1"
            else:
                write_rows(args.output, [stamped(row)], ("part",))
            good = good and bool(row["passed"]) and not row["failed"] and STOPPED not in str(row["notes"])
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
