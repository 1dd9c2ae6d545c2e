"""Shared by every test: quiet Lightning, one thread a process, and no network."""

import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("house", deadline=None)  # a first call may compile, and CI's cores are shared
hypothesis.settings.load_profile("house")
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture(autouse=True)
def _fresh_torch_state():
    """Each test starts from one seed and must leave no other default and no process group behind."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    if torch.distributed.is_initialized():  # Lightning leaves the group of a one-process run open
        torch.distributed.destroy_process_group()
    for name in [name for name in os.environ if name.startswith(("MASTER_", "LOCAL_", "NODE_", "GROUP_", "WORLD_"))]:
        del os.environ[name]  # the address of that group, which a process started later would try to take


@pytest.fixture
def triton_interpreter():
    """Run source in a fresh process with TRITON_INTERPRET=1, which must be set before Triton is imported."""

    def run(source: str, timeout_s: int = 240) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "kernel_under_test.py")  # @triton.jit reads its function's source from a file
            path.write_text(textwrap.dedent(source))
            result = subprocess.run(
                [sys.executable, path],
                env={**os.environ, "TRITON_INTERPRET": "1"},
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        assert result.returncode == 0, result.stderr[-4000:]
        return result.stdout

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder of small coloured pictures, two classes of eight, in the layout of ImageFolders."""
    import numpy as np
    from PIL import Image

    root, noise = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        (root / name).mkdir()
        for k in range(8):
            Image.fromarray(noise.integers(low, low + 128, (40, 48, 3), dtype=np.uint8)).save(root / name / f"{k}.png")
    return root


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """A test that forks runs in a fresh process: forking one in which other tests have started threads can hang for ever."""
    if pyfuncitem.get_closest_marker("forks") is None or "FORKS_ALONE" in os.environ:
        return None
    alone = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "", "-o", "timeout=0", pyfuncitem.nodeid]
    root = pyfuncitem.config.rootpath
    # Lightning leaves the address of the last group in the environment: a fresh process chooses its own port.
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "LOCAL_", "NODE_", "GROUP_", "WORLD_"))
    }
    done = subprocess.run(alone, cwd=root, env={**kept, "FORKS_ALONE": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return True
