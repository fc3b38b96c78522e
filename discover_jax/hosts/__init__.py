"""The processes of one run, one a host: how they start, what they tell each other, and how they end together."""
