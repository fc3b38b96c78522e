"""report.html: one self-contained page about a run, created only from the files in its run directory."""
