"""The page of a run, or several runs beside one another.

python launch/report.py runs/tiny                                                  writes runs/tiny/report.html
python launch/report.py runs/tiny runs/other --axis images --out comparison.html   .png: the curves alone

From metrics.jsonl and what lies beside it, also of a run that goes on or that died. docs/runs.md says what it shows.
Exit codes: 0 done, 2 wrong input.
"""

from ijepa_scale.verbs import fail, parser_of


def main(arguments: list[str] | None = None) -> int:
    parser = parser_of("report", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--axis",
        choices=("steps", "images", "seconds"),
        default="steps",
        help="what curves are drawn along (default: steps); seconds: those of training steps",
    )
    parser.add_argument(
        "--out", default="", help="a .html or .png (default: report.html of the run; of several: comparison.html)"
    )
    options = parser.parse_args(arguments)
    try:
        if options.out and not options.out.endswith((".html", ".png")):
            raise ValueError(f"--out {options.out} must end in .html or .png")
        from ijepa_scale.run.page import write_comparison, write_page

        if len(options.runs) == 1 and not options.out.endswith(".png"):
            written = write_page(options.runs[0], options.out, axis=options.axis)
        else:
            written = write_comparison(options.runs, options.out or "comparison.html", axis=options.axis)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    print(f"page: {written}" if written.suffix == ".html" else f"curves: {written}")
    return 0
