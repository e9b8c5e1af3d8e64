"""Time the comparison of attributes and global values before a call: microseconds, best of many.

    python -m benchmarks.compared_values [NAME ...]

NAMES are of timm or torchvision, with random weights. A network's modules are compared, too (hooks, replaced modules).
"""

from __future__ import annotations

import sys
import timeit
import warnings

import torch

import cadsurgery as cs
from cadsurgery.support.processor import processor_in_words
from cadsurgery.tasks.open import open_converted

NAMES = ("convnext_tiny", "efficientnet_b3", "regnety_032", "tf_efficientnet_b7")
ROUNDS = 200


def main() -> None:
    """Print a line for each network."""
    torch.set_num_threads(1)
    print(processor_in_words())
    for name in sys.argv[1:] or NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", cs.CadWarning)
            net = open_converted(name, "none")
        program = net.program
        program.check_outside()
        values, modules = (
            1e6 * min(timeit.repeat(check, number=1, repeat=ROUNDS))
            for check in (program.check_outside, program.check_modules)
        )
        count, compared = len(list(net.modules())), len(program.outside.values)
        print(f"{name}: {count} modules, {compared} values in {values:.0f} us, modules in {modules:.0f} us")


if __name__ == "__main__":
    main()
