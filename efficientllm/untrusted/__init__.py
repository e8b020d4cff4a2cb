"""Files, JSON, regular expressions and templates of others: read within limits of kind, size, depth and time."""
