from graphmoe.nn.memory.addressing import ContentConv, SlotWriteConv
from graphmoe.nn.memory.dnc_cell import DNCCell, DNCState
from graphmoe.nn.memory.dnc_memory import DNCMemory, SlotState
from graphmoe.nn.memory.linkage import LinkConv
from graphmoe.nn.memory.memory_bank import MemoryBank
from graphmoe.nn.memory.read_conv import ReadConv
from graphmoe.nn.memory.recall_conv import RecallConv
from graphmoe.nn.memory.write_conv import WriteConv

__all__ = [
    "ContentConv",
    "DNCCell",
    "DNCMemory",
    "DNCState",
    "LinkConv",
    "MemoryBank",
    "ReadConv",
    "RecallConv",
    "SlotState",
    "SlotWriteConv",
    "WriteConv",
]
