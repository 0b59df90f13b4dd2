"""export_onnx: the zeros and bits of every pruned weight stand in the file, and other engines compute the same."""

import copy
import importlib.util

import numpy as np
import pytest
import timm
import torch
from torch import nn

import rmtkern
from rmtkern.onnx_export import export_onnx
from rmtkern.packing import is_packed, pack_
from tests.fuzz import ours_wins
from tests.test_pytorch import IMAGES, everything, packed, vit

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

ENGINES = ("onnxruntime", "openvino")


def initializers(path):
    return [onnx.numpy_helper.to_array(one) for one in onnx.load(str(path)).graph.initializer]


def holds(arrays, weight):
    """Whether a weight [N, K] stands among the arrays with all of its bits, as it is or transposed."""
    weight = weight.detach().numpy()
    return any(any(np.array_equal(array, form) for form in (weight, weight.T)) for array in arrays)


def run(engine, path, *inputs):
    """What an engine computes in float32; skipped visibly where it is not installed."""
    module = pytest.importorskip(engine)
    if engine == "onnxruntime":
        session = module.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feed = dict(zip([one.name for one in session.get_inputs()], inputs, strict=True))
        return torch.from_numpy(session.run(None, {name: x.numpy() for name, x in feed.items()})[0])
    core = module.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return torch.from_numpy(compiled([x.numpy() for x in inputs])[0])


def assert_as_accurate_as_float32(got, model, *inputs):
    """At most 4 times the error of PyTorch's float32 model against its float64 one, plus 16 eps of the largest output.

    Both errors are of float32 sums in another order, whose sizes differ by chance; the 16 eps are for the other
    engines' own erf and exp, which are right to a few eps.
    """
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        theirs = float((model(*inputs).double() - exact).abs().max())
    assert got.shape == exact.shape and got.dtype == torch.float32
    error = float((got.double() - exact).abs().max())
    assert error <= 4 * theirs + 16 * torch.finfo(torch.float32).eps * float(exact.abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed ViT and a model of everything that can be packed, exported; with the dense ones they were."""
    path = tmp_path_factory.mktemp("onnx")
    model, dense = packed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, path / "vit.onnx", IMAGES)
    assert is_packed(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    mixed, plain, x = everything()
    export_onnx(mixed, path / "mixed.onnx", (x,))
    return path, dense, plain


def test_zeros_and_bits_are_kept(folder):
    path, dense, plain = folder
    arrays = initializers(path / "vit.onnx")
    pruned = [p for name, p in dense.named_parameters() if p.ndim == 2 and float((p == 0).float().mean()) > 0.5]
    assert len(pruned) == 4 and all(holds(arrays, weight) for weight in pruned)
    zeros = sum(int((weight == 0).sum()) for weight in pruned)
    assert sum(int((array == 0).sum()) for array in arrays if array.ndim == 2) >= zeros
    arrays = initializers(path / "mixed.onnx")
    weights = [p for p in plain.parameters() if p.ndim == 2 and bool((p == 0).any())]
    assert len(weights) == 8 and all(holds(arrays, weight) for weight in weights)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_compute_the_same(engine, folder):
    """Also nn.MultiheadAttention, a gate-up pair, a lent weight, LayerNorm and an absorbed activation."""
    path, dense, plain = folder
    for batch in (1, 2, 5):  # any size, though the examples had two and one
        images, x = torch.randn(batch, 3, 32, 32), torch.randn(batch, 7, 40)
        assert_as_accurate_as_float32(run(engine, path / "vit.onnx", images), dense, images)
        assert_as_accurate_as_float32(run(engine, path / "mixed.onnx", x), plain, x)


def test_a_model_that_was_packed_in_bfloat16_is_written_in_float32(tmp_path):
    model, _ = packed(torch.bfloat16)
    export_onnx(model, tmp_path / "vit.onnx", IMAGES)
    plain = copy.deepcopy(model)
    rmtkern.unpack_(plain)
    arrays = initializers(tmp_path / "vit.onnx")
    assert all(holds(arrays, p) for name, p in plain.named_parameters() if p.ndim == 2)
    assert {str(array.dtype) for array in arrays} <= {"float32", "int64"}
    assert_as_accurate_as_float32(run("onnxruntime", tmp_path / "vit.onnx", IMAGES), plain, IMAGES)


def test_merged_tokens_are_merged_in_the_file(tmp_path):
    """And put back at the end; in any batch, whose images merge other tokens each."""
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    for parameter in model.parameters():  # so that tokens differ
        parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        before = model(IMAGES)
    rmtkern.merge_tokens_(model, 3, restore=True)
    export_onnx(model, tmp_path / "vit.onnx", IMAGES)
    assert [node.op_type for node in onnx.load(str(tmp_path / "vit.onnx")).graph.node].count("TopK") >= 2
    for engine in ENGINES:
        if engine == "openvino" and importlib.util.find_spec(engine) is None:
            continue  # test_engines_compute_the_same says that it is missing
        for batch in (1, 2, 5):
            images = torch.randn(batch, 3, 32, 32)
            assert_as_accurate_as_float32(run(engine, tmp_path / "vit.onnx", images), model, images)
    with torch.no_grad():
        assert float((model(IMAGES) - before).abs().max()) > 1e-3 * float(before.abs().max())  # merging does something


class Order(nn.Module):
    def __init__(self, dim, descending):
        super().__init__()
        self.dim, self.descending = dim, descending

    def forward(self, x):
        return x.sort(dim=self.dim, descending=self.descending, stable=True).indices.float()


@pytest.mark.parametrize(("dim", "descending"), [(-1, True), (1, False)])
def test_equal_numbers_stay_in_order(dim, descending, tmp_path):
    """Of equally similar tokens those of lower index are merged: ONNX's TopK is stable, though OpenVINO's is not."""
    model, x = Order(dim, descending).eval(), torch.randint(0, 3, (2, 40, 30)).float()
    export_onnx(model, tmp_path / "order.onnx", x)
    assert torch.equal(run("onnxruntime", tmp_path / "order.onnx", x), model(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_text_model_and_its_keyword_arguments(engine, tmp_path, recwarn):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=100, **sizes)).eval()
    ids = torch.randint(0, 100, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    rmtkern.prune_(model, 0.6, "uniform", show_progress=False)
    plain = copy.deepcopy(model)
    pack_(model, {"input_ids": ids, "attention_mask": mask}, timer=ours_wins, show_progress=False)
    export_onnx(model, tmp_path / "bert.onnx", {"input_ids": ids, "attention_mask": mask})
    assert [str(one.message) for one in recwarn if "axis name" in str(one.message)] == []
    inputs = onnx.load(str(tmp_path / "bert.onnx")).graph.input
    assert [one.name for one in inputs] == ["input_ids", "attention_mask"]
    for repeat in (1, 2):
        given = (ids.repeat(repeat, 1), mask.repeat(repeat, 1))
        got = run(engine, tmp_path / "bert.onnx", *given)
        with torch.no_grad():
            want = plain(input_ids=given[0], attention_mask=given[1])[0]
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(8, 4), nn.Parameter(torch.randn(3, 4))

    def forward(self, x, scale, *, shift=None):
        y = self.linear(x) * scale
        return y if shift is None else y + shift


@pytest.mark.parametrize("batch", [1, 3])
def test_arguments_become_inputs_by_name_and_only_the_batch_varies(batch, tmp_path):
    model = TwoInputs().eval()
    export_onnx(model, tmp_path / "two.onnx", {"x": torch.randn(batch, 8), "scale": torch.randn(4)})
    inputs = onnx.load(str(tmp_path / "two.onnx")).graph.input
    sizes = {one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in inputs}
    assert sizes == {"x": ["batch", 8], "scale": [4]}
    x, scale = torch.randn(2, 8), torch.randn(4)
    assert_as_accurate_as_float32(run("onnxruntime", tmp_path / "two.onnx", x, scale), model, x, scale)


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(x) + (torch.zeros(4) if x.shape[0] == 2 else torch.ones(4))


class Untraceable(Fixed):
    def forward(self, x):
        return self.linear(x) if float(x.sum()) > 0 else self.linear(-x)


def test_a_model_of_one_batch_size_is_told_what_to_do(tmp_path):
    for model in (Fixed(), Untraceable()):
        with pytest.raises(ValueError, match=r"cannot export the model for every batch size; with dynamic_batch=False"):
            export_onnx(model.eval(), tmp_path / "fixed.onnx", torch.randn(2, 8))
    with pytest.raises(torch.onnx.OnnxExporterError):
        export_onnx(model, tmp_path / "fixed.onnx", torch.randn(2, 8), dynamic_batch=False)
    assert list(tmp_path.iterdir()) == []
    export_onnx(Fixed().eval(), tmp_path / "fixed.onnx", torch.randn(2, 8), dynamic_batch=False)
    assert [file.name for file in tmp_path.iterdir()] == ["fixed.onnx"]
    sizes = onnx.load(str(tmp_path / "fixed.onnx")).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_value for d in sizes] == [2, 8]


def test_pytorchs_own_export_of_a_packed_model_gives_advice(tmp_path):
    model, _ = packed()
    with pytest.raises(
        torch.onnx.OnnxExporterError, match=r"no operator for packed weights; call rmtkern\.export_onnx"
    ):
        torch.onnx.export(model, (IMAGES,), str(tmp_path / "vit.onnx"), dynamo=True, verbose=False)
    with torch.no_grad():
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # which asks the same fake operators
        assert torch.equal(compiled(IMAGES), model(IMAGES))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "vit.onnx").write_text("old")

    def fail(self, path, **options):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_onnx(vit(), tmp_path / "vit.onnx", IMAGES)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_weights_beside_a_large_graph_are_renamed_with_it(tmp_path, monkeypatch):
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    model = vit()
    export_onnx(model, tmp_path / "vit.onnx", IMAGES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vit.onnx", "vit.onnx.data"]
    assert_as_accurate_as_float32(run("onnxruntime", tmp_path / "vit.onnx", IMAGES), model, IMAGES)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "vit"}, TypeError, "model: expected an nn.Module, got str"),
        ({"model": vit().train()}, ValueError, r"expected eval mode, got train mode; call model\.eval"),
        ({"path": "vit.pt"}, ValueError, r"vit\.pt: expected a name that ends in \.onnx"),
        ({"example": [IMAGES]}, TypeError, "example: expected a tensor, a tuple .* got list"),
        ({"example": (1, torch.tensor(2))}, ValueError, "expected a tensor with a batch dimension in it, got none"),
    ],
)
def test_bad_input(change, error, message, tmp_path):
    asked = {"model": vit(), "path": tmp_path / "vit.onnx", "example": IMAGES, **change}
    with pytest.raises(error, match=message):
        export_onnx(**asked)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs onnx and onnxscript: pip install 'rmtkern\[onnx\]'"):
        export_onnx(vit(), tmp_path / "vit.onnx", IMAGES)


def test_a_lone_packed_linear_cannot_be_swapped(tmp_path):
    model, _ = packed()
    with pytest.raises(ValueError, match=r"cannot be swapped in place; use linear = packed\.unpack"):
        export_onnx(model.blocks[0].attn.qkv, tmp_path / "linear.onnx", torch.randn(2, 64))
