"""report.html: one self-contained page on a run, made from nothing but the files that the run wrote."""
