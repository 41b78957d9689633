import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


@pytest.fixture
def forked(monkeypatch):
    """Reward workers are forked, in milliseconds, where they are spawned else: each imports torch anew, in seconds."""
    asked = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context", lambda way=None: asked("fork" if way == "spawn" else way))
