"""Importing this keeps off the terminal what torchao says of kernels that it has for other machines.

It must come before torchao, which PEFT and transformers import where it is installed: a process loads it first.
"""

import logging

for library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(library).setLevel(logging.ERROR)
