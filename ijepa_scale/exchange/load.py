"""The one loader: a run, a checkpoint, an export or a file of another project -> one of its networks."""

from pathlib import Path
from typing import Any

from ijepa_scale.exchange import files, reference, run, safetensors, timm, transformers
from ijepa_scale.exchange.networks import NETWORKS, Loaded, Networks
from ijepa_scale.exchange.record import read_record
from ijepa_scale.exchange.weights import read_json, read_pickle

READ = (
    "a run folder or one of its checkpoints, a checkpoint file of the I-JEPA reference, an IJepaModel folder of "
    "transformers, a ViT folder or file of timm, timm:NAME, or an export"
)


def load(path: str | Path, network: str = "target") -> Loaded:
    """One network of whatever find() takes.

    network: "target" (the EMA of the context encoder), "context" or "predictor". Where there is one encoder
    alone it answers to both of the names, and the notes say which it is.
    Raises ValueError where there is nothing, something else, no such network, or weights that do not fit.
    """
    if network not in NETWORKS:
        raise ValueError(f"unknown network {network!r}; choose one of {', '.join(NETWORKS)}")
    return find(path).load(network)


def find(path: str | Path) -> Networks:
    """The networks of a run folder (its newest whole checkpoint), a checkpoint folder, a file of the reference, a
    folder or file of transformers or timm, timm:NAME (weights from timm's cache), or an export of ours.

    Of each the weights are read when they are asked for. Raises ValueError where there is nothing, or something else.
    """
    name = str(path)
    if name.startswith(timm.SCHEME):
        return timm.networks_of_name(name.removeprefix(timm.SCHEME))
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    raise ValueError(f"there is no {path}; give {READ}")


def source_of(what: str | Path, loaded: Loaded) -> str:
    """An absolute path, or a name such as timm's. Of a run it is the checkpoint: its newest one will be another.

    what: that load() was given, and gave loaded.
    """
    path = loaded.path if loaded.path.is_dir() else Path(what)
    return str(path.absolute()) if path.exists() else str(what)


def _folder(path: Path) -> Networks:
    if graphs := sorted(path.glob("*.onnx")):
        return _file(graphs[0])  # which says what to give instead
    if safetensors.is_export(path):
        return safetensors.networks(path)
    config = _config(path)
    if "model_type" in config:
        return transformers.networks(path, config)
    if "architecture" in config:
        return timm.networks_of_folder(path)
    return run.networks(path)


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json") if (folder / "config.json").is_file() else {}


def _file(path: Path) -> Networks:
    if path.suffix == ".onnx":
        raise ValueError(f"{path} is an ONNX graph, which is written and not read; load what it was exported from")
    if path.stem in ("model", "pytorch_model") and {"model_type", "architecture"} & _config(path.parent).keys():
        return _folder(path.parent)  # which knows its heads
    record = read_record(path)
    if record and record.network == "predictor":
        return safetensors.networks_of_file(path, record)
    if path.suffix == ".safetensors":
        return files.networks(path)
    content = read_pickle(path)
    return reference.networks(path) if reference.is_reference(content) else files.networks(path, content)
