"""Ray's fake nodes, each with a folder of its own for what jobs bring along."""

from typing import Any
from unittest.mock import patch
from uuid import uuid4

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class FakeNodes(FakeMultiNodeProvider):
    """On one machine nodes share the session's folder, and a node that starts unpacks a job's package over the one that
    processes of other nodes stand in: `os.getcwd()` fails there, and with it the import of torch.
    """

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock, patch("ray._private.ray_constants.DEFAULT_RUNTIME_ENV_DIR_NAME", f"packages-{uuid4().hex[:8]}"):
            super()._create_node_with_resources_and_labels(*arguments)
