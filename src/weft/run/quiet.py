"""Importing this keeps off the terminal what torchao and bitsandbytes say of kernels that they have for other machines.

It must come before the two, which PEFT and transformers import where they are installed: a process loads it first.
"""

import logging

for library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
    logging.getLogger(library).setLevel(logging.ERROR)
