"""The cost model: FLOPs, bytes and memory from shapes alone, and what devices can do at best."""
