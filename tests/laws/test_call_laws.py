"""Nothing of one call is a constant in the next: a network that is converted on one call gives in every other call what
the network as given gives, at its own level, or refuses the call in words."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import pytest
from conftest import assert_same, slow
from random_calls import random_calls

import cadsurgery as cs

EXACT = 1e-9
QUICK, TOGETHER = 2, 25
ALL = 500 if "CADSURGERY_SEEDS" not in os.environ else 3 * int(os.environ["CADSURGERY_SEEDS"])


def result(call: Any) -> Any:
    """What a call returns; None if it raises an error."""
    try:
        return call()
    except Exception:  # the network may refuse a call with any error
        return None


def check(seed: int) -> tuple[int, int]:
    """Convert on the example, and compare every call; return how many were followed and how many refused."""
    case = random_calls(seed)
    if result(lambda: case.model(*case.example)) is None:
        return 0, 0
    own = "all" if "coarsest" in case.options else "none"
    net = cs.adaptify(case.model, own, example_input=case.example, outputs="native", **case.options)
    followed = refused = 0
    for call, each in product((case.example, *case.calls), (net, net.optimize())):
        expected = result(lambda call=call: case.model(*call))
        if expected is None:
            continue
        try:
            ours = each(*call)
        except cs.CadError as refusal:
            assert refusal.why and refusal.next
            refused += 1
            continue
        assert_same(ours, expected, EXACT)
        followed += 1
    return followed, refused


SPANS = [[*range(first, min(first + TOGETHER, ALL))] for first in range(QUICK, ALL, TOGETHER)]


@pytest.mark.filterwarnings("ignore::cadsurgery.CadWarning")
@pytest.mark.parametrize(
    "seeds", [[*range(QUICK)], *map(slow, SPANS)], ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}"
)
def test_every_call_gives_what_the_network_gives(seeds: list[int]) -> None:
    """And most are followed: a law of calls that are refused would hold, too."""
    failed, counts = [], [(0, 0)]
    for seed in seeds:
        try:
            counts.append(check(seed))
        except Exception as error:
            failed.append(f"seed {seed}: {type(error).__name__}: {str(error).splitlines()[0]}")
    followed, refused = map(sum, zip(*counts, strict=True))
    assert failed == [] and followed > 20 * refused
