"""torch's process group of the ranks, made without torch in the process of Ray Train's controller."""

import os
from typing import Any

import ray
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig


class ProcessGroup(BackendConfig):
    """torch's, as TorchConfig has it. But the controller, which only says where the ranks meet, does not import torch;
    and the group ends with its processes: to take it down by word costs seconds of a restart, and half a minute where
    a rank hangs.

    Args:
        backend: nccl or gloo.
        timeout_s: after which a lost peer ends a collective.
    """

    def __init__(self, backend: str, timeout_s: int) -> None:
        self.backend, self.timeout_s = backend, timeout_s

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting

    @property
    def train_func_context(self) -> Any:
        """The driver's word for what each rank does first: it takes its GPU."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager


class _Meeting(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        ranks = range(len(worker_group))
        joined = [
            worker_group.execute_single_async(
                rank, _join, address, port, backend_config.backend, rank, len(ranks), backend_config.timeout_s
            )
            for rank in ranks
        ]
        ray.get(joined)


def _join(address: str, port: int, backend: str, rank: int, world: int, timeout_s: int) -> None:
    from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group

    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    _set_torch_distributed_env_vars()  # type: ignore[no-untyped-call]
    _setup_torch_process_group(backend, rank, world, "env://", timeout_s)
