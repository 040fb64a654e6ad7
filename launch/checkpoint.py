"""The verb checkpoint, from a checkout: all it does is in ijepa_scale/verbs/checkpoint.py."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in ("", "kernels")]

from ijepa_scale.verbs.checkpoint import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
