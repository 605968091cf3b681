"""Many samples of a bundle as a folder of shards: a restart makes only the shards that are missing.

Each shard is a function of the bundle, the plan and the shard's number.
"""
