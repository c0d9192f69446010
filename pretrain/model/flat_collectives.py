"""torch's collectives of flat tensors, by the names that this version of torch has for them.

torch 2.13 renames both and warns of the old names; earlier versions have those alone.
"""

from typing import Any

import torch.distributed as dist

reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
