"""`inpo` with its weights split by FSDP over processes on CPUs, where accelerate itself falls back to DDP: the commands
of a JSON file, one after the other, because processes that import everything take longer to start than to train. Each
comes with what its configuration file names as blocks. How each ended is printed; the first that fails is the last."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from inpo.cli import main

_initialise = AcceleratorState.__init__


def _sharded(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    _initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":  # as it does where it does not fall back
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    AcceleratorState.__init__ = _sharded  # type: ignore[method-assign]
    # The next command meets in the same group: addresses of one that has ended stay in the launcher's store.
    PartialState.destroy_process_group = lambda self, group=None: None  # type: ignore[method-assign]
    out = sys.stdout
    for blocks, arguments in json.loads(Path(sys.argv[1]).read_text()):
        os.environ.pop("FSDP_TRANSFORMER_CLS_TO_WRAP", None)
        os.environ |= {} if blocks is None else {"FSDP_TRANSFORMER_CLS_TO_WRAP": blocks}  # as the launcher says it
        sys.argv[1:] = arguments
        try:
            main()
        except SystemExit as end:
            print(f"process {os.environ['RANK']} ended with {end.code or 0}", file=out, flush=True)
            if end.code:
                raise
        AcceleratorState._reset_state(reset_partial_state=True)
