"""Models whose parameters lie in shards on several processes: FSDP2 and tensor parallelism, torch's own engine."""
