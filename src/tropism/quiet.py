"""Other libraries' noise, silenced where files and the hub are read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars for local files (a download still shows its own), and no warnings: what matters is said in an error."""
    import diffusers.utils.logging as first
    import huggingface_hub.utils.logging as third
    import transformers.utils.logging as second

    bars = [module for module in (first, second) if module.is_progress_bar_enabled()]
    levels = [(module, module.get_verbosity()) for module in (first, second, third)]
    try:
        for module in bars:
            module.disable_progress_bar()
        for module, _ in levels:
            module.set_verbosity(module.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for module, level in levels:
            module.set_verbosity(level)
        for module in bars:
            module.enable_progress_bar()
