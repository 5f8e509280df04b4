"""Messages of libraries that tell the user of this project nothing he could act on."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Silence, by exact origin, what TorchRec and DCP say on every run."""
    # Of every dense table: it has no cache. Of every look-up: which tracing check to call instead.
    for name in ("torchrec.distributed.utils", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The older pair's, of every table: by which device an object is sent.
    for text in ("`_get_pg_default_device` will be", "Multiple backends are registered with this ProcessGroup"):
        warnings.filterwarnings("ignore", message=text, category=UserWarning)
    # FBGEMM on a GPU: which branch its update took, and that Adam's kernels are built without further tuning.
    for text in ("TBE B200 optimization", r"[\s\S]*The training optimizer 'adam' is marked"):
        warnings.filterwarnings("ignore", message=text, category=UserWarning)
    # TorchRec still hands out ShardedTensor; there is nothing to change on this side.
    warnings.filterwarnings("ignore", message="Please use DTensor instead", category=FutureWarning)
    # FBGEMM's dense look-up has its backward; it is only registered under another key (tests compare it with torch's).
    warnings.filterwarnings("ignore", message="fbgemm::dense_embedding_codegen_lookup_function", category=UserWarning)
    # DDP's new options cannot say yet what broadcast_buffers=False says: nothing is exchanged, not even at the start.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
