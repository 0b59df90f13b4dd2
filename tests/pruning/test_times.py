"""Times of patterns: what they hold, what lies between them, their JSON, and what is refused."""

import json

import pytest

from rmtkern.pruning.times import LayerTimes, PatternTimes


def example():
    first = LayerTimes(("a.weight", "b.weight"), (8, 16), 1.0, {"4x1": {0.9: 0.2, 0.5: 0.6}, "2:4": {0.5: 0.7}})
    return PatternTimes((first, LayerTimes(("c.weight",), (4, 8), 3.0, {})), "bfloat16", 2, "a CPU")


def test_times_between_measured_sparsities_lie_on_a_line():
    times = example()
    layer = times.of("b.weight")
    assert layer is times.layers[0] and times.of("d.weight") is None
    assert layer.at("4x1", 0.5) == 0.6 and layer.at("4x1", 0.9) == 0.2
    assert layer.at("4x1", 0.6) == pytest.approx(0.5) and layer.at("2:4", 0.5) == 0.7
    assert layer.at("4x1", 0.49) is None and layer.at("4x1", 0.95) is None and layer.at("1x2", 0.5) is None
    assert times.total_ms() == 5.0 and times.total_ms("4x1", 0.9) == pytest.approx(3.4)
    assert times.total_ms("4x1", 0.3) == 5.0  # not known to be faster


def test_json_and_files(tmp_path):
    times = example()
    times.save(tmp_path / "times.json")
    again = PatternTimes.load(tmp_path / "times.json")
    assert again == times and again.to_json() == times.to_json()
    assert "4x1" in str(times) and "bfloat16 on 2 thread(s) of a CPU" in str(times)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"names": "a.weight"}, TypeError, "names: expected a tuple, got 'a.weight'"),
        ({"names": ()}, ValueError, "names: expected the names of parameters"),
        ({"shape": (8, 0)}, ValueError, r"shape: expected \[N, K\], got \(8, 0\)"),
        ({"dense_ms": 0.0}, ValueError, "dense_ms: expected a finite time above 0 ms, got 0.0"),
        ({"dense_ms": "1"}, TypeError, "dense_ms: expected a time in ms, got '1'"),
        ({"ms": {"4-1": {}}}, ValueError, "unknown pattern '4-1'"),
        ({"ms": {"4x1": {1.0: 2.0}}}, ValueError, r"ms of '4x1': expected sparsities in \[0, 1\), got 1.0"),
        ({"ms": {"4x1": {0.5: float("nan")}}}, ValueError, "ms of '4x1' at 0.5: expected a finite time"),
        ({"ms": {"4x1": 3}}, TypeError, "ms of '4x1': expected times by sparsity, got 3"),
        ({"ms": 3}, TypeError, "ms: expected times by pattern and sparsity, got 3"),
    ],
)
def test_bad_times(fields, error, message):
    with pytest.raises(error, match=message):
        LayerTimes(**{"names": ("a.weight",), "shape": (8, 16), "dense_ms": 1.0, "ms": {}, **fields})


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "times.json"
    with pytest.raises(ValueError, match=r"times.json: .*; give a file that PatternTimes.save wrote"):
        PatternTimes.load(path)
    record = json.loads(example().to_json())
    for text, message in (
        ("{", "not the JSON of PatternTimes"),
        ("{}", "expected a JSON object with format 'rmtkern pattern times', got {}"),
        (json.dumps({**record, "version": 2}), "expected format version 1, got 2"),
        (json.dumps({**record, "layers": [{}]}), "not the JSON of PatternTimes"),
        (json.dumps({**record, "layers": record["layers"] * 2}), "expected each weight once, got a.weight in two"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            PatternTimes.load(path)
    with pytest.raises(TypeError, match="layers: expected LayerTimes, got 3"):
        PatternTimes((3,))
