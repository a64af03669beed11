"""Who runs the shard worker: this process (or as many as accelerate launches), or Ray."""
