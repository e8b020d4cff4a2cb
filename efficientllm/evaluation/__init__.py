"""Quality beyond held-out loss: tasks of EleutherAI's lm-evaluation-harness."""
