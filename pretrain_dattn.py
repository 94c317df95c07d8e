"""Trains a D-Attn vision-language model: `torchrun pretrain_dattn.py --tp 4 --pp 2`.

The way to the attention: here -> dattn_mcore/training/main.py (processes) -> training/loop.py
(the run) -> training/step.py (one step) -> models/dattn.py (the model) ->
layers/decomposed_attention.py.
"""

import sys

from dattn_mcore.training.main import main

if __name__ == "__main__":  # the checkpoint writer starts processes that import this file again
    sys.exit(main())
