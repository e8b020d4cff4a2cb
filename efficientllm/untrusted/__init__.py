"""Safe readers of untrusted files, JSON, regular expressions and templates: limits of size, depth, time and memory."""
