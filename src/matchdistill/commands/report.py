"""The command report."""

from __future__ import annotations

from collections.abc import Sequence

from matchdistill.commands.options import path_option, plain_parser, point_to_page


def report(arguments: Sequence[str]) -> None:
    """Write the page of a run or a comparison, finished or not, or of several runs side by side."""
    parser = plain_parser("matchdistill report", report)
    parser.add_argument("runs", type=path_option, nargs="+", help="folders of runs, or of one comparison")
    parser.add_argument(
        "--out",
        type=path_option,
        default=None,
        help="the file; default: report.html in the folder, or here for several",
    )
    parser.add_argument("--open", action="store_true", help="open it in a browser")
    options = parser.parse_args(list(arguments))
    from matchdistill.report.page import write_report

    point_to_page(write_report(options.runs, options.out), options.open)
