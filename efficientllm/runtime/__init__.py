"""The process: kernel choice, several processes as one run, signals, allocator, console, files replaced whole."""
