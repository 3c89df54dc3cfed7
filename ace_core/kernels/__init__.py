"""Compiled loops over the constraint index, the codewords and the stored remainders, and the text encoder (CPU).

Why numba: the walk is a data-dependent loop over a few hundred real children a row, which tensor operations can only
do by padding every row to its level's vocabulary; a compiled loop looks at the children alone and rejects most of
them with one comparison. A C++ torch operator would need a compiler on the user's machine.

Arrays of the index are passed as addresses, so one compilation serves any number of segments, 8- and 16-bit tokens,
32- and 64-bit pointers, memory-mapped (read-only) or not. Compiling costs some 45 s once a machine (a step, drafts,
the text encoder). The kernels are serial and release the GIL: threads that search at the same time share nothing but
the read-only index (numba's own thread pool is not used; its default layer is not thread-safe).
"""

from ace_core.kernels.assign import assign
from ace_core.kernels.complete import complete
from ace_core.kernels.draft import draft, draft_items
from ace_core.kernels.expand import expand
from ace_core.kernels.items import collect, mark_parents
from ace_core.kernels.similarity import add_products, products
from ace_core.kernels.single import expand_one

__all__ = [
    "add_products",
    "assign",
    "collect",
    "complete",
    "draft",
    "draft_items",
    "expand",
    "expand_one",
    "mark_parents",
    "products",
]
