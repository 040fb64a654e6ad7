"""A trained network as a folder that transformers, timm, onnxruntime or this project opens; no GPU is needed.

python launch/export.py runs/small_images --format transformers --out exported

Writes the weights, what the format wants beside them, README.md (a model card) and export.json (what it is) to the
folder: whole, or not at all. Exit codes: 0 done, 2 wrong input.
"""

from pathlib import Path

from ijepa_scale.verbs import fail, parser_of

FORMATS = ("transformers", "timm", "safetensors", "onnx")
NEXT = {
    "transformers": "python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{out}')\"",
    "timm": "python -c \"import timm; timm.create_model('local-dir:{out}', pretrained=True)\"",
    "safetensors": "python launch/embed.py {out} MY_IMAGES --out my_embeddings",
    "onnx": "python -c \"import onnxruntime; onnxruntime.InferenceSession('{out}/model.onnx')\"",
}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("export", __doc__)
    parser.add_argument(
        "what", help="a run folder (its newest checkpoint is used), a checkpoint, or whatever else can be loaded"
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--out", required=True, help="a new folder, an empty one, or that of an earlier export")
    parser.add_argument(
        "--network",
        choices=("target", "context", "predictor"),
        help="default: the target encoder; with safetensors every network",
    )
    parser.add_argument("--license", default="unknown", help="of the weights, for the card: apache-2.0, ...")
    options = parser.parse_args(arguments)
    try:
        export_network(options.what, options.format, options.out, options.network, options.license)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    return 0


def export_network(what: str, form: str, out: str, network: str | None = None, licence: str = "unknown") -> None:
    """Export, and say what was written and what to type next."""
    from ijepa_scale.exchange.export import export

    done = export(what, Path(out), form=form, network=network, licence=licence)
    for note in dict.fromkeys(note for loaded in done for note in loaded.notes):
        print(note)
    for loaded in done:
        count = sum(parameter.numel() for parameter in loaded.network.parameters())
        step = "" if loaded.step is None else f", step {loaded.step:,}"
        print(f"{loaded.name}: {count:,} parameters of {loaded.path}{step}")
    print(f"{form}: {out}")
    if [loaded.name for loaded in done] != ["predictor"]:  # which embeds no images
        print(f"next: {NEXT[form].format(out=out)}")
    print(f"share: hf upload YOU/NAME {out}")
