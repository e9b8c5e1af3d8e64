"""Compile a program of torch.export with torch's AOTInductor, for this machine: compile.py net.pt2 compiled.pt2.

The package notes the shape of its images, which the compiled code does not check, and the names of its outputs.
"""

import sys

import torch
from torch.utils import _pytree as pytree

source, target = sys.argv[1:]
program = torch.export.load(source)
(image,) = program.example_inputs[0]
tree = pytree.tree_unflatten(range(program.call_spec.out_spec.num_leaves), program.call_spec.out_spec)
names = tree if isinstance(tree, dict) else {"output": tree}
about = {"image": "x".join(map(str, image.shape)), "outputs": ",".join(map(str, names))}
configs = {"aot_inductor.metadata": about}
torch._inductor.aoti_compile_and_package(program, package_path=target, inductor_configs=configs)
