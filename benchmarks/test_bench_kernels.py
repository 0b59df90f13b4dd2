"""The kernel cases under pytest-benchmark; not in the default suite.

    pytest benchmarks/test_bench_kernels.py -k "fc1 and T197 and bitmask"

A test is one form of one case of cases.py; the layout's result is checked before it is timed.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import kernel_cases
from benchmarks.kernel import Layer

DENSE = ("dense torch", "dense onednn", "dense onednn prepacked")
FORMS = [
    pytest.param(case, form, id=f"{case.name} {form}".replace("=", ""))
    for case in kernel_cases()
    for form in (*DENSE, *case.contenders)
]


@pytest.fixture(autouse=True)
def settings():
    """The thread count is the case's, without gradients; put back afterwards."""
    before = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_kernel(benchmark, case, form):
    """One form of one case."""
    missing = []
    layer = Layer(replace(case, contenders=tuple({form} - set(DENSE))), missing.append)
    if form not in layer.calls:
        pytest.skip(" ".join(missing) or "this torch has no oneDNN")
    benchmark.extra_info.update(case=case.name, form=form, **layer.facts[form])
    benchmark.pedantic(layer.calls[form], rounds=7, iterations=layer.inner, warmup_rounds=1)
