"""Other engines that run the same dense model: one function each, from a torch model to a call.

A peer gets the model, an example and a thread count; it knows nothing about rmtkern.
"""

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PEERS", "Call", "Peer", "PeerMissing", "in_bfloat16", "prepare"]

Call = Callable[[], Tensor]


class PeerMissing(ImportError):
    """A package that a peer needs is not installed, or it cannot run here; the message says how to get it."""


@dataclass(frozen=True)
class Peer:
    """One engine in one precision.

    Args:
        dtype: "float32", "bfloat16" or "int8".
        needs: import names of packages beyond torch.
        build: (model in eval mode, example, threads) -> a call that returns the output. The example is images
            [B, C, H, W] float32, or token ids [B, T] int64.
    """

    dtype: str
    needs: tuple[str, ...]
    build: Callable[[nn.Module, Tensor, int], Call]


def in_bfloat16(example: Tensor) -> Tensor:
    """What a bfloat16 model gets for an example: token ids stay what they are."""
    return example.bfloat16() if example.is_floating_point() else example


def _torch_fp32(model: nn.Module, example: Tensor, threads: int) -> Call:
    return lambda: model(example)


def _compile_fp32(model: nn.Module, example: Tensor, threads: int) -> Call:
    torch._dynamo.reset()  # compiled code holds the thread count it was compiled for
    compiled = torch.compile(deepcopy(model))
    return lambda: compiled(example)


def _torch_bf16(model: nn.Module, example: Tensor, threads: int) -> Call:
    narrow = deepcopy(model).bfloat16()
    return lambda: narrow(in_bfloat16(example))


def _compile_bf16(model: nn.Module, example: Tensor, threads: int) -> Call:
    torch._dynamo.reset()  # compiled code holds the thread count it was compiled for
    narrow = torch.compile(deepcopy(model).bfloat16())
    return lambda: narrow(in_bfloat16(example))


def _torch_int8(model: nn.Module, example: Tensor, threads: int) -> Call:
    """Linears with int8 weights and activations quantised at each call; the rest in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch.ao is deprecated for torchao, which is slower on the CPU without compile
        quantised = torch.ao.quantization.quantize_dynamic(deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return lambda: quantised(example)


def _onnxruntime(model: nn.Module, example: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (example,), str(path), dynamo=True, verbose=False, input_names=["x"])
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x": example.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _to_openvino(model: nn.Module, example: Tensor) -> Any:
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = (list(example.shape), example.numpy().dtype.type)
        return openvino.convert_model(model, example_input=example, input=[given])


def _run_openvino(converted: Any, example: Tensor, threads: int, precision: str) -> Call:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(converted, "CPU", options)
    got = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if got != precision:
        raise PeerMissing(f"OpenVINO runs {got} on this CPU where {precision} was asked for")
    array = example.numpy()
    return lambda: torch.from_numpy(compiled([array], share_inputs=True)[0])


def _openvino_fp32(model: nn.Module, example: Tensor, threads: int) -> Call:
    return _run_openvino(_to_openvino(model, example), example, threads, "f32")


def _openvino_bf16(model: nn.Module, example: Tensor, threads: int) -> Call:
    return _run_openvino(_to_openvino(model, example), example, threads, "bf16")


def _openvino_int8(model: nn.Module, example: Tensor, threads: int) -> Call:
    """Post-training quantisation of weights and activations, calibrated on the example; the rest in bfloat16."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    converted = _to_openvino(model, example)
    data = nncf.Dataset([example.numpy()])
    quantised = nncf.quantize(converted, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=1)
    return _run_openvino(quantised, example, threads, "bf16")


PEERS: dict[str, Peer] = {
    "torch-fp32": Peer("float32", (), _torch_fp32),
    "torch-bf16": Peer("bfloat16", (), _torch_bf16),
    "compile-fp32": Peer("float32", (), _compile_fp32),
    "compile-bf16": Peer("bfloat16", (), _compile_bf16),
    "onnxruntime-fp32": Peer("float32", ("onnxruntime", "onnx", "onnxscript"), _onnxruntime),
    "openvino-fp32": Peer("float32", ("openvino",), _openvino_fp32),
    "openvino-bf16": Peer("bfloat16", ("openvino",), _openvino_bf16),
    "torch-int8": Peer("int8", (), _torch_int8),
    "openvino-int8": Peer("int8", ("openvino", "nncf"), _openvino_int8),
}


def prepare(name: str, model: nn.Module, example: Tensor, threads: int) -> Call:
    """A peer's call on this model and example.

    Args:
        name: a key of PEERS.
        model: in eval mode, float32; not changed, and kept alive by the call.
        example: images [B, C, H, W] float32, or token ids [B, T] int64.
        threads: that the peer may use; torch's own count must be set to the same.

    Raises:
        PeerMissing: a package is missing.
        ValueError: an unknown name.
    """
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}; valid: {', '.join(PEERS)}")
    missing = [need for need in PEERS[name].needs if importlib.util.find_spec(need) is None]
    if missing:
        packages = " and ".join(missing)
        raise PeerMissing(f"peer {name} needs {packages}; install the bench extra: pip install 'rmtkern[bench]'")
    return PEERS[name].build(model, example, threads)
