"""What make setup does after installing: build DeepSpeed's CPU operation and render the scenes of configs/tiny.yaml."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]


def main() -> None:
    from ijepa_scale.build import build_images
    from ijepa_scale.config import load_config
    from ijepa_scale.engine import distributed

    print("building DeepSpeed's CPU communication operation (about a minute, once) ...", flush=True)
    distributed.start().close()
    images = build_images(load_config(ROOT / "configs" / "tiny.yaml"))
    print(f"ready: {images.name}, {len(images):,} images")


if __name__ == "__main__":
    main()
