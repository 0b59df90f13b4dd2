"""One self-contained HTML page about a pruned model: `contents` gathers, `figures` draws, `page` writes, no network."""

from rmtkern.report.write import PageReport, write_report

__all__ = ["PageReport", "write_report"]
