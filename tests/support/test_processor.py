"""The processor and the instruction sets in reports: what they state, in words and as fields."""

from __future__ import annotations

import json

import pytest
import torch

from cadsurgery.kernels import isa
from cadsurgery.support import processor, provenance

CPU = torch.device("cpu")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that is known, and no caps."""
    known = processor.Processor("Abacus 3", "Abacus family 1 model 2", "L1d 48 KiB, L2 1.25 MiB, L3 48 MiB")
    monkeypatch.setattr(processor, "processor", lambda: known)
    for name in processor.CAPS:
        monkeypatch.delenv(name, raising=False)


def test_a_processor_in_a_line_has_model_family_and_outer_caches(told: None) -> None:
    words = processor.processor_in_words()
    assert words.startswith("Abacus 3 (") and "L1" not in words
    assert words.endswith("CPU), Abacus family 1 model 2, L2 1.25 MiB, L3 48 MiB")


def test_instruction_sets_are_ours_torchs_and_the_caps_in_force(
    told: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = processor.instruction_sets()
    assert sets == {
        "kernels": isa.used() or "none (torch operations)",
        "torch": torch.backends.cpu.get_cpu_capability(),
    }
    assert isa.in_words() == processor.sets_in_words(sets) and "capped" not in isa.in_words()
    monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", "AVX2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert processor.instruction_sets() == {
        **sets,
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    assert isa.in_words().endswith(", capped by ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2")


def test_a_run_is_described_by_plain_fields_and_in_a_line(told: None) -> None:
    run = provenance.describe_run(CPU)
    assert json.loads(json.dumps(run)) == run
    assert run["processor"].keys() == {"model", "family", "caches"}
    assert run["instruction_sets"] == processor.instruction_sets()
    assert run["device"] == provenance.device_with_threads(CPU)
    assert run["device"].startswith(processor.processor_in_words())
    assert run["device"].endswith(f"; {isa.in_words()}; {torch.get_num_threads()} threads")
