from graphmoe.nn.attend.attend_conv import AttendConv
from graphmoe.nn.attend.rotary import rotary, rotate

__all__ = ["AttendConv", "rotary", "rotate"]
