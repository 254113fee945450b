import ctypes
import sys
from functools import cache

from torch import Tensor

_MADV_HUGEPAGE = 14
_PAGE = 4096
_LARGE = 1 << 22  # bytes; below it the pages are few and mostly recycled


@cache
def _madvise():
    """The C library's ``madvise``, or ``None`` where there is none or its constants may differ."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised tensor of the dtype and device of ``like``.

    Large tensors on a Linux CPU ask for huge pages. Memory fresh from the system is mapped page by
    page on first touch, which for a large tensor takes longer than filling it; huge pages make that
    about 5 times cheaper. The advice changes no values, and the system is free to ignore it.
    """
    out = like.new_empty(shape)
    if out.nbytes >= _LARGE and out.device.type == "cpu" and _madvise() is not None:
        start = -(-out.data_ptr() // _PAGE) * _PAGE
        end = (out.data_ptr() + out.nbytes) // _PAGE * _PAGE
        _madvise()(start, end - start, _MADV_HUGEPAGE)
    return out
