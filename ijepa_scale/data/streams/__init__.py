"""Sources that are read front to back, for ever, without a copy or an index of them.

opening.py turns a source into shards, and samples.py takes a few images of these for health checks and reports.
dealing.py deals shards to ranks and loader processes; each has streams (shard_stream.py) that shuffle what reading.py
reads of their shards. positions.py says where a stream goes on after a restart.
"""
