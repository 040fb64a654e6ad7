"""All that knows of DeepSpeed, of other ranks or of a device.

launchers.py reads who started this process, distributed.py joins the others, zero.py puts a module under DeepSpeed
ZeRO, ema.py shards its averages, optim.py and schedules.py move its weights, checkpoint.py keeps all of it. feed.py
brings batches to the device; signals.py is how a process is asked to stop, and how it ends; device.py: peaks, memory.
"""
