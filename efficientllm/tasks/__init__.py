"""What `config.task` may name: a subclass of `base.Run`, from a config to a row."""

KINDS = {"task": "*"}
