"""The import rules of docs/architecture.md, read from the source with ast."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rmtkern"


def imports(path: Path) -> set[str]:
    """Modules of rmtkern that a file imports, as dotted names below rmtkern."""
    module = path.relative_to(ROOT).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module[: -node.level], *([base] if base else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("rmtkern.") for name in names if name.startswith("rmtkern.")}
    return found


def offenders(folder: str, banned: tuple[str, ...]) -> list[str]:
    files = [PACKAGE / folder] if folder.endswith(".py") else sorted((PACKAGE / folder).rglob("*.py"))
    assert files and all(path.exists() for path in files), folder
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in sorted(imports(path))
        if any(name == ban or name.startswith(ban + ".") for ban in banned)
    ]


TOP = ("cli", "demo", "advice", "pattern_timing", "api", "evaluation", "packing", "training")
RIGHT = ("nn", "ops", "layouts", "_C")
LEFT = ("pruning", "spectrum", "models", "arrays", "certificates")


def test_spectrum_knows_only_mathematics():
    assert offenders("spectrum", (*TOP, *RIGHT, "pruning", "models")) == []


def test_what_anyone_may_import_knows_nothing_of_ours():
    for name in (
        "gpu.py",
        "triton_target.py",
        "activations.py",
        "errors.py",
        "ranks.py",
        "places.py",
        "spectral_linear.py",
    ):
        assert offenders(name, (*TOP, *LEFT, *RIGHT)) == []


def test_pruning_knows_no_storage_and_no_kernel():
    assert offenders("pruning", (*TOP, *RIGHT)) == []
    assert offenders("models.py", (*TOP, *RIGHT, "pruning", "spectrum")) == []


def test_training_knows_models_and_plans_and_no_kernel():
    assert offenders("training", (*RIGHT, "packing", "spectrum", "api", "cli", "demo")) == []
    assert offenders("loading.py", (*RIGHT, "packing", "spectrum", "training", "api", "cli")) == []
    assert {"models", "pruning.plan"} <= set().union(*map(imports, (PACKAGE / "training").glob("*.py")))
    for name in ("masks", "schedule", "loss", "batches", "ranks", "ema", "config", "report", "checkpoint"):
        assert offenders(f"training/{name}.py", ("training.loop",)) == []


def test_the_files_of_packing_import_only_what_is_below_them():
    rows = (
        ("timing", "dtype", "decisions", "watch", "gated", "lent", "outputs"),
        ("events", "report", "multihead"),
        ("device", "sites"),
        ("attention", "norm", "mlp", "layers"),
        ("normed", "swaps"),
        ("trials", "pairs", "fusing", "guard", "summary", "unpack"),
        ("pack",),
    )
    assert {name for row in rows for name in row} | {"__init__"} == {p.stem for p in (PACKAGE / "packing").glob("*.py")}
    for index, row in enumerate(rows):
        banned = ("packing", *(f"packing.{name}" for above in rows[index:] for name in above))
        for name in row:
            found = imports(PACKAGE / f"packing/{name}.py")
            assert [f"{name} imports {ban}" for ban in banned if ban in found] == []


def test_layouts_know_no_spectrum_and_no_pruning():
    assert offenders("layouts", (*TOP, *LEFT, "nn", "ops")) == []
    assert offenders("ops.py", (*TOP, *LEFT, "nn")) == []
    assert offenders("nn.py", (*TOP, *LEFT)) == []


def test_the_columns_meet_only_at_the_top():
    assert offenders("api.py", ("packing", *RIGHT, "cli", "demo")) == []
    right = ("packing", "testing.py", "files.py", "storage.py", "shards.py", "pretrained.py", "foreign.py")
    for name in (*right, "onnx_export.py"):
        assert offenders(name, ("api", "pruning", "spectrum", "cli", "demo")) == []
    for name in ("certificates", "gradual.py"):
        assert offenders(name, ("packing", *RIGHT, "cli", "demo")) == []
    assert offenders("sweep.py", (*RIGHT, "cli", "demo")) == []
    timing = {"packing.timing", "packing.timing.Timer"}  # the type of what its caller may pass on
    assert {name for name in imports(PACKAGE / "sweep.py") if name.startswith("packing")} == timing
    for name in ("api.py", "evaluation.py", "pruning", "spectrum", "models.py"):
        assert offenders(name, ("certificates", "sweep", "gradual")) == []
    for name in ("certificates", "gradual.py", "files.py", "speed.py", "advice.py", "pattern_timing.py"):
        assert offenders(name, ("sweep",)) == []  # which meets the other column through speed
    for name in ("token_merging.py", "macs.py"):
        assert offenders(name, (*TOP, *RIGHT, "spectrum")) == []
    for folder in sorted(path.name for path in PACKAGE.glob("*") if path.name not in ("report", "cli", "__init__.py")):
        if (PACKAGE / folder).suffix == ".py" or (PACKAGE / folder / "__init__.py").exists():
            assert offenders(folder, ("report",)) == []
    for name in ("svg", "page", "figures", "contents"):
        assert offenders(f"report/{name}.py", ("report.write", "report.source", "files", "loading", "storage")) == []
    assert imports(PACKAGE / "peers.py") == set()
    for name in ("packing", "api.py", "speed.py", "advice.py", "files.py"):
        assert offenders(name, ("comparison", "peers")) == []
    assert [name for name in imports(PACKAGE / "report/svg.py") if not name.startswith("markup")] == []
    assert offenders("evaluation.py", (*RIGHT, "packing", "pruning", "spectrum", "cli", "demo")) == []


def test_one_layout_never_imports_another():
    folders = [path.name for path in (PACKAGE / "layouts").iterdir() if (path / "weight.py").exists()]
    assert folders
    for name in folders:
        others = tuple(f"layouts.{other}" for other in folders if other != name)
        assert offenders(f"layouts/{name}", others) == []


def test_every_layout_has_a_reference():
    for weight in (PACKAGE / "layouts").glob("*/weight.py"):
        assert (weight.parent / "reference.py").exists(), weight.parent.name


def test_import_is_lean():
    code = (
        "import torch, sys; before = set(sys.modules); import rmtkern;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}"
        " & {'triton', 'cupy', 'matplotlib', 'scipy', 'timm', 'transformers', 'torchvision', 'PIL'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_no_build_flag_chooses_an_instruction_set():
    assert "-march" not in (ROOT / "setup.py").read_text()
    assert "-mavx" not in (ROOT / "setup.py").read_text()


def test_wheel_names_and_folders():
    for name in ("utils.py", "helpers.py", "common.py"):
        assert list(PACKAGE.rglob(name)) == []
