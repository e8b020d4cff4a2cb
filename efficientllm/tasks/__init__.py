"""What `config.task` may name: a function of (config, workdir) that runs to the end and returns the row."""

KINDS = {"task": "*"}
