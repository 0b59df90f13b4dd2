"""What a report says of a model, as data: layers with their zeros, bytes and spectra, and what was measured elsewhere.

It gathers and computes; it knows no HTML and draws nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from rmtkern.certificates.report import Certificate
from rmtkern.evaluation import Evaluation
from rmtkern.models import PrunableWeight, check_values, layer_type
from rmtkern.packing.decisions import DecisionKey, Decisions
from rmtkern.packing.layers import PLAIN, SPARSITY_STEP
from rmtkern.packing.report import LayerReport, PackReport, is_dense
from rmtkern.pruning.plan import Count, PrunePlan
from rmtkern.spectrum.fit import SpectralFit, fit_singular_values, spectra_of
from rmtkern.spectrum.histogram import SpectralHistogram, spectral_histogram
from rmtkern.sweep import Sweep

__all__ = ["Contents", "Layer", "Timing", "layers_of", "plan_note", "timings"]


@dataclass(frozen=True)
class Layer:
    """One weight of the model.

    Args:
        name: of the parameter.
        role: one of models.ROLES.
        shape: (N, K) of the matrix.
        zeros: entries that are exactly 0.
        nbytes: of the dense weight.
        fit: of its spectrum; None where it has no spectrum of one matrix.
        histogram: of its spectrum; None where the fit has no bulk.
        why: why there is no histogram, or "".
    """

    name: str
    role: str
    shape: tuple[int, int]
    zeros: int
    nbytes: int
    fit: SpectralFit | None
    histogram: SpectralHistogram | None
    why: str = ""

    @property
    def total(self) -> int:
        """Entries of the weight."""
        return self.shape[0] * self.shape[1]

    @property
    def count(self) -> Count:
        """Zeros among its weights."""
        return Count(self.zeros, self.total)


@dataclass(frozen=True)
class Timing:
    """One form of one group of alike layers at one token count.

    Args:
        layers: the layer that was timed for its group, or the shape and zeros of the group.
        tokens: T.
        form: a label.
        ms: time of one call [ms].
        gain: the fastest dense form over this one; of a gate-up pair, its linears in their chosen forms over this one.
        chosen: whether it runs now; None if only the times are known.
    """

    layers: str
    tokens: int
    form: str
    ms: float
    gain: float | None
    chosen: bool | None


@dataclass(frozen=True)
class Contents:
    """Everything that a page says.

    Args:
        title: of the page.
        source: where the weights come from, in words.
        layers: in the order of the model; at least one.
        parameters: of the whole model.
        nbytes: of all parameters, dense.
        dtypes: of the layers' dense weights, such as "float32".
        nbytes_packed: of all tensors as they are packed; None if nothing is packed.
        nbytes_file: of the file; None without one.
        plan: of the pruning, if known.
        packing: what pack_ measured, if known.
        decisions: times of layers, if known without the choices.
        sweeps: accuracy and latency over sparsity.
        scores: name of a state of the model, such as "pruned" -> what it scored.
        certificate: what can be guaranteed about the pruning, if it was computed.
        notes: what a reader should know of the page, in words.
    """

    title: str
    source: str
    layers: tuple[Layer, ...]
    parameters: int
    nbytes: int
    dtypes: str
    nbytes_packed: int | None = None
    nbytes_file: int | None = None
    plan: PrunePlan | None = None
    packing: PackReport | None = None
    decisions: Decisions | None = None
    sweeps: tuple[Sweep, ...] = ()
    scores: Mapping[str, Evaluation] = field(default_factory=dict)
    certificate: Certificate | None = None
    notes: tuple[str, ...] = ()

    def zeros(self, *groups: str) -> Count:
        """Zeros among the weights of some layer types ("attn", "mlp", "other"); of all without any."""
        counts = [layer.count for layer in self.layers if not groups or layer_type(layer.role) in groups]
        return Count(sum(count.zeros for count in counts), sum(count.total for count in counts))

    def packed(self, layer: Layer) -> LayerReport | None:
        """What pack_ reported of a layer."""
        return self._packed.get(layer.name)

    @property
    def _packed(self) -> Mapping[str, LayerReport]:
        # a projection of nn.MultiheadAttention is `in_proj_weight` as a parameter and `in_proj` as a linear
        found = self.packing.layers if self.packing is not None else ()
        return {name: layer for layer in found for name in (f"{layer.name}.weight", f"{layer.name}_weight")}


def layers_of(weights: Sequence[PrunableWeight], show_progress: bool | None = None) -> tuple[Layer, ...]:
    """Count, fit and sort into bars every weight.

    Args:
        weights: of a model that is not packed.
        show_progress: a bar; None: only on a terminal.

    Raises:
        ValueError: NaN or Inf weights, or weights on the meta device.
    """
    check_values(weights)
    single = {weight.name: weight.as_matrix() for weight in weights if weight.groups == 1}
    spectra = spectra_of(single, show_progress=show_progress)
    layers = []
    for weight in weights:
        data = weight.parameter.detach()
        zeros = data.numel() - int(data.count_nonzero())
        fit = histogram = None
        why = "" if weight.groups == 1 else f"a convolution of {weight.groups} groups, which is no one matrix"
        if weight.groups == 1:
            fit = fit_singular_values(spectra[weight.name], weight.shape)
            if fit.sigma2:
                histogram = spectral_histogram(spectra[weight.name], fit, weight.name)
            else:
                why = f"no law was fitted: {', '.join(fit.flags)}"
        layers.append(Layer(weight.name, weight.role, weight.shape, zeros, data.nbytes, fit, histogram, why))
    return tuple(layers)


def plan_note(plan: PrunePlan, weights: Sequence[PrunableWeight]) -> str:
    """Whether the weights have exactly the zeros of a plan, in words."""
    known = {weight.name: weight for weight in weights}
    other = [layer.name for layer in plan.layers if not layer.holds(known.get(layer.name))]
    if not other:
        return f"The zeros of all {len(plan.layers)} pruned weights are exactly those of the plan."
    names = ", ".join(other[:4]) + (", ..." if len(other) > 4 else "")
    return f"The zeros of {len(other)} of {len(plan.layers)} pruned weights are not those of the plan: {names}."


def timings(report: PackReport | None, decisions: Decisions | None) -> list[Timing]:
    """Every form that was timed, group by group, the fastest first."""
    found: list[Timing] = []
    if report is not None:
        for layer in report.layers:
            if layer.measured_on == layer.name:
                forms = [PLAIN] if layer.form == "nn.Linear" else layer.form.split(" | ")
                found += _sorted(layer.name, layer.ms, _fastest_dense, forms)
        for pair in report.gated:
            found += _sorted(f"{pair.name} (gate and up)", pair.ms, _separate, [pair.form or SEPARATE])
    for key, ms in (decisions or {}).items():
        found += _sorted(_group(key), ms, _fastest_dense, None)
    return found


SEPARATE = "separate"


def _separate(times: Mapping[str, float]) -> float | None:
    return times.get(SEPARATE)


def _fastest_dense(times: Mapping[str, float]) -> float | None:
    return min((ms for form, ms in times.items() if is_dense(form)), default=None)


def _group(key: DecisionKey) -> str:
    activation = f" + {key.activation}" if key.activation else ""
    low = 100 * SPARSITY_STEP * key.sparsity_step
    zeros = f"{low:g} to {low + 100 * SPARSITY_STEP:g} % zeros"
    return f"{key.shape[0]}x{key.shape[1]} {key.dtype}{activation}, {zeros}, {key.threads} thread(s)"


def _sorted(
    group: str,
    ms: Mapping[int, Mapping[str, float]],
    base: Callable[[Mapping[str, float]], float | None],
    forms: Sequence[str] | None,
) -> Iterator[Timing]:
    for tokens, times in ms.items():
        slow = base(times)
        ranked = sorted(times.items(), key=lambda item: item[1])
        runs = None if forms is None else next((form for form, _ in ranked if form in forms), "")
        for form, taken in ranked:
            gain = None if slow is None or taken <= 0 else slow / taken
            yield Timing(group, tokens, form, taken, gain, None if runs is None else form == runs)
