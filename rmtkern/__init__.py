"""Prune Vision Transformers with random matrix theory and run the pruned model fast.

plan = rmtkern.prune_(model, sparsity=0.7)      # in place; still an ordinary, trainable module
report = rmtkern.pack_(model, example)          # in place; each linear in the form measured fastest here
"""

from rmtkern.advice import Advice, advise
from rmtkern.api import analyze, prune_
from rmtkern.certificates import Certificate, certify
from rmtkern.comparison import Comparison, compare
from rmtkern.errors import KernelUnavailable, PackedModelError
from rmtkern.evaluation import Evaluation, evaluate
from rmtkern.files import load, save
from rmtkern.gradual import Gradual, prune_gradually_
from rmtkern.loading import load_plan, read_checkpoint
from rmtkern.macs import MacReport, count_macs
from rmtkern.onnx_export import export_onnx
from rmtkern.ops import available
from rmtkern.packing import Decisions, PackReport, pack_, unpack_
from rmtkern.pattern_timing import time_patterns
from rmtkern.pretrained import load_pretrained
from rmtkern.pruning.plan import PruneConfig, PrunePlan
from rmtkern.pruning.times import PatternTimes
from rmtkern.report import PageReport, write_report
from rmtkern.shrink_plan import ShrinkPlan
from rmtkern.shrinking import shrink_
from rmtkern.spectral_linear import SpectralLinear, merge_factors_
from rmtkern.spectrum.fit import SpectralFit, SpectralFits, fit_spectra, fit_spectrum
from rmtkern.speed import SpeedReport, prune_to_speed_
from rmtkern.token_merging import TokenMerging, merge_tokens_, unmerge_tokens_
from rmtkern.training.config import FinetuneConfig
from rmtkern.training.loop import finetune_

__version__ = "0.1.0"

__all__ = [
    "Advice",
    "Certificate",
    "Comparison",
    "Decisions",
    "Evaluation",
    "FinetuneConfig",
    "Gradual",
    "KernelUnavailable",
    "MacReport",
    "PackReport",
    "PackedModelError",
    "PageReport",
    "PatternTimes",
    "PruneConfig",
    "PrunePlan",
    "ShrinkPlan",
    "SpectralFit",
    "SpectralFits",
    "SpectralLinear",
    "SpeedReport",
    "TokenMerging",
    "advise",
    "analyze",
    "available",
    "certify",
    "compare",
    "count_macs",
    "evaluate",
    "export_onnx",
    "finetune_",
    "fit_spectra",
    "fit_spectrum",
    "load",
    "load_plan",
    "load_pretrained",
    "merge_factors_",
    "merge_tokens_",
    "pack_",
    "prune_",
    "prune_gradually_",
    "prune_to_speed_",
    "read_checkpoint",
    "save",
    "shrink_",
    "time_patterns",
    "unmerge_tokens_",
    "unpack_",
    "write_report",
]
