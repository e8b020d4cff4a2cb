"""efficientllm: one config, one command, one honest row of numbers for each efficiency technique."""
