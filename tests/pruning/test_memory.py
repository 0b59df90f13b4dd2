"""What pruning holds beyond the model, at its peak, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux")

SCRIPT = """
from pathlib import Path
import timm, torch
from benchmarks.memory import status_mib, weights_mib
from rmtkern.api import prune_
from rmtkern.pruning import admm, repair
from rmtkern.pruning.memory import give_memory_back

torch.manual_seed(0)
torch.set_num_threads(1)
admm._STEPS, repair._STEPS = 2, 2  # memory does not depend on them
def model(depth, width):
    return timm.create_model("vit_tiny_patch16_224", depth=depth, embed_dim=width, num_heads=4, img_size=64).eval()
def images(count):
    return {"calibration": torch.randn(count, 3, 64, 64)} if CALIBRATED else {}
for method in METHODS:
    prune_(model(2, 32), 0.5, method, **images(8))  # what libraries load once
    whole, given = model(12, 256), images(64)
    if not CALIBRATED:  # whose bound is of what a model holds that has run before
        give_memory_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
    before = status_mib("VmRSS")
    prune_(whole, 0.5, method, **given).verify(whole)
    print((status_mib("VmHWM") - before) / weights_mib(whole))
"""


def peaks(methods, calibrated):
    """Most that is held while each method prunes 12 blocks of 256 x 1024, in units of the model's weights."""
    script = f"METHODS, CALIBRATED = {methods!r}, {calibrated!r}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [float(line) for line in done.stdout.split()]


def test_about_twice_the_model_is_the_most_with_images():
    """A moment is as large, against the model, as in a ViT-B."""
    (calibrated,) = peaks(("auto",), True)
    assert calibrated < 2.1


def test_less_than_the_model_is_enough_without_images():
    """Two methods whose keys follow from ranks, two by the scores: masks, then what is put back if writing fails."""
    without = peaks(("row", "uniform", "magnitude", "seb"), False)
    assert max(without) < 1.0, without
