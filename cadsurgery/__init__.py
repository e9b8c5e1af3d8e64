"""cadsurgery: content-adaptive downsampling for any convolutional network, by model surgery.

import cadsurgery as cs
net = cs.adaptify(model, mask="edges")
y = net(x)

The public names stand in `__init__.pyi`. Each is imported on first use, so that `import cadsurgery` and the command
line start without waiting for torch.
"""

import lazy_loader

__version__ = "0.3.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
