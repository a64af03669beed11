"""`inpo` with its weights split by FSDP over processes on CPUs, where accelerate itself falls back to DDP."""

import os
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from inpo.cli import main

_initialise = AcceleratorState.__init__


def _sharded(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **named: Any) -> None:
    _initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    AcceleratorState.__init__ = _sharded  # type: ignore[method-assign]
    main()
