"""Nodes that are processes of one machine, for Ray's autoscaler: Ray's own fake ones, each with a folder of its own.

Ray's share one folder of unpacked jobs, and each node that comes unpacks them anew under the feet of the others.
"""

import copy
import json
from typing import Any

from ray._private import ray_constants
from ray._private.node import Node
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import (
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)


class FakeNodes(FakeMultiNodeProvider):
    """As its parent, in all but the place of each node's files."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: dict[str, int], labels: dict[str, str]
    ) -> None:
        left = copy.deepcopy(resources)
        with self.lock:
            node_id: str = self._next_hex_node_id()  # type: ignore[no-untyped-call]
            kind = tags[TAG_RAY_USER_NODE_TYPE]
            parameters = RayParams(
                gcs_address=self._gcs_address,
                redis_address=self._gcs_address,
                runtime_env_dir_name=f"{ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME}-{node_id[-5:]}",
                min_worker_port=0,
                max_worker_port=0,
                dashboard_port=None,
                dashboard_agent_listen_port=0,
                num_cpus=left.pop("CPU", 0),
                num_gpus=left.pop("GPU", 0),
                object_store_memory=left.pop("object_store_memory", None),
                resources=dict(left),
                labels=labels,
                env_vars={
                    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": node_id,
                    "RAY_CLOUD_INSTANCE_ID": node_id,
                    "RAY_NODE_TYPE_NAME": kind,
                    ray_constants.RESOURCES_ENVIRONMENT_VARIABLE: json.dumps(left),
                    ray_constants.LABELS_ENVIRONMENT_VARIABLE: json.dumps(labels),
                },
            )
            node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
            own = {
                TAG_RAY_NODE_KIND: NODE_KIND_WORKER,
                TAG_RAY_USER_NODE_TYPE: kind,
                TAG_RAY_NODE_NAME: node_id,
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            }
            self._nodes[node_id] = {"tags": {**own, **tags}, "node": node}  # type: ignore[dict-item]
