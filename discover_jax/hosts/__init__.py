"""The processes of a run, one per host: how they start, exchange values and end together."""
