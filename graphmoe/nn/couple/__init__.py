from graphmoe.nn.couple.collab_conv import CollabConv
from graphmoe.nn.couple.couple_conv import CoupleConv
from graphmoe.nn.couple.hyper_couple_conv import HyperCoupleConv

__all__ = ["CollabConv", "CoupleConv", "HyperCoupleConv"]
