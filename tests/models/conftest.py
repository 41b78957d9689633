import pytest
from tiny import tiny_pipeline
from tiny_families import tiny_auraflow, tiny_chroma, tiny_flux, tiny_sd3, tiny_sdxl

BUILDERS = {
    "epsilon": tiny_pipeline,
    "v_prediction": lambda folder: tiny_pipeline(folder, "v_prediction"),
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "sd3_without_t5": lambda folder: tiny_sd3(folder, t5=False),
    "flux": tiny_flux,
    "schnell": lambda folder: tiny_flux(folder, distilled=False),
    "auraflow": tiny_auraflow,
    "chroma": tiny_chroma,
}


class Folders(dict):
    """{name: folder} of tiny pipelines, built when first asked for; read only."""

    def __init__(self, root):
        super().__init__()
        self.root = root

    def __missing__(self, name):
        self[name] = BUILDERS[name](self.root / name)
        return self[name]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("pipelines"))
