"""What calibrated pruning holds beyond the model, at its peak, in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux")

SCRIPT = """
from pathlib import Path
import timm, torch
from benchmarks.memory import status_mib
from rmtkern.api import prune_
from rmtkern.pruning import admm, repair

torch.manual_seed(0)
torch.set_num_threads(1)
admm._STEPS, repair._STEPS = 2, 2  # memory does not depend on them
def model(depth, width):
    return timm.create_model("vit_tiny_patch16_224", depth=depth, embed_dim=width, num_heads=4, img_size=64).eval()
prune_(model(2, 32), 0.5, calibration=torch.randn(8, 3, 64, 64))  # what libraries load once
model, images = model(12, 256), torch.randn(64, 3, 64, 64)
weights = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is held now
before = status_mib("VmRSS")
prune_(model, 0.5, calibration=images).verify(model)
print((status_mib("VmHWM") - before) / weights)
"""


def test_about_twice_the_model_is_the_most():
    """12 blocks of 256 x 1024: a moment is as large, against the model, as in a ViT-B."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < 2.1
