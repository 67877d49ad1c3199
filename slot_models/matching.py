"""One-to-one matching of two sets at the least cost."""

import numpy as np
import torch
from torch import Tensor

from slot_models.checks import check_shape


@torch.no_grad()
def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The Hungarian assignment of each image, solved in float64 on the CPU; it has no gradient.

    Args:
        cost: float [B, N, M], what it costs to pair row n with column m.

    Returns:
        rows and columns, int64 [B, min(N, M)] on the cost's device: pair i of an image joins row ``rows[i]`` to column
        ``columns[i]``. Rows ascend, so those of a cost with N <= M are 0 to N - 1. The sum over the pairs is the least
        there is; which of several least assignments it is, is not said.

    Raises:
        ImportError: scipy is missing.
        ValueError: the cost is not [B, N, M], or holds NaN or infinity.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('matching needs scipy; install it with: pip install "slotforge[models]"') from error
    check_shape("cost", cost, ("B", "N", "M"))
    costs = cost.detach().double().cpu().numpy()
    if not np.isfinite(costs).all():
        raise ValueError("cost: it holds NaN or infinity; a pair needs a number")
    pairs = np.zeros((len(costs), 2, min(costs.shape[1:])), dtype=np.int64)  # [B, 2, min(N, M)]
    for image, one in enumerate(costs):
        pairs[image] = linear_sum_assignment(one)
    rows, columns = torch.from_numpy(pairs).to(cost.device).unbind(dim=1)
    return rows, columns
