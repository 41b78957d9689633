import pytest
from tiny import tiny_pipeline


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """{"epsilon": folder, "v_prediction": folder} of tiny pipelines; read only."""
    root = tmp_path_factory.mktemp("pipelines")
    return {kind: tiny_pipeline(root / kind, kind) for kind in ("epsilon", "v_prediction")}
