"""From measurements to ``report.json``, ``report.md``, model cards and the table that a run ends with."""
