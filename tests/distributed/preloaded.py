"""What the fork server has done before the first rank is forked; imported last, for its effects."""

import gc

import sentencepiece  # noqa: F401
import torch

from megatron_iiet.config import RunConfig, config_from_dict, config_to_dict
from megatron_iiet.ops import resolve_backend

torch.set_num_threads(1)  # a pool of threads would not survive the fork
resolve_backend("auto", "cpu")  # the extension is loaded and registered: 0.2 s
config_from_dict(config_to_dict(RunConfig()))  # the parsers of all sections are built: 0.3 s
# All that is imported by now stays. DeepSpeed collects garbage a dozen times at every start, which takes
# 0.25 s each time with the modules to look through.
gc.collect()
gc.freeze()
