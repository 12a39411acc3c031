"""The report of a run: one page, and the same as Markdown, from the files of its folder alone."""

from pathlib import Path

from nvfp4_train.disk import replace_file
from nvfp4_train.report.contents import contents
from nvfp4_train.report.html import page
from nvfp4_train.report.markdown import document
from nvfp4_train.report.run_files import RunFiles

__all__ = ["write_report"]

HTML, MARKDOWN = "report.html", "report.md"


def write_report(run_dir: Path) -> Path:
    """Write report.html and report.md of a run to its folder. Returns the path of the page.

    Raises ValueError where the folder is not that of a run, and DiskError where the disk takes no more.
    """
    found = contents(RunFiles.read(run_dir))
    replace_file(run_dir / MARKDOWN, document(found), what="the report")
    replace_file(run_dir / HTML, page(found), what="the report")
    return run_dir / HTML
