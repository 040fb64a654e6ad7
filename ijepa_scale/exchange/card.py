"""The model card of an export: what it is, how it is used, and where it comes from."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ijepa_scale.data.transforms import usual_shorter_side
from ijepa_scale.exchange.networks import Loaded
from ijepa_scale.exchange.record import Record
from ijepa_scale.models.vit import VIT_SIZES

KINDS = {
    "target": "target encoder: the moving average of the context encoder, which the paper evaluates",
    "context": "context encoder: the one that was trained by gradients",
    "predictor": "predictor: from context tokens to target tokens",
}
# As their papers write them; others by their names in the config.
OBJECTIVES = {"ijepa": "I-JEPA", "mae": "MAE", "cae": "CAE"}
USES = {
    "transformers": """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("FOLDER"), AutoModel.from_pretrained("FOLDER")
pixels = processor(Image.open("photo.jpg"), return_tensors="pt")
features = model(**pixels).last_hidden_state.mean(1)  # (1, width): averaged over the patches
""",
    "timm": """\
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # of the Hub: "hf-hub:YOU/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model(transform(Image.open("photo.jpg").convert("RGB"))[None])  # (1, width): averaged over the patches
""",
    "onnx": """\
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
features, patches = session.run(["pooled_features", "patch_features"], {"images": crops})  # (B, 3, S, S) uint8 RGB
""",
    "safetensors": """\
from ijepa_scale.exchange.load import load

encoder = load("FOLDER", "target").network  # (B, 3, H, W) uint8 -> (B, patches, width)
""",
}

PREDICTOR = """\
from ijepa_scale.exchange.load import load

predictor = load("FOLDER", "predictor").network  # of context tokens and masks: ijepa_scale/models/predictor.py
"""


def card(form: str, loaded: Sequence[Loaded], licence: str, *, scored: str = "target") -> str:
    """A README.md as the Hub reads it. loaded: the networks in the export, whose weights are not looked at.

    scored: the name of the network that the run's report is of. licence: an identifier of the Hub's list, as
    apache-2.0; "unknown" asks its reader to ask.
    """
    first = next((one for one in loaded if one.name != "predictor"), loaded[0])
    record, side = Record.of(first), first.image_size
    objective = (first.config or {}).get("objective", {}).get("name", "ijepa")
    method = OBJECTIVES.get(objective, objective)
    name = next((name for name, size in VIT_SIZES.items() if size == record.size), "a vision transformer")
    front = {
        "license": licence,
        "pipeline_tag": "image-feature-extraction",
        "tags": [method.lower(), "ijepa-scale"],
    }
    if form in ("transformers", "timm"):
        front["library_name"] = form
    size = f"width {record.size.width}, depth {record.size.depth}, {record.size.heads} heads"
    parts = [
        f"---\n{yaml.safe_dump(front)}---",
        f"# {method}, {name}, patches of {record.patch_size} pixels",
        "\n".join(f"- {KINDS[one.name]}" for one in loaded),
        f"- {size}, MLP of {record.size.mlp_width}, LayerNorm eps 1e-6; no class token, no classifier\n"
        f"- images of {side} x {side} pixels\n- licence: {_said(licence)}",
        f"## Use\n\n```python\n{PREDICTOR if first.name == 'predictor' else USES[form]}```",
        f"An image is prepared so: RGB, its shorter side to {usual_shorter_side(side)} pixels (bicubic), the middle "
        f"{side} x {side} of that, ImageNet's mean and standard deviation.",
        _training(first),
        _scores(first) if first.name == scored else "",
    ]
    if first.config:
        parts.append(f"## Config\n\n```yaml\n{yaml.safe_dump(dict(first.config), sort_keys=False)}```")
    parts.append("Written by [ijepa-scale](https://arxiv.org/abs/2301.08243), an implementation of I-JEPA.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _said(licence: str) -> str:
    return f"{licence}; whoever shares these weights states it" if licence == "unknown" else licence


def _training(loaded: Loaded) -> str:
    step = "" if loaded.step is None else f" Step {loaded.step:,}."
    data = (loaded.config or {}).get("data", {})
    if not data:
        return f"## Training\n\nThe data are not recorded.{step}"
    start = (loaded.config or {}).get("model", {}).get("init_from")
    began = f" It began with the weights of `{start}`, however these were trained." if start else ""
    source = f"`{data.get('source')}`, split `{data.get('split')}`"
    return f"## Training\n\nSelf-supervised, without labels, on {source}.{began}{step}"


def _scores(loaded: Loaded) -> str:
    """Of the run's report, where that is of this checkpoint; "" where there is none."""
    path = loaded.path.resolve().parent.parent / "report.json"
    if loaded.step is None or not loaded.path.is_dir() or not path.is_file():
        return ""
    report: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    scores = report.get("scores", [])
    if not scores or report.get("checkpoint", "") != loaded.path.name:
        return ""
    rows = [
        f"| {score['probe']} | {score['trained']:.1f} ± {score['trained_error']:.1f} | {score['initial']:.1f} "
        f"| {score['chance']:.1f} |"
        for score in scores
    ]
    of_test = "" if report.get("held_out") else "; its test images were among the training images"
    return "\n".join(
        (
            "## Scores",
            "",
            f"Top-1 accuracy (%) of frozen features, as the report of the run has them, of its best encoder{of_test}.",
            "",
            "| probe | trained | before training | chance |",
            "|---|---|---|---|",
            *rows,
            *(["", f"Before training: {report['initial']}."] if report.get("initial") else []),
        )
    )
