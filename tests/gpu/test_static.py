"""The driver of make gpu-static: every step is run, and one that fails is named."""

from tests.gpu import static
from tests.gpu.static import Ran, Step


def test_a_step_has_its_environment_and_tells_status_output_and_time(tmp_path):
    code = "import os, sys; print(os.environ['GIVEN'], os.environ['TRITON_CACHE_DIR']); sum(range(10**7)); sys.exit(3)"
    ran = static.run(Step("one", ["-c", code], {"GIVEN": "5"}), str(tmp_path))
    assert ran.status == 3 and ran.output == f"5 {tmp_path}\n" and 0 < ran.cpu_s < 60


def test_all_shards_of_both_kinds_and_then_the_matrix(monkeypatch, capsys):
    seen = []

    def run(step, cache):
        seen.append(step)
        return Ran(int(step.name == "compiled 2/3"), 1.0, 2.0, f"said by {step.name}\n")

    monkeypatch.setattr(static, "run", run)
    assert static.main(3) == 1
    shards = {
        (step.environment.get("TRITON_INTERPRET"), step.environment.get("RMTKERN_GPU_SHARD")) for step in seen[:6]
    }
    assert shards == {(kind, f"{i}/3") for kind in (None, "1") for i in (1, 2, 3)}
    assert seen[6].name == "matrix" and len(seen) == 7
    said = capsys.readouterr().out
    assert "said by interpreted 1/3\n== interpreted 1/3: exit 0, CPU 1 s, 2 s" in said
    assert "3 processes, CPU 7 s" in said and said.endswith("failed: compiled 2/3\n")
    monkeypatch.setattr(static, "run", lambda step, cache: Ran(0, 1.0, 2.0, ""))
    assert static.main(1) == 0
