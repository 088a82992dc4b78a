"""Of every process of a run of tests/on_pretended_gpu.sh, before anything else."""

import os
import traceback

try:
    import pretended_gpu.install

    pretended_gpu.install.install()
except BaseException:  # Python would go on without it
    traceback.print_exc()
    os._exit(1)
