"""One thread a process: the suite runs in several, and threads that compete for cores make it many times slower."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it
