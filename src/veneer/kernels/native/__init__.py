"""Parts of a training step in C, compiled by the machine's own compiler when they are first wanted.

Row-wise and element-wise work that torch does in many passes is done in one (`native.c`, `forms.h`). Where there is no
C compiler with OpenMP, on other devices and for other dtypes, callers run their plain forms; ``VENEER_NATIVE=0`` has
them do so everywhere. The compiled object is kept in the cache folder, under a name that tells source, compiler and
processor.

All functions here are operations of torch's library ``veneer``, so that they run on shapes alone, too.
"""

from veneer.kernels.native.build import plain, state, there
from veneer.kernels.native.operations import suits

__all__ = ["plain", "state", "suits", "there"]
