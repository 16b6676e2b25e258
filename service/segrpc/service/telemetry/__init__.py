"""What is told of calls and of the server: the log, metrics, traces."""
