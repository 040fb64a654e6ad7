"""Nearest neighbours among embeddings, as a list and a picture.

python launch/neighbours.py embeddings --query cat.jpg dog.jpg --out neighbours.png

Without --query, six images of the embeddings themselves are shown with their neighbours.
Exit codes: 0 done, 2 wrong input.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

from ijepa_scale.verbs import fail, parser_of


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("neighbours", __doc__)
    parser.add_argument("embeddings", help="a folder written by ijepa-scale embed")
    parser.add_argument("--query", nargs="+", default=[], metavar="IMAGE", help="image files to look up")
    parser.add_argument("--out", default="neighbours.png", help="the picture (default: neighbours.png)")
    parser.add_argument("--count", type=int, default=8, help="neighbours of each query (default: 8)")
    options = parser.parse_args(arguments)
    try:
        show_neighbours(options.embeddings, options.query, options.out, count=options.count)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    return 0


def show_neighbours(folder: str, paths: list[str], out: str, *, count: int) -> None:
    """Print, and draw to `out`, the images of a folder of embeddings that are nearest to image files, or to its own."""
    from ijepa_scale.data.images import open_images
    from ijepa_scale.evals.embed import Embeddings
    from ijepa_scale.visualize.neighbours import draw_neighbours, look_up

    embeddings = Embeddings.read(Path(folder))
    facts = embeddings.facts
    images = open_images(
        facts["source"],
        split=facts["split"],
        cache_dir=facts["cache_dir"],
        column=facts.get("column", ""),  # not in older ones
        config=facts.get("config", ""),
    )
    queries = embeddings.file_queries(paths, encoder_of(facts)) if paths else embeddings.own_queries(images)
    draw_neighbours(out, look_up(embeddings, images, queries, count, print))
    print(f"picture: {out}")


def encoder_of(facts: dict[str, Any]) -> "nn.Module":
    """The encoder that made the embeddings: another one's features are no neighbours of theirs."""
    from ijepa_scale.engine.distributed import alone
    from ijepa_scale.exchange.load import load

    path = Path(facts["checkpoint"])
    advice = (
        f"a query needs it: embed {facts['source']} again with ijepa-scale embed {facts['run']}, or leave out --query"
    )
    if path.is_absolute() and not path.exists():  # else it is a name, such as one of timm's
        raise ValueError(f"the checkpoint of these embeddings, {path}, is no longer there: a run keeps few; {advice}")
    loaded = load(facts["checkpoint"], facts.get("network", "target"))  # older ones are all of a target encoder
    if facts.get("checkpoint_sha256", loaded.sha256) != loaded.sha256:
        raise ValueError(f"the checkpoint of these embeddings, {path}, has been replaced by another one; {advice}")
    return loaded.network.to(alone().device)
