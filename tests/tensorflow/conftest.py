"""TensorFlow speaks to standard error while it starts, and says there what the machine has and has not."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
