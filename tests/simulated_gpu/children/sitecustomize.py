"""In every process that starts with this folder in its PYTHONPATH: the GPU is there once torch is."""

import tests.simulated_gpu.install  # noqa: F401
