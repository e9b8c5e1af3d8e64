"""What takes seconds to import, as an environment with the base packages alone has it: `alone` imports it once."""

import environments

environments.show()

import timm  # noqa: E402, F401
import torch  # noqa: E402, F401
import torchvision  # noqa: E402, F401
