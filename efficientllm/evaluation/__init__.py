"""Evaluation: held-out loss, perplexity and bits per byte, and tasks of EleutherAI's lm-evaluation-harness."""
