"""A run on disk: checkpoints that survive a crash, and the record that plots are made from.

A checkpoint is the folder ``step-00000200`` of a run. It is written beside its final name, flushed
to the disk and renamed, so a reader finds a whole checkpoint or none; ``manifest.json`` holds the
SHA-256 of every file in it, so a damaged one is noticed. Nothing here can execute what it reads:
tensors are safetensors, everything else is JSON or flat YAML, and every text file has a size limit.
"""

from graphmoe.checkpoint.manifest import read_manifest, verify, versions
from graphmoe.checkpoint.shards import WholeState, whole_state
from graphmoe.checkpoint.store import latest, restore, save
from graphmoe.files import RunLock, atomic_write_bytes, read_json, write_json
from graphmoe.run_record import RunRecord, read, read_tensors, truncate_metrics, write_records

__all__ = [
    "RunLock",
    "RunRecord",
    "WholeState",
    "atomic_write_bytes",
    "latest",
    "read",
    "read_json",
    "read_manifest",
    "read_tensors",
    "restore",
    "save",
    "truncate_metrics",
    "verify",
    "versions",
    "whole_state",
    "write_json",
    "write_records",
]
