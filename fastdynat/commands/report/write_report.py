"""A report from run directories to files."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastdynat.commands.report.report_config import ReportConfig, check_report
from fastdynat.commands.report.report_files import ReportFiles
from fastdynat.execution.process_state import process_state_kept
from fastdynat.runs.atomic_files import make_folder
from fastdynat.runs.output_checks import check_output
from fastdynat.terminal.progress import ProgressDisplay

logger = logging.getLogger(__name__)

PAGE, FINDINGS = "index.html", "findings.json"


@process_state_kept()
def write_report(paths: Sequence[Path | str], config: ReportConfig, display: ProgressDisplay) -> int:
    """Write the page and its pictures. Returns 0, or 128+n if signal n cut it short.

    Raises:
        UserError: a value that cannot work, a path that is no run, data that is not there; before anything is
            computed.
    """
    check_report(config)
    from fastdynat.commands.report import compute, page  # extra `plots`, which has been looked for
    from fastdynat.commands.report import report_charts as charts
    from fastdynat.commands.report.findings_cache import Cache
    from fastdynat.commands.report.gallery import draw_gallery
    from fastdynat.commands.report.run_records import read_records

    records = read_records([Path(path) for path in paths])
    out = Path(config.out)
    cache = Cache(out / FINDINGS)
    make_folder(out)
    check_output(out / PAGE)
    files = ReportFiles(out, FINDINGS)
    files.check([PAGE, *page.SHEETS, *(f"images-{number}.png" for number, _ in enumerate(records, 1))])
    found = compute.gather(records, config, cache, display)
    looks = charts.looks([record.name for record in records])
    report = page.Report(records, found, config, looks)
    sections = report.sections()
    for section in sections:
        if section.panels:
            files.write(section.file, charts.sheet(section.panels, looks))
    for number, (name, examples) in enumerate(found.of_run["examples"].items(), 1):
        files.write(f"images-{number}.png", draw_gallery(name, examples))
    text = page.render(report, sections, datetime.now(UTC).strftime("%d %B %Y"))
    files.write(PAGE, text.encode(errors="backslashreplace"))  # paths may hold bytes that are no text
    files.drop_others()
    if found.signal is not None:
        logger.info("stopped; %s shows what is done, the same command goes on", out / PAGE)
        return 128 + found.signal
    logger.info("done: %s", out / PAGE)
    return 0
