"""Nearest neighbours among embeddings, as a list and a picture.

python launch/neighbours.py embeddings --query cat.jpg dog.jpg --out neighbours.png

Without --query, six images of the embeddings themselves are shown with their neighbours.
Exit codes: 0 done, 2 wrong input.
"""

import sys

from ijepa_scale.verbs import parser_of


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("neighbours", __doc__)
    parser.add_argument("embeddings", help="a folder written by launch/embed.py")
    parser.add_argument("--query", nargs="+", default=[], metavar="IMAGE", help="image files to look up")
    parser.add_argument("--out", default="neighbours.png", help="the picture (default: neighbours.png)")
    parser.add_argument("--count", type=int, default=8, help="neighbours of each query (default: 8)")
    options = parser.parse_args(arguments)
    from ijepa_scale.evals.embed import neighbours

    try:
        neighbours(options.embeddings, options.query, options.out, count=options.count)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
